"""What the HTTP side needs of the generating side: token ids in, chunks of token ids out.

Owns the types between the two. Invariant: a `TokenStream` that was handed out is closed, whatever
happens to the request. Knows nothing of text, HTTP, or how instances are chosen and reached.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from workers.messages import FinishReason, ModelFacts, SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence.

    With `finish_reason` "stop" the last token id is the one that ended the sequence (end of
    sequence, or a stop token), and is not part of the text. The chunk with a reason is the last.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token id if the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first chunk, if the request asked for them: one for each token of the prompt but the
    first."""
    num_cached: int = 0
    """Tokens of the prompt that an instance had computed before; with the first chunk."""


@dataclass(frozen=True)
class SamplingDefaults:
    """What holds where a request does not say: the model's own advice, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


NO_ADVICE: Final = SamplingDefaults()


@dataclass(frozen=True)
class RequestOptions:
    """What a request says of itself, beside what it asks for."""

    priority: int = 0
    """The lowest goes first."""
    deadline_s: float | None = None
    """After so many seconds nobody wants the answer any more."""
    cache_salt: str = ""
    """Only requests of the same salt share what was computed of a common beginning."""


NO_OPTIONS: Final = RequestOptions()


class TokenStream(Protocol):
    """The tokens of one sequence as they come. Iteration may raise `InstanceFailed`."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    async def aclose(self) -> None:
        """Aborts the sequence if it is unfinished. Can be called again, and at any time."""


class Generator(Protocol):
    """Whatever turns a prompt into tokens."""

    async def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
    ) -> TokenStream:
        """Starts a sequence. Raises `Overloaded` or `NotReady`, then nothing was started."""

    async def embed(
        self, request_id: str, inputs: Sequence[Sequence[int]], dimensions: int = 0
    ) -> list[bytes]:
        """The vector of each input: its first `dimensions` numbers (0: all), float32 little-endian.

        Raises `Overloaded`, `NotReady`, `InvalidRequest` or `InstanceFailed`. Cancelling it aborts
        what was started."""

    @property
    def num_ready(self) -> int:
        """Instances that answer requests now."""

    @property
    def asleep(self) -> bool:
        """Whether somebody put the model to sleep."""

    @property
    def facts(self) -> ModelFacts:
        """Of the served model. Raises `NotReady` before the first instance was ready."""
