"""Log probabilities in the forms in which OpenAI's two endpoints show them.

Owns these forms and vLLM's for a prompt. Invariant: one entry for each token, in order. Knows
nothing of where the figures come from.
"""

from collections.abc import Sequence

from pydantic import BaseModel

from server.text.incremental import Detokenizer
from server.text.text import Text
from server.text.token_texts import TokenTexts
from workers.messages import TokenLogprobs


class ChatTokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTokenLogprob):
    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Lists in step. `text_offset` is where in the text a token begins; the first token of an
    echoed prompt has no probability."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class PromptLogprob(BaseModel):
    """vLLM's."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt, by token id: it and the likeliest ones. None for the first."""


def chat_logprobs(
    token_ids: Sequence[int], found: Sequence[TokenLogprobs], text: TokenTexts
) -> ChatLogprobs:
    """Of an answer, or of a piece of it."""

    def one(token: int, logprob: float) -> ChatTokenLogprob:
        shown, raw = text(token)
        return ChatTokenLogprob(token=shown, logprob=logprob, bytes=list(raw))

    return ChatLogprobs(
        content=[
            ChatLogprob(
                **one(token, entry.logprob).model_dump(),
                top_logprobs=list(map(one, entry.top_ids, entry.top_logprobs)),
            )
            for token, entry in zip(token_ids, found, strict=True)
        ]
    )


class TextOffsets:
    """Where tokens begin in a text. One that is a part of a character begins where the character
    does."""

    def __init__(self, text: Text, detokenizer: Detokenizer) -> None:
        """`detokenizer`: a new one, that makes the text."""
        self._detokenizer = detokenizer
        self._names = text.special_texts
        self._num_chars = 0

    def of(self, token_id: int, written: str = "") -> int:
        """Of the next token. `written`: the text as somebody wrote it, in which special tokens may
        show."""
        offset = self._num_chars
        name = self._names.get(token_id)
        if name is None:
            self._num_chars += len(self._detokenizer.feed([token_id]))
        elif written.startswith(name, offset):
            self._num_chars += len(name)
        return offset

    def begin_answer(self, offset: int) -> None:
        """What follows begins there, whatever came before."""
        self._num_chars = offset


def completion_logprobs(
    token_ids: Sequence[int],
    found: Sequence[TokenLogprobs | None],
    count: int,
    text: Text,
    offsets: Sequence[int],
) -> CompletionLogprobs:
    """With the `count` likeliest tokens. `offsets`: where each token begins."""
    logprobs = CompletionLogprobs(text_offset=list(offsets))
    for token, entry in zip(token_ids, found, strict=True):
        shown = text.tokens(token)[0]
        logprobs.tokens.append(shown)
        logprobs.token_logprobs.append(None if entry is None else entry.logprob)
        if entry is None:
            logprobs.top_logprobs.append(None)
            continue
        by_text: dict[str, float] = {}  # of tokens that look alike, the likeliest
        for other, logprob in _likeliest(entry, count):
            by_text.setdefault(text.tokens(other)[0], logprob)
        by_text.setdefault(shown, entry.logprob)
        logprobs.top_logprobs.append(by_text)
    return logprobs


def prompt_logprobs(
    token_ids: Sequence[int], found: Sequence[TokenLogprobs], text: TokenTexts, count: int
) -> PromptLogprobs:
    """Of a whole prompt, with the `count` likeliest tokens; `found` lacks its first token."""
    entries: PromptLogprobs = [None]
    for token, entry in zip(token_ids[1:], found, strict=True):
        shown = {
            str(other): PromptLogprob(logprob=logprob, rank=rank, decoded_token=text(other)[0])
            for rank, (other, logprob) in enumerate(_likeliest(entry, count), start=1)
        }
        shown[str(token)] = PromptLogprob(
            logprob=entry.logprob, rank=entry.rank, decoded_token=text(token)[0]
        )
        entries.append(shown)
    return entries


def _likeliest(entry: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    return list(zip(entry.top_ids, entry.top_logprobs, strict=True))[:count]
