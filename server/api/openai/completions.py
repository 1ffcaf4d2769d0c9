"""`POST /v1/completions`: prompts as text or token ids; `n` choices of the answer for each."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.openai.admission import Front, new_id, submit_all
from server.api.openai.answer import EventStream, collect
from server.api.openai.body_reader import BodyReader
from server.api.openai.logprobs import completion_logprobs, prompt_logprobs
from server.api.openai.rendering import aside, event, num_entries, response
from server.api.openai.replies import Completion, CompletionChoice, Reply, Usage
from server.api.openai.sampling import check_token_ids, sampling_for
from server.api.openai.schemas import MAX_PROMPTS, CompletionRequest, texts_or_ids
from server.api.openai.sequence import Answer, Delta, TextSequence, merged
from server.api.openai.structured import grammar_for
from server.errors import InvalidRequest
from server.models.serving import Serving
from server.text.text import Text
from workers.messages import TokenLogprobs

DEFAULT_MAX_TOKENS: Final = 16


@dataclass(frozen=True)
class _Prompt:
    """As it came, and its tokens."""

    text: str | None
    """None where it came as token ids."""
    token_ids: list[int]


def routes(front: Front, bodies: BodyReader) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class())

    @router.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        serving = front.generating(body)
        facts = serving.generator.facts
        grammar = await grammar_for(front.grammars, body)
        prompts = await _prompts(serving, body)
        if len(prompts) * body.num_choices > MAX_PROMPTS:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {body.num_choices} choices each are more than "
                f"{MAX_PROMPTS} sequences. Ask for fewer.",
                param="n",
            )
        starts = [
            (prompt.token_ids, sampling)
            for prompt in prompts
            for sampling in sampling_for(
                body,
                len(prompt.token_ids),
                max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens or 1,
                grammar=grammar,
                prompt_logprobs=_num_prompt_logprobs(body),
                facts=facts,
                stop_token_ids=serving.text.stop_token_ids,
                defaults=serving.sampling_defaults,
                param="prompt",
            )
        ]
        template = Completion(
            id=new_id("cmpl"), created=int(time.time()), model=serving.model_name, choices=[]
        )
        sequences = await submit_all(
            serving, body, front.options(body, request), template.id, starts
        )
        choices = [
            _Choice(serving.text, body, index, prompts[index // body.num_choices])
            for index in range(len(sequences))
        ]
        if body.stream:
            return EventStream(_events(template, body, sequences, choices, prompts), sequences)
        answers = await collect(request, sequences)

        def reply() -> Completion:
            pieces = [one.piece(answer) for one, answer in zip(choices, answers, strict=True)]
            usage = _usage(prompts, choices, sequences)
            return template.model_copy(update={"choices": pieces, "usage": usage})

        return await response(reply, num_entries(answers))

    return router


def _num_prompt_logprobs(body: CompletionRequest) -> int | None:
    """What is to be found out of the prompt's tokens: what is asked for, and what an echo shows."""
    if body.echo and body.logprobs is not None:
        return max(body.logprobs, body.prompt_logprobs or 0)
    return body.prompt_logprobs


async def _prompts(serving: Serving, body: CompletionRequest) -> list[_Prompt]:
    facts = serving.generator.facts
    if not body.prompt:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    prompts: list[_Prompt] = []
    for part in texts_or_ids(body.prompt):
        if isinstance(part, str):
            ids = await serving.text.encode(part, context_tokens=facts.max_model_len)
            prompts.append(_Prompt(part, ids))
        else:
            prompts.append(_Prompt(None, part))
    for one in prompts:
        check_token_ids(one.token_ids, facts)
    return prompts


class _Choice:
    """One choice as the API shows it: the text, behind the prompt if that is to be echoed."""

    def __init__(self, text: Text, body: CompletionRequest, index: int, prompt: _Prompt) -> None:
        self._text = text
        self._body = body
        self._index = index
        self._prompt = prompt
        self._offset = 0  # of the next token in the text
        self._begun = False
        self.num_tokens = 0

    def piece(self, delta: Delta | Answer) -> CompletionChoice:
        """What comes next; the first piece has what is said of the prompt."""
        body, prompt_ids = self._body, self._prompt.token_ids
        choice = CompletionChoice(
            index=self._index, text=delta.text, finish_reason=delta.finish_reason
        )
        ids, logprobs = list(delta.token_ids), list[TokenLogprobs | None](delta.logprobs)
        if body.max_tokens == 0:  # one was generated, since less can't be
            choice.text, ids, logprobs = "", [], []
            choice.finish_reason = "length" if delta.finish_reason else None
        self.num_tokens += len(ids)
        if body.return_token_ids:
            choice.token_ids = ids
        shown = ids[: len(logprobs)]
        if not self._begun:
            self._begun = True
            if body.return_token_ids:
                choice.prompt_token_ids = list(prompt_ids)
            if body.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(
                    prompt_ids, delta.prompt_logprobs, self._text.tokens, body.prompt_logprobs
                )
            if body.echo:
                choice.text = self._prompt_text() + choice.text
                shown = [*prompt_ids, *shown]
                logprobs = [None, *delta.prompt_logprobs, *logprobs]
        if body.logprobs is not None:
            choice.logprobs, self._offset = completion_logprobs(
                shown, logprobs, body.logprobs, self._text, self._offset
            )
        return choice

    def _prompt_text(self) -> str:
        if self._prompt.text is not None:
            return self._prompt.text
        return self._text.decode(self._prompt.token_ids)


def _usage(
    prompts: Sequence[_Prompt], choices: Sequence[_Choice], sequences: Sequence[TextSequence]
) -> Usage:
    """A prompt counts once, however many choices it has."""
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    num_cached = sum(one.num_cached for one in sequences[:: len(choices) // len(prompts)])
    return Usage.of(num_prompt, sum(choice.num_tokens for choice in choices), num_cached)


async def _events(
    template: Completion,
    body: CompletionRequest,
    sequences: Sequence[TextSequence],
    choices: Sequence[_Choice],
    prompts: Sequence[_Prompt],
) -> AsyncGenerator[Reply | bytes, None]:
    async with aclosing(merged(sequences)) as deltas:
        async for index, delta in deltas:
            size = num_entries([delta])
            piece = await aside(partial(choices[index].piece, delta), size)
            tells = piece.text or piece.finish_reason or piece.token_ids is not None
            if tells or (piece.logprobs is not None and piece.logprobs.tokens):
                yield await event(template.model_copy(update={"choices": [piece]}), size)
    if body.include_usage:
        yield template.model_copy(update={"usage": _usage(prompts, choices, sequences)})
