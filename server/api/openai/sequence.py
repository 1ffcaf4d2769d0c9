"""One sequence as text: the tokens of a `TokenStream`, detokenized, up to a stop string.

Owns a token stream from its `submit` to its close. Invariant: the texts of all deltas, joined, are
the text of all their tokens, cut at the first stop string; exactly the last has a finish reason.
Knows nothing of HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from server.api.openai.replies import Finish
from server.errors import InstanceFailed
from server.generation import Chunk, TokenStream
from server.text.incremental import Detokenizer, StopStrings
from workers.messages import TokenLogprobs

NOTHING_HIDDEN: Final[Mapping[int, str]] = MappingProxyType({})


@dataclass(frozen=True)
class Delta:
    """What came. Tokens may come before the text that they are part of, or have none.

    `logprobs` belong to the first of `token_ids`: all but the one that ended the sequence and is no
    text. `prompt_logprobs` come with the first delta."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Answer:
    """All deltas of one sequence together."""

    text: str
    token_ids: list[int]
    finish_reason: Finish
    logprobs: list[TokenLogprobs]
    prompt_logprobs: tuple[TokenLogprobs, ...]


class TextSequence:
    """Iterate `deltas` once; call `aclose` in any case."""

    def __init__(
        self,
        tokens: TokenStream,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        prompt_ids: Sequence[int],
        min_tokens: int = 0,
        hidden: Mapping[int, str] = NOTHING_HIDDEN,
    ):
        """No stop string is looked for in the text of the first `min_tokens`. `hidden`: tokens that
        the text does not show and stop strings may name."""
        self.prompt_ids = prompt_ids
        self.num_cached = 0
        """Tokens of the prompt that an instance had computed before, once a first delta came."""
        self._num_unstopped = min_tokens
        self._tokens = tokens
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._hidden = hidden

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Up to and with the one that has a finish reason. Raises `InstanceFailed`."""
        async for chunk in self._tokens:
            delta = self._delta(chunk)
            if delta.finish_reason is not None:
                await self.aclose()
                yield delta
                return
            yield delta
        raise InstanceFailed("The sequence ended before it was finished. Send the request again.")

    async def aclose(self) -> None:
        """Ends the sequence where it is; nothing if it has ended."""
        await self._tokens.aclose()

    def _delta(self, chunk: Chunk) -> Delta:
        self.num_cached += chunk.num_cached
        reason = chunk.finish_reason
        if reason in ("abort", "error"):
            raise InstanceFailed("The instance gave up the sequence. Send the request again.")
        ids = chunk.token_ids
        num_shown = len(ids) - 1 if reason == "stop" else len(ids)
        logprobs, of_prompt = chunk.logprobs[:num_shown], chunk.prompt_logprobs
        text = ""
        for index in range(num_shown):
            piece = self._detokenizer.feed(ids[index : index + 1])
            if self._num_unstopped > 0:
                self._num_unstopped -= 1
                text += piece
                continue
            text += self._stops.feed(piece)
            if (name := self._hidden.get(ids[index])) is not None:
                text += self._stops.feed(name, hidden=True)
            if self._stops.matched is not None:
                # What a chunk may hold beyond was never asked for.
                stop = index + 1
                return Delta(text, ids[:stop], "stop", logprobs[:stop], of_prompt)
        if reason is None:
            return Delta(text, ids, None, logprobs, of_prompt)
        text += self._stops.feed(self._detokenizer.finish())
        if self._stops.matched is not None:
            return Delta(text, ids, "stop", logprobs, of_prompt)
        text += self._stops.finish()
        ended: Finish = "stop" if reason == "stop" else "length"
        return Delta(text, ids, ended, logprobs, of_prompt)


async def merged(sequences: Sequence[TextSequence]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of several sequences, each with its index, in the order in which they come."""
    if len(sequences) == 1:
        async with aclosing(sequences[0].deltas()) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    iterators = [sequence.deltas() for sequence in sequences]
    waiting = {asyncio.ensure_future(_next(it)): index for index, it in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                delta = task.result()
                if delta.finish_reason is None:
                    waiting[asyncio.ensure_future(_next(iterators[index]))] = index
                yield index, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(deltas: AsyncGenerator[Delta, None]) -> Delta:
    return await anext(deltas)
