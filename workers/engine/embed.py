"""The step loop's body for models that embed: choose → forward → pool → emit.

Owns the requests' life on this instance. Invariants: every request is answered exactly once unless
it is aborted; whatever is raised over one text ends the request that it is of, and no other; a
vector does not depend on what else is in the batch, rounding aside. Does not know sockets, text or
where the weights are.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch

from workers.engine.device import Fault, no_fault, require_device
from workers.engine.embed_batching import choose, fill
from workers.engine.isolation import in_sound_groups
from workers.engine.protocol import OTHER_TASK
from workers.errors import InvalidEmbedding, for_the_wire, unexpected
from workers.messages import MAX_FRAME_BYTES, Embed, Embedded, Generate, Output, StepOutput
from workers.model.encoder import EmbeddingModel

logger = logging.getLogger(__name__)

_WINDOW: Final = 1024
"""So many of the oldest texts are considered for a batch: what a step costs stays bounded."""


@dataclass(slots=True)
class _Request:
    """An `Embed` on its way. `vectors` has one entry for each input: nothing, until computed."""

    message: Embed
    vectors: list[bytes]
    pending: list[int]
    """Indices of the inputs that have no vector yet."""
    expires_at: float


class EmbeddingEngine:
    """Embeds the texts of many requests together. One thread calls it."""

    is_stalled: Final = False
    """A text waits for nothing but its turn."""

    def __init__(
        self,
        model: EmbeddingModel,
        max_model_len: int,
        max_num_batched_tokens: int = 512,
        *,
        threads_now: Callable[[], int] | None = None,
        max_answer_bytes: int = MAX_FRAME_BYTES // 4,
        clock: Callable[[], float] = time.monotonic,
        device_fault: Fault = no_fault,
        works_on: Callable[[Sequence[str]], None] = lambda _names: None,
    ) -> None:
        """`max_model_len` bounds a text, `max_num_batched_tokens` the tokens of a step; a longer
        text is computed alone. `threads_now` says how many threads a step may use,
        `max_answer_bytes` how much it may give at once (one request's vectors in any case), `clock`
        gives seconds; `device_fault` is asked after a failed pass, `works_on` told in each step
        whom it is about. Raises `ValueError` beyond the model's reach."""
        limit = model.max_model_len
        if not 1 <= max_model_len <= limit:
            raise ValueError(f"max_model_len is {max_model_len}; this model takes 1 to {limit}")
        if max_num_batched_tokens < 1:
            raise ValueError("max_num_batched_tokens must be at least 1")
        self._model = model
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._threads_now = threads_now
        self._max_answer_bytes = max_answer_bytes
        self._clock = clock
        self._device_fault = device_fault
        self._works_on = works_on
        self._requests: dict[str, _Request] = {}  # in the order in which they came
        self._answered: list[Embedded] = []  # refused without a step, or too much for the last

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._requests or self._answered)

    @property
    def num_running(self) -> int:
        """Requests of which some texts are computed."""
        return len(self._requests) - self.num_waiting

    @property
    def num_waiting(self) -> int:
        """Requests of which none is."""
        return sum(len(one.pending) == len(one.vectors) for one in self._requests.values())

    def add(self, request: Generate | Embed) -> None:
        """Take a request. It never raises: what can't be served is answered by the next `step`."""
        if isinstance(request, Generate):
            self.refuse(request.request_id, OTHER_TASK)
            return
        if request.request_id in self._requests:
            # Two answers under one name can't be told apart, so neither may come.
            self.abort(request.request_id)
            self._answered.append(_refusal(request, "this request id is in use already"))
            return
        try:
            problem = self._problem(request)
        except Exception as error:
            logger.exception("request %s can't begin", request.request_id)
            failed = Embedded(request_id=request.request_id, error=unexpected(error))
            self._answered.append(failed)
            return
        if problem is not None:
            self._answered.append(_refusal(request, problem))
            return
        count = len(request.inputs)
        expires_at = math.inf if request.deadline_s is None else self._clock() + request.deadline_s
        self._requests[request.request_id] = _Request(
            request, [b""] * count, list(range(count)), expires_at
        )

    def refuse(self, request_id: str, problem: str) -> None:
        """Let the next `step` answer a request that can't be taken."""
        self._answered.append(Embedded(request_id=request_id, error=for_the_wire(problem)))

    def abort(self, request_id: str) -> None:
        """Forget a request and all its vectors now. Unknown ids are ignored."""
        self._requests.pop(request_id, None)
        self._answered = [one for one in self._answered if one.request_id != request_id]

    def check(self) -> None:
        """Raise `AssertionError` where a request waits for nothing. For tests and idle moments."""
        for request in self._requests.values():
            if not request.pending:
                raise AssertionError(f"{request.message.request_id!r} has all, and no answer")

    def close(self) -> None:
        """Nothing was started."""

    def step(self) -> tuple[Embedded, ...]:
        """Compute one batch. Returns the requests that are complete, or can't be. Raises nothing
        that a request can cause, but InstanceLost."""
        answers, self._answered = self._answered, []
        self._expire(answers)
        waiting = list(islice(self._waiting(), _WINDOW))
        lengths = [len(request.message.inputs[index]) for request, index in waiting]
        chosen = (choose if self._model.pads else fill)(lengths, self._max_num_batched_tokens)
        batch = [waiting[position] for position in chosen]
        if not batch:
            return self._some_of(answers)
        self._works_on(sorted({request.message.request_id for request, _ in batch}))
        if self._threads_now is not None:
            torch.set_num_threads(self._threads_now())
        for group, vectors in in_sound_groups(batch, self._pass):
            if isinstance(vectors, Exception):
                [(request, _)] = group
                logger.error("the forward pass of one text failed", exc_info=vectors)
                self._fail(request, f"the forward pass failed: {vectors}", answers)
                continue
            for (request, index), vector in zip(group, vectors, strict=True):
                try:
                    request.vectors[index] = self._model.finish(vector, request.message.dimensions)
                except InvalidEmbedding as error:
                    self._fail(request, str(error), answers)
                except Exception as error:
                    logger.exception("request %s ends by an error", request.message.request_id)
                    self._fail(request, unexpected(error), answers)
        for request in {id(one): one for one, _ in batch}.values():
            self._settle(request, answers)
        return self._some_of(answers)

    def _pass(self, texts: Sequence[tuple[_Request, int]]) -> torch.Tensor:
        try:
            return self._model.forward([one.message.inputs[index] for one, index in texts])
        except Exception as error:
            require_device(self._device_fault, error)
            raise

    def _some_of(self, answers: list[Embedded]) -> tuple[Embedded, ...]:
        """As many as one message can hold; the next step gives the others."""
        num_bytes = count = 0
        for answer in answers:
            num_bytes += len(answer.vectors)
            if count and num_bytes > self._max_answer_bytes:
                break
            count += 1
        self._answered = answers[count:]
        return tuple(answers[:count])

    def _settle(self, request: _Request, answers: list[Embedded]) -> None:
        """After a step with some of its texts."""
        request.pending = [index for index in request.pending if not request.vectors[index]]
        request_id = request.message.request_id
        if not request.pending and self._requests.pop(request_id, None) is not None:
            answers.append(Embedded(request_id=request_id, vectors=b"".join(request.vectors)))

    def _fail(self, request: _Request, problem: str, answers: list[Embedded]) -> None:
        """End a request; nothing if it has ended, by another of its texts."""
        request_id = request.message.request_id
        if self._requests.pop(request_id, None) is not None:
            answers.append(Embedded(request_id=request_id, error=for_the_wire(problem)))

    def report(self, outputs: tuple[Output | Embedded, ...]) -> StepOutput:
        """What a step gave, and the load after it. Keys and values are not kept between steps."""
        return StepOutput(
            outputs=outputs,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_bytes=0,
        )

    def _expire(self, answers: list[Embedded]) -> None:
        now = self._clock()
        for request in [one for one in self._requests.values() if one.expires_at <= now]:
            self._fail(request, "the request's deadline has passed", answers)

    def _waiting(self) -> Iterator[tuple[_Request, int]]:
        """All texts without a vector, the oldest request's first."""
        for request in self._requests.values():
            for index in request.pending:
                yield request, index

    def _problem(self, request: Embed) -> str | None:
        """Why a request can't be served, if so."""
        longest = max(len(one) for one in request.inputs)
        if longest > self._max_model_len:
            return f"a text has {longest} tokens; at most {self._max_model_len} are taken"
        largest = max(max(one) for one in request.inputs)
        if largest >= self._model.vocab_size:
            return (
                f"token id {largest} is outside the model's vocabulary of {self._model.vocab_size}"
            )
        if request.dimensions > self._model.embedding_size:
            return (
                f"dimensions is {request.dimensions}; this model's vectors have "
                f"{self._model.embedding_size} numbers"
            )
        return None


def _refusal(request: Embed, problem: str) -> Embedded:
    return Embedded(request_id=request.request_id, invalid=True, error=for_the_wire(problem))
