"""One request on its way between the HTTP side and an instance, whatever it asks for.

Owns what differs between requests: what an instance is told, and what becomes of its answers; and
what is known of the request itself, so that one which ends instances can be told from its
neighbours. Invariant: after `take` returned true, or `fail`, the one who waits has been told the
end. Does not know how instances are chosen.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

from server.errors import (
    DeadlineExceeded,
    InstanceFailed,
    InvalidRequest,
    Overloaded,
    ServerError,
)
from server.fleet.instance import Instance
from server.generation import NO_OPTIONS, Chunk, RequestOptions
from workers.messages import (
    Embed,
    Embedded,
    Generate,
    Output,
    SamplingParams,
    ToInstance,
    TokenLogprobs,
)

_LEAST_S: Final = 1e-3
_MAX_BLAMED: Final = 2
"""What was computed on so many instances that ended by themselves may be what ends them."""
_RETRY_AFTER_S: Final = 2


class Aborter(Protocol):
    """The router, as a request knows it."""

    async def abort(self, request: "Request") -> None:
        """Forget a request; its instance frees its memory."""


class Request(ABC):
    """What the router places on an instance, and moves to another when that one ends."""

    def __init__(self, router: Aborter, request_id: str, epoch: int) -> None:
        self._router = router
        self.request_id = request_id
        self.epoch = epoch
        """Which state of the model it is for; see `ModelState`."""
        self.instance: Instance | None = None
        self.num_moves = 0
        self.num_blamed = 0
        """Instances that ended by themselves while they computed it."""
        self.num_waits = 0
        """How often it had no instance, and had to wait for one."""
        self.ended = False
        self.timer: asyncio.TimerHandle | None = None
        """Of its deadline."""

    @property
    def is_suspect(self) -> bool:
        """Whether it must have an instance for itself."""
        return self.num_blamed >= _MAX_BLAMED

    @property
    def seconds_left(self) -> float | None:
        """Until its deadline, if it has one; never 0."""
        return None

    @abstractmethod
    def message(self) -> ToInstance:
        """What an instance must be told to go on from here."""

    @abstractmethod
    def take(self, output: Output | Embedded) -> bool:
        """An instance's answer. True if it is the last."""

    @abstractmethod
    def fail(self, error: ServerError) -> None:
        """There will be no further answer."""

    async def aclose(self) -> None:
        """Abort the request if it has not ended. Idempotent."""
        await self._router.abort(self)


class Stream(Request):
    """One sequence's tokens. See `server.generation.TokenStream`."""

    def __init__(
        self,
        router: Aborter,
        request_id: str,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
        epoch: int = 0,
    ) -> None:
        super().__init__(router, request_id, epoch)
        self._options = options
        self._begun_at = time.monotonic()
        self._chunks: asyncio.Queue[Chunk | ServerError] = asyncio.Queue()
        self.prompt = prompt
        self.sampling = sampling
        self.generated: list[int] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._is_first = True
        """No chunk has been passed on."""

    def message(self) -> ToInstance:
        """The prompt, and what was generated elsewhere."""
        self._prompt_logprobs = []  # whoever computes the prompt anew tells them all again
        return Generate(
            request_id=self.request_id,
            token_ids=(*self.prompt, *self.generated),
            sampling=self.sampling,
            num_generated=len(self.generated),
            priority=self._options.priority,
            deadline_s=self.seconds_left,
            cache_salt=self._options.cache_salt,
        )

    @property
    def seconds_left(self) -> float | None:
        """As in the base."""
        if self._options.deadline_s is None:
            return None
        left_s = self._begun_at + self._options.deadline_s - time.monotonic()
        return max(left_s, _LEAST_S)

    def take(self, output: Output | Embedded) -> bool:
        """New tokens."""
        if isinstance(output, Embedded):
            self.fail(InstanceFailed("the instance answered with a vector"))
            return True
        self.generated += output.token_ids
        if output.finish_reason == "error":
            self.fail(_failure(output))
            return True
        if self._is_first:
            self._prompt_logprobs += output.prompt_logprobs
        if not output.token_ids and output.finish_reason is None:
            return False
        # A prompt that was computed in part, and then anew, is told in part before.
        of_prompt = self._prompt_logprobs[-(len(self.prompt) - 1) :] if self._is_first else []
        self._chunks.put_nowait(
            Chunk(
                output.token_ids,
                output.finish_reason,
                output.logprobs,
                tuple(of_prompt),
                output.num_cached if self._is_first else 0,
            )
        )
        self._is_first = False
        return output.finish_reason is not None

    def fail(self, error: ServerError) -> None:
        """Raised where the tokens are read."""
        self._chunks.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while True:
            chunk = await self._chunks.get()
            if isinstance(chunk, ServerError):
                raise chunk
            yield chunk
            if chunk.finish_reason is not None:
                return


def _failure(output: Output) -> ServerError:
    """What a client is told of an instance's error."""
    message = output.error or "the instance could not go on"
    if output.invalid:
        return InvalidRequest(message)
    if output.problem == "deadline":
        return DeadlineExceeded(message)
    if output.problem == "no_room":
        return Overloaded(message, retry_after_s=_RETRY_AFTER_S)
    return InstanceFailed(message)


class Embedding(Request):
    """The vectors of some texts, which come all at once."""

    def __init__(
        self,
        router: Aborter,
        request_id: str,
        inputs: Sequence[Sequence[int]],
        dimensions: int,
        epoch: int = 0,
    ) -> None:
        super().__init__(router, request_id, epoch)
        self._inputs = tuple(map(tuple, inputs))
        self._dimensions = dimensions
        self._vectors: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def message(self) -> ToInstance:
        """All of it: nothing that an instance computed is kept if it ends."""
        return Embed(request_id=self.request_id, inputs=self._inputs, dimensions=self._dimensions)

    def take(self, output: Output | Embedded) -> bool:
        """The vectors, or why there are none."""
        if not isinstance(output, Embedded):
            self.fail(InstanceFailed("the instance answered with tokens"))
        elif output.error:
            failed = InvalidRequest if output.invalid else InstanceFailed
            self.fail(failed(output.error))
        elif not self._vectors.done():
            self._vectors.set_result(output.vectors)
        return True

    def fail(self, error: ServerError) -> None:
        """Raised where the vectors are waited for."""
        if not self._vectors.done():
            self._vectors.set_exception(error)
            self._vectors.exception()  # whoever waited may have gone, which is no error

    async def vectors(self) -> list[bytes]:
        """Of each input, float32, little-endian. Raises what the request failed with."""
        together = await self._vectors
        size = len(together) // len(self._inputs)
        return [together[start : start + size] for start in range(0, len(together), size)]
