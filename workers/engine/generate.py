"""The step loop's body: schedule → forward → sample → emit.

Owns the sequences' life on this instance. Invariants: every request ends with exactly one finish
reason unless it is aborted; whatever is raised over one sequence ends that one, and only a broken
invariant of our own leaves `step`; a token depends on its own sequence alone. Does not know
sockets, text, blocks or where the weights are.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from workers.engine.device import Fault, no_fault
from workers.engine.drafts import propose
from workers.engine.ends import Ends, refusal
from workers.engine.forward import Forward
from workers.engine.grammar_wait import GrammarWait
from workers.engine.kv_room import KVRoom
from workers.engine.next_tokens import NextTokens
from workers.engine.protocol import OTHER_TASK
from workers.engine.room_sharing import RoomSharing
from workers.engine.scheduler import Chunk, Scheduler
from workers.engine.sequence import GenerationSequence
from workers.errors import GrammarFailed, InvalidLogits, unexpected
from workers.kv.cache import KVCache
from workers.kv.layout import KVLayout
from workers.messages import Embed, Embedded, FinishReason, Generate, Output, StepOutput
from workers.model.decoder import Model
from workers.sampling import (
    GrammarCompiler,
    SequenceSampler,
    Tokens,
    invalid_params,
    prompt_logprobs,
)

logger = logging.getLogger(__name__)

_LOGITS_BYTES: Final = 64 << 20
"""What the logits of one prompt may take at a time, where a request asks for them."""


class GenerationEngine:
    """Generates for many sequences at once. One thread calls it."""

    def __init__(
        self,
        model: Model,
        max_model_len: int,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 256,
        kv: KVCache | None = None,
        num_speculative_tokens: int = 0,
        tokenizer: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        attention_span: int | None = None,
        device_fault: Fault = no_fault,
        works_on: Callable[[Sequence[str]], None] = lambda _names: None,
    ) -> None:
        """`max_model_len` bounds prompt and generated tokens together, `max_num_seqs` the sequences
        that run at once, `max_num_batched_tokens` the prompt tokens of a step. `kv` None keeps keys
        and values in memory of this process, without a limit. `num_speculative_tokens` is the
        longest guess at a sequence's next tokens. `tokenizer` is the tokenizer.json for requests
        with a grammar. `attention_span` is that of the scheduler. `device_fault` is asked after a
        failed pass, `works_on` told in each step whom it is about, before anything is computed.
        Raises `ValueError` beyond the model's reach."""
        limit = model.geometry.max_model_len
        if not 2 <= max_model_len <= limit:
            raise ValueError(f"max_model_len is {max_model_len}; this model takes 2 to {limit}")
        self._model = model
        self._max_model_len = max_model_len
        self._num_speculative_tokens = num_speculative_tokens
        self._eos_token_ids = frozenset(model.geometry.eos_token_ids)
        self._scheduler = Scheduler(max_num_seqs, max_num_batched_tokens, attention_span)
        layout = model.geometry.kv_layout
        self._room = KVRoom(kv or _unlimited(layout, max_model_len, max_num_seqs, model.device))
        self._ends = Ends(self._scheduler, self._room)
        self._sharing = RoomSharing(self._scheduler, self._room, self._ends)
        vocab_size = model.geometry.vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size, self._eos_token_ids)
        self._grammar_wait = GrammarWait(self._grammars, self._ends)
        self._forward = Forward(model, device_fault)
        self._next_tokens = NextTokens(
            self._ends, self._finish_reason, self._grammar_wait.has_arrived
        )
        self._answered: list[Output] = []  # without a step: refused, or finished as they came
        self._clock = clock
        self._works_on = works_on
        self._last_step_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self.num_running or self.num_waiting or self._answered)

    @property
    def is_stalled(self) -> bool:
        """Whether the last step could do nothing: all wait, and there is no room for any. Another
        step makes sense after a while."""
        return self._sharing.is_idle and self.num_waiting > 0 and not self._answered

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def kv_bytes(self) -> int:
        """Memory that keys and values hold now."""
        return self._room.kv.num_bytes

    def report(self, outputs: tuple[Output | Embedded, ...]) -> StepOutput:
        """What a step gave, with the load after it."""
        cache = self._room.kv.statistics()
        return StepOutput(
            outputs=outputs,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_bytes=self.kv_bytes,
            num_preempted=self._scheduler.num_preempted,
            prompt_tokens=cache.prompt_tokens,
            cached_tokens=cache.hit_tokens,
            drafted_tokens=self._forward.num_drafted,
            accepted_tokens=self._next_tokens.num_accepted,
        )

    def add(self, request: Generate | Embed) -> None:
        """Take a request. It never raises: what can't be served is answered by the next `step`."""
        if isinstance(request, Embed):
            self.refuse(request.request_id, OTHER_TASK)
            return
        if request.request_id in self._scheduler:
            # Two streams under one name can't be told apart, so neither may go on.
            self.abort(request.request_id)
            self._refuse(request, "this request id is in use already")
            return
        problem = self._problem(request)
        if problem is not None:
            self._refuse(request, problem, invalid=True)
            return
        try:
            self._begin(request)
        except GrammarFailed as error:
            self._refuse(request, f"the grammar can't be used: {error}", invalid=True)
        except Exception as error:
            logger.exception("request %s can't begin", request.request_id)
            self._refuse(request, unexpected(error))

    def refuse(self, request_id: str, problem: str) -> None:
        """Let the next `step` answer a request that can't be taken."""
        self._answered.append(refusal(request_id, problem))

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory now. Unknown ids are ignored."""
        sequence = self._scheduler.get(request_id)
        if sequence is not None:
            self._ends.forget(sequence)
        self._answered = [one for one in self._answered if one.request_id != request_id]

    def close(self) -> None:
        """End the processes that grammars have. Nothing may be asked afterwards."""
        self._grammars.close()

    def step(self) -> tuple[Output, ...]:
        """Compute one batch. Returns what is new: the tokens of each sequence that gained some, and
        the end of those that ended. Raises nothing that a request can cause, but InstanceLost."""
        outputs, self._answered = self._answered, []
        now = self._clock()
        outputs += self._expired(now)
        outputs += self._grammar_wait.hold(self._scheduler, self._last_step_s)
        self._sharing.share(now)
        outputs += self._draft()
        chunks = self._scheduler.schedule(self._room)
        for sequence, error in self._room.take_failures():
            chunks = tuple(chunk for chunk in chunks if chunk.sequence is not sequence)
            outputs.append(self._ends.broken(sequence, error))
        if chunks:
            self._works_on([chunk.sequence.request_id for chunk in chunks])
            self._sharing.comes_on(chunks)
            begun_at = time.monotonic()
            outputs += self._compute(chunks)
            self._last_step_s = time.monotonic() - begun_at
        elif self._scheduler.num_running or self._scheduler.next_waiting is None:
            self._sharing.waits_for_others()
            self._grammar_wait.wait()
        else:
            outputs += self._sharing.lacks_room(now)
        if not self._scheduler.num_running:
            self._room.kv.trim()
        return tuple(outputs)

    def check(self) -> None:
        """Raise `AssertionError` unless caches and sequences match. For tests and idle moments."""
        self._scheduler.check()
        self._room.check(self._scheduler.running)

    # --- admission

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
        return invalid_params(request.sampling, vocab_size)

    def _begin(self, request: Generate) -> None:
        grammar = self._grammars.grammar(request.sampling)
        tokens = Tokens(list(request.token_ids), len(request.token_ids) - request.num_generated)
        vocab_size = self._model.geometry.vocab_size
        sampler = SequenceSampler(
            request.sampling, tokens, vocab_size, self._eos_token_ids, grammar
        )
        try:
            self._take(request, sampler)
        except BaseException:
            sampler.leave()
            raise

    def _take(self, request: Generate, sampler: SequenceSampler) -> None:
        wants_prompt = request.sampling.prompt_logprobs is not None
        now = self._clock()
        sequence = GenerationSequence(
            request_id=request.request_id,
            sampler=sampler,
            priority=request.priority,
            cache_salt=request.cache_salt,
            most_per_step=self._most_logits if wants_prompt else None,
            may_skip=not wants_prompt,
            since_ms=int(time.monotonic() * 1000),
            added_at=now,
            expires_at=None if request.deadline_s is None else now + request.deadline_s,
        )
        reason = self._finish_reason(sequence) if sequence.num_generated else None
        if reason is not None:
            sampler.leave()
            self._answered.append(
                Output(request_id=request.request_id, token_ids=(), finish_reason=reason)
            )
            return
        self._scheduler.add(sequence)

    def _refuse(self, request: Generate, problem: str, *, invalid: bool = False) -> None:
        self._answered.append(refusal(request.request_id, problem, invalid=invalid))

    # --- one step

    def _expired(self, now: float) -> list[Output]:
        late = [
            sequence
            for sequence in self._scheduler
            if sequence.expires_at is not None and now >= sequence.expires_at
        ]
        problem = "the request's deadline has passed"
        return [self._ends.fail(sequence, problem, kind="deadline") for sequence in late]

    def _draft(self) -> list[Output]:
        """Let every sequence that decodes guess what may follow. Returns the ends of those that
        can't."""
        failed: list[Output] = []
        for sequence in self._scheduler.running if self._num_speculative_tokens else ():
            if not sequence.is_decoding:
                continue
            try:
                left = min(
                    self._max_model_len - len(sequence.token_ids),
                    sequence.sampling.max_tokens - sequence.num_generated,
                )
                most = min(self._num_speculative_tokens, left - 1)
                sequence.draft = propose(sequence.token_ids, most) if most > 0 else ()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this sequence's
                failed.append(self._ends.broken(sequence, error))
        return failed

    def _compute(self, chunks: Sequence[Chunk]) -> list[Output]:
        forwarded = self._forward.run(chunks)
        outputs: list[Output] = []
        for chunk, error in forwarded.failed:
            logger.error("the forward pass of one sequence failed", exc_info=error)
            problem = f"the forward pass failed: {error}"
            outputs.append(self._ends.fail(chunk.sequence, problem, keep=False))
        followed = []
        for one in forwarded.computed:
            sequence = one.chunk.sequence
            if sequence.num_cached is None:
                sequence.num_cached = min(one.chunk.start, sequence.num_prompt)
            rows = forwarded.logits[one.first_row : one.first_row + one.num_rows]
            try:
                outputs += self._tell_of_prompt(one.chunk, rows)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this sequence's
                outputs.append(self._ends.broken(sequence, error))
            if one.chunk.samples and sequence.cache is not None:
                followed.append(one)
        outputs += self._next_tokens.follow(followed, forwarded.logits)
        return outputs

    def _tell_of_prompt(self, chunk: Chunk, rows: torch.Tensor) -> list[Output]:
        """What is to be told of the prompt, now that the chunk's tokens are there."""
        sequence = chunk.sequence
        if chunk.samples and not self._settle(chunk, rows[-1]):
            return []
        count = sequence.sampling.prompt_logprobs
        begin = max(chunk.start + 1, sequence.num_told)  # more than once where it gave way
        end = min(chunk.stop + 1, sequence.num_prompt)
        if count is None or begin >= end:
            return []
        own = rows[begin - chunk.start - 1 : end - chunk.start - 1]
        try:
            found = prompt_logprobs(own, sequence.token_ids[begin:end], count)
        except InvalidLogits as error:
            return [self._ends.fail(sequence, str(error), keep=False)]
        sequence.num_told = end
        return [Output(request_id=sequence.request_id, token_ids=(), prompt_logprobs=found)]

    def _settle(self, chunk: Chunk, row: torch.Tensor) -> bool:
        """A sequence has caught up: its prompt is for everybody to find, unless its logits show
        that something went wrong. False where its blocks were lost over that, and it begins anew.
        """
        sequence = chunk.sequence
        if chunk.stop != sequence.num_known or bool(row.isnan().any()):
            return True
        if self._room.seal(sequence):
            return True
        self._scheduler.preempt(sequence, self._room)
        return False

    def _finish_reason(self, sequence: GenerationSequence) -> FinishReason | None:
        return sequence.finish_reason(self._eos_token_ids, self._max_model_len)

    @property
    def _most_logits(self) -> int:
        """Tokens of a prompt whose logits may be there at once."""
        return max(1, _LOGITS_BYTES // (4 * self._model.geometry.vocab_size))


def _unlimited(
    layout: KVLayout, max_model_len: int, max_num_seqs: int, device: torch.device
) -> KVCache:
    num_bytes = max_num_seqs * layout.num_bytes(max_model_len)
    return KVCache(layout, device=device, private_limit_bytes=num_bytes)
