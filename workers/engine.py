"""The step loop's body: schedule → forward → sample → emit.

Owns the sequences' life on this instance and their caches. Invariants: every request ends with
exactly one finish reason unless it is aborted; a cache lives exactly as long as its running
sequence; what goes wrong with one sequence ends that one. Does not know sockets, text or where the
weights are.
"""

import logging
from collections.abc import Sequence

import torch

from workers.attention import Batch
from workers.errors import InvalidLogits, OutOfKVMemory, WorkerError
from workers.kv_cache import KVCache
from workers.messages import FinishReason, Generate, Output
from workers.model import Model
from workers.sampling import sample
from workers.scheduler import Chunk, GenerationSequence, Scheduler

logger = logging.getLogger(__name__)

_MAX_ERROR_LENGTH = 4096


class Engine:
    """Generates for many sequences at once. One thread calls it."""

    def __init__(
        self,
        model: Model,
        max_model_len: int,
        max_num_seqs: int = 32,
        token_budget: int = 512,
        max_kv_bytes: int | None = None,
    ) -> None:
        """`max_model_len` bounds prompt and generated tokens together, `max_num_seqs` the sequences
        that run at once, `token_budget` the prompt tokens of a step, `max_kv_bytes` the memory of
        all caches together (None: the machine's). Raises `ValueError` beyond the model's reach."""
        limit = model.geometry.max_model_len
        if not 2 <= max_model_len <= limit:
            raise ValueError(f"max_model_len is {max_model_len}; this model takes 2 to {limit}")
        self._model = model
        self._max_model_len = max_model_len
        self._max_kv_bytes = max_kv_bytes
        self._eos_token_ids = frozenset(model.geometry.eos_token_ids)
        self._scheduler = Scheduler(max_num_seqs, token_budget)
        self._caches: dict[str, KVCache] = {}
        self._answered: list[Output] = []  # without a step: refused, or finished as they came

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self.num_running or self.num_waiting or self._answered)

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def kv_bytes(self) -> int:
        """Memory that keys and values hold now."""
        return sum(cache.num_bytes for cache in self._caches.values())

    def add(self, request: Generate) -> None:
        """Take a request. It never raises: what can't be served is answered by the next `step`."""
        if request.request_id in self._scheduler:
            # Two streams under one name can't be told apart, so neither may go on.
            self.abort(request.request_id)
            self._refuse(request, "this request id is in use already")
            return
        problem = self._problem(request)
        if problem is not None:
            self._refuse(request, problem)
            return
        sequence = GenerationSequence(
            request_id=request.request_id,
            token_ids=list(request.token_ids),
            sampling=request.sampling,
            num_generated=request.num_generated,
            num_initial=len(request.token_ids),
        )
        reason = self._finish_reason(sequence) if sequence.num_generated else None
        if reason is None:
            self._scheduler.add(sequence)
        else:
            self._answered.append(
                Output(request_id=request.request_id, token_ids=(), finish_reason=reason)
            )

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory now. Unknown ids are ignored."""
        self._scheduler.remove(request_id)
        self._free(request_id)
        self._answered = [one for one in self._answered if one.request_id != request_id]

    def step(self) -> tuple[Output, ...]:
        """Compute one batch. Returns what is new: a token of each sequence that gained one, and the
        end of those that ended. Raises nothing that a request can cause."""
        outputs, self._answered = self._answered, []
        chunks = self._with_room(self._scheduler.schedule(), outputs)
        if not chunks:
            return tuple(outputs)
        batch = Batch.of(
            [
                (
                    self._caches[chunk.sequence.request_id],
                    chunk.sequence.token_ids[chunk.start : chunk.stop],
                    chunk.samples,
                )
                for chunk in chunks
            ],
            self._model.device,
        )
        try:
            logits = self._model.forward(batch)
        except (RuntimeError, MemoryError, WorkerError) as error:
            logger.exception("a forward pass over %d sequences failed", len(chunks))
            for chunk in chunks:
                outputs.append(self._fail(chunk.sequence, f"the forward pass failed: {error}"))
            return tuple(outputs)
        for chunk in chunks:
            self._scheduler.computed(chunk)
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        outputs.extend(self._sample(sequences, logits))
        return tuple(outputs)

    def check(self) -> None:
        """Raise `AssertionError` unless caches and sequences match. For tests and idle moments."""
        self._scheduler.check()
        computed = {one.request_id: one.num_computed for one in self._scheduler if one.num_computed}
        cached = {name: cache.num_tokens for name, cache in self._caches.items()}
        if computed != cached:
            raise AssertionError(f"sequences computed {computed}, caches hold {cached}")

    def _problem(self, request: Generate) -> str | None:
        """Why a request can't be served, if so."""
        num_tokens = len(request.token_ids)
        num_prompt = num_tokens - request.num_generated
        if num_prompt < 1:
            return "the prompt is empty"
        if num_prompt >= self._max_model_len or num_tokens > self._max_model_len:
            return (
                f"the prompt has {num_prompt} tokens; at most {self._max_model_len - 1} fit, "
                f"so that one can follow (max_model_len is {self._max_model_len})"
            )
        vocab_size = self._model.geometry.vocab_size
        largest = max(request.token_ids)
        if largest >= vocab_size:
            return f"token id {largest} is outside the model's vocabulary of {vocab_size}"
        return None

    def _with_room(self, chunks: Sequence[Chunk], outputs: list[Output]) -> list[Chunk]:
        """Those of the chunks whose keys and values have a place. The others' sequences end."""
        layout = self._model.geometry.kv_layout
        limit = self._max_kv_bytes
        roomy = []
        num_bytes = self.kv_bytes
        for chunk in chunks:
            held = layout.num_bytes(chunk.start)
            needed = layout.num_bytes(chunk.stop)
            if limit is not None and num_bytes - held + needed > limit:
                problem = (
                    f"the keys and values of {chunk.stop} tokens take {needed} bytes; the other "
                    f"sequences leave {limit - num_bytes + held} of {limit}"
                )
                outputs.append(self._fail(chunk.sequence, problem))
                num_bytes -= held
            elif self._opened(chunk.sequence, outputs):
                roomy.append(chunk)
                num_bytes += needed - held
        return roomy

    def _opened(self, sequence: GenerationSequence, outputs: list[Output]) -> bool:
        """Whether the sequence has a cache, made now if this is its first chunk."""
        if sequence.request_id not in self._caches:
            try:
                cache = KVCache(
                    self._model.geometry.kv_layout, self._max_model_len, self._model.device
                )
            except OutOfKVMemory as error:
                outputs.append(self._fail(sequence, str(error)))
                return False
            self._caches[sequence.request_id] = cache
        return True

    def _sample(self, sequences: list[GenerationSequence], logits: torch.Tensor) -> list[Output]:
        """Add one token to each sequence. Row i of `logits` is that of sequence i."""
        tokens = sample(
            logits.cpu(),
            [one.sampling for one in sequences],
            [one.num_generated for one in sequences],
        )
        outputs = []
        for sequence, token in zip(sequences, tokens, strict=True):
            if isinstance(token, InvalidLogits):
                outputs.append(self._fail(sequence, str(token)))
                continue
            sequence.token_ids.append(token)
            sequence.num_generated += 1
            reason = self._finish_reason(sequence)
            if reason is not None:
                self._forget(sequence)
            outputs.append(
                Output(request_id=sequence.request_id, token_ids=(token,), finish_reason=reason)
            )
        return outputs

    def _finish_reason(self, sequence: GenerationSequence) -> FinishReason | None:
        """Whether the last generated token was the last one."""
        sampling = sequence.sampling
        token = sequence.token_ids[-1]
        if token in sampling.stop_token_ids:
            return "stop"
        if token in self._eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if sequence.num_generated >= sampling.max_tokens:
            return "length"
        if len(sequence.token_ids) >= self._max_model_len:
            return "length"
        return None

    def _refuse(self, request: Generate, problem: str) -> None:
        self._answered.append(_error(request.request_id, problem))

    def _fail(self, sequence: GenerationSequence, problem: str) -> Output:
        self._forget(sequence)
        return _error(sequence.request_id, problem)

    def _forget(self, sequence: GenerationSequence) -> None:
        self._scheduler.remove(sequence.request_id)
        self._free(sequence.request_id)

    def _free(self, request_id: str) -> None:
        cache = self._caches.pop(request_id, None)
        if cache is not None:
            cache.close()


def _error(request_id: str, problem: str) -> Output:
    return Output(
        request_id=request_id,
        token_ids=(),
        finish_reason="error",
        error=problem[:_MAX_ERROR_LENGTH],
    )
