"""The step loop's body: schedule → forward → sample → emit.

Owns the sequences' life on this instance. Invariants: every request ends with exactly one finish
reason unless it is aborted; whatever is raised over one sequence ends that one, and only a broken
invariant of our own leaves `step`; a token depends on its own sequence alone. Does not know
sockets, text, blocks or where the weights are.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from workers.engine.device import Fault, no_fault, require_device
from workers.engine.drafts import propose
from workers.engine.isolation import in_sound_groups
from workers.engine.room import KVRoom
from workers.engine.scheduler import Chunk, GenerationSequence, Scheduler
from workers.errors import (
    GrammarFailed,
    InvalidLogits,
    NoTokenLeft,
    for_the_wire,
    unexpected,
)
from workers.kv.cache import KVCache
from workers.kv.layout import KVLayout
from workers.messages import (
    Embedded,
    FinishReason,
    Generate,
    Output,
    Problem,
    StepOutput,
    TokenLogprobs,
)
from workers.model.batch import Batch, Part
from workers.model.decoder import Model
from workers.sampling import (
    GrammarCompiler,
    Sampled,
    SequenceSampler,
    invalid_params,
    prompt_logprobs,
    sample,
)

logger = logging.getLogger(__name__)

_LOGITS_BYTES: Final = 64 << 20
"""What the logits of one prompt may take at a time, where a request asks for them."""
_SHARE_EVERY_S: Final = 0.1
"""How often to ask whether other instances lack room."""
_GRAMMAR_WAIT_S: Final = 0.005
_GRAMMAR_WAIT_SHARE: Final = 0.25
_MOST_GRAMMAR_WAIT_S: Final = 0.05
"""How long a step waits for what grammars allow, at least, as a share of the time that the last
one took, and at most; who has it later sits out until then."""
_DRAFT_WAIT_S: Final = 0.001
"""How long a further token of a draft waits for it."""
_HELD_WAIT_S: Final = 0.02
"""How long a step waits where there is nothing else to do."""
NO_ROOM_PATIENCE_S: Final = 15.0
"""How long a sequence lacks KV memory that nobody else holds here, before it ends."""


@dataclass(slots=True)
class _Request:
    """What the engine keeps of a sequence beside its place in the schedule."""

    sampler: SequenceSampler
    added_at: float
    expires_at: float | None
    num_cached: int | None = None
    """Tokens of the prompt that were found, until somebody was told."""
    num_told: int = 1
    """Tokens of the prompt, from the first on, whose log probabilities need not be told any more.
    """
    num_reached: int = 0
    """The most of its tokens that were ever computed at once."""
    stalled_since: float | None = None
    """When there was no room for it, nobody else ran, and it has not come further since."""


class Engine:
    """Generates for many sequences at once. One thread calls it."""

    def __init__(
        self,
        model: Model,
        max_model_len: int,
        max_num_seqs: int = 32,
        token_budget: int = 256,
        kv: KVCache | None = None,
        num_speculative_tokens: int = 0,
        tokenizer: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        attention_span: int | None = None,
        device_fault: Fault = no_fault,
        works_on: Callable[[Sequence[str]], None] = lambda _names: None,
    ) -> None:
        """`max_model_len` bounds prompt and generated tokens together, `max_num_seqs` the sequences
        that run at once, `token_budget` the prompt tokens of a step. `kv` None keeps keys and
        values in memory of this process, without a limit. `num_speculative_tokens` is the longest
        guess at a sequence's next tokens. `tokenizer` is the tokenizer.json for requests with a
        grammar. `attention_span` is that of the scheduler. `device_fault` is asked after a failed
        pass, `works_on` told in each step whom it is about, before anything is computed. Raises
        `ValueError` beyond the model's reach."""
        limit = model.geometry.max_model_len
        if not 2 <= max_model_len <= limit:
            raise ValueError(f"max_model_len is {max_model_len}; this model takes 2 to {limit}")
        self._model = model
        self._max_model_len = max_model_len
        self._num_speculative_tokens = num_speculative_tokens
        self._eos_token_ids = frozenset(model.geometry.eos_token_ids)
        vocab_size = model.geometry.vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size, self._eos_token_ids)
        self._scheduler = Scheduler(max_num_seqs, token_budget, attention_span)
        layout = model.geometry.kv_layout
        self._room = KVRoom(kv or _unlimited(layout, max_model_len, max_num_seqs, model.device))
        self._requests: dict[str, _Request] = {}
        self._answered: list[Output] = []  # without a step: refused, or finished as they came
        self._clock = clock
        self._device_fault = device_fault
        self._works_on = works_on
        self._idle_since: float | None = None  # the first of the last steps that did nothing
        self._share_again_at = 0.0
        self._drafted_tokens = self._accepted_tokens = 0
        self._last_step_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self.num_running or self.num_waiting or self._answered)

    @property
    def is_stalled(self) -> bool:
        """Whether the last step could do nothing: all wait, and there is no room for any. Another
        step makes sense after a while."""
        return self._idle_since is not None and self.num_waiting > 0 and not self._answered

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
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def add(self, request: Generate) -> None:
        """Take a request. It never raises: what can't be served is answered by the next `step`."""
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

    def _begin(self, request: Generate) -> None:
        grammar = self._grammars.grammar(request.sampling)
        num_prompt = len(request.token_ids) - request.num_generated
        sampler = SequenceSampler(
            request.sampling,
            request.token_ids[:num_prompt],
            request.token_ids[num_prompt:],
            self._model.geometry.vocab_size,
            self._eos_token_ids,
            grammar,
        )
        wants_prompt = request.sampling.prompt_logprobs is not None
        sequence = GenerationSequence(
            request_id=request.request_id,
            token_ids=list(request.token_ids),
            sampling=request.sampling,
            num_generated=request.num_generated,
            priority=request.priority,
            cache_salt=request.cache_salt,
            may_skip=not wants_prompt,
            since_ms=int(time.monotonic() * 1000),
            most_per_step=self._most_logits if wants_prompt else None,
        )
        reason = self._finish_reason(sequence, sampler) if sequence.num_generated else None
        if reason is not None:
            sampler.leave()
            self._answered.append(
                Output(request_id=request.request_id, token_ids=(), finish_reason=reason)
            )
            return
        now = self._clock()
        expires_at = None if request.deadline_s is None else now + request.deadline_s
        self._scheduler.add(sequence)
        self._requests[request.request_id] = _Request(sampler, now, expires_at)

    def refuse(self, request_id: str, problem: str) -> None:
        """Let the next `step` answer a request that can't be taken."""
        self._answered.append(_error(request_id, problem, invalid=False))

    def close(self) -> None:
        """End the processes that grammars have. Nothing may be asked afterwards."""
        self._grammars.close()

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory now. Unknown ids are ignored."""
        sequence = self._scheduler.get(request_id)
        if sequence is not None:
            self._forget(sequence)
        self._answered = [one for one in self._answered if one.request_id != request_id]

    def step(self) -> tuple[Output, ...]:
        """Compute one batch. Returns what is new: the tokens of each sequence that gained some, and
        the end of those that ended. Raises nothing that a request can cause, but DeviceLost."""
        outputs, self._answered = self._answered, []
        now = self._clock()
        outputs += self._expired(now)
        outputs += self._hold()
        self._share(now)
        outputs += self._draft()
        chunks = self._scheduler.schedule(self._room)
        for sequence, error in self._room.take_failures():
            chunks = tuple(chunk for chunk in chunks if chunk.sequence is not sequence)
            outputs.append(self._broken(sequence, error))
        if chunks:
            self._idle_since = None
            self._works_on([chunk.sequence.request_id for chunk in chunks])
            self._come_on(chunks)
            begun_at = time.monotonic()
            outputs += self._compute(chunks)
            self._last_step_s = time.monotonic() - begun_at
        elif self._scheduler.num_running or self._scheduler.next_waiting is None:
            self._idle_since = None
            self._grammars.receive(_HELD_WAIT_S, late_too=True)
        else:
            self._idle_since = now if self._idle_since is None else self._idle_since
            outputs += self._out_of_room(now, self._idle_since)
        if not self._scheduler.num_running:
            self._room.kv.trim()
        return tuple(outputs)

    def check(self) -> None:
        """Raise `AssertionError` unless caches and sequences match. For tests and idle moments."""
        self._scheduler.check()
        self._room.check()
        names = {sequence.request_id for sequence in self._scheduler}
        if names != self._requests.keys():
            raise AssertionError(f"requests {self._requests.keys()} for sequences {names}")
        held = {sequence for sequence, _ in self._room}
        if held != set(self._scheduler.running):
            raise AssertionError("the sequences that hold memory are not those that run")

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

    def _hold(self) -> list[Output]:
        """Let those sit out whose grammar has not come as far as they have, and end those whose
        grammar can't go on."""
        followed = [
            (sequence, grammar)
            for sequence in self._scheduler
            if (grammar := self._requests[sequence.request_id].sampler.grammar) is not None
        ]
        if not followed:
            return []
        wait_s = max(_GRAMMAR_WAIT_S, _GRAMMAR_WAIT_SHARE * self._last_step_s)
        self._grammars.receive(min(wait_s, _MOST_GRAMMAR_WAIT_S))
        outputs = []
        for sequence, grammar in followed:
            sequence.is_held = not grammar.arrived
            if grammar.problem is not None:
                problem = f"the grammar can't be used: {grammar.problem}"
                outputs.append(self._fail(sequence, problem, invalid=grammar.is_invalid))
        return outputs

    def _has_arrived(self, sequence: GenerationSequence) -> bool:
        """Whether a further token of a draft can be chosen now."""
        grammar = self._requests[sequence.request_id].sampler.grammar
        if grammar is None:
            return True
        self._grammars.receive(_DRAFT_WAIT_S)
        return grammar.arrived

    def _share(self, now: float) -> None:
        """Give up room that other instances lack, those that came last first."""
        if now < self._share_again_at or not self._scheduler.num_running:
            return
        self._share_again_at = now + _SHARE_EVERY_S
        surplus, older_since_ms = self._room.kv.surplus()
        while surplus > 0 and self._scheduler.num_running > 1:
            surplus -= self._give_way()
        running = self._scheduler.running
        if older_since_ms and running and running[-1].since_ms > older_since_ms:
            self._give_way()  # one at a time, since it is asked again soon: that may be enough

    def _give_way(self) -> int:
        """Let the last sequence wait. Returns how many blocks it had."""
        last = self._scheduler.running[-1]
        num_blocks = len(self._room[last].table.blocks)
        self._scheduler.preempt(last, self._room)
        self._room.kv.trim()  # or it would begin again with the same blocks
        return num_blocks

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
                failed.append(self._broken(sequence, error))
        return failed

    def _come_on(self, chunks: Sequence[Chunk]) -> None:
        """Note who is computed further than ever before: who gives way and begins again for ever
        is not."""
        for chunk in chunks:
            request = self._requests[chunk.sequence.request_id]
            if chunk.stop > request.num_reached:
                request.num_reached = chunk.stop
                request.stalled_since = None

    def _out_of_room(self, now: float, idle_since: float) -> list[Output]:
        """Nothing runs, and there is no room for the first of those that wait: for a while it waits
        for other instances to give some back. Those behind it wait as long, not one after another.
        """
        first = self._scheduler.next_waiting
        if first is None:
            return []
        request = self._requests[first.request_id]
        if self._room.kv.is_taken:  # it is its turn as soon as older ones elsewhere have ended
            request.stalled_since = None
            return []
        if request.stalled_since is None:
            request.stalled_since = max(idle_since, request.added_at)
        if now - request.stalled_since < NO_ROOM_PATIENCE_S:
            return []
        problem = f"there is no room for its keys and values: {self._room.kv.problem}"
        return [self._fail(first, problem, kind="no_room")]

    @property
    def _most_logits(self) -> int:
        """Tokens of a prompt whose logits may be there at once."""
        return max(1, _LOGITS_BYTES // (4 * self._model.geometry.vocab_size))

    def _expired(self, now: float) -> list[Output]:
        late = [
            sequence
            for sequence in self._scheduler
            if (expires_at := self._requests[sequence.request_id].expires_at) is not None
            and now >= expires_at
        ]
        problem = "the request's deadline has passed"
        return [self._fail(sequence, problem, kind="deadline") for sequence in late]

    # --- one step

    def _compute(self, chunks: Sequence[Chunk]) -> list[Output]:
        computed, logits, outputs = self._forward(chunks)
        sampling: list[tuple[Chunk, int]] = []
        row = 0
        for chunk, part in computed:
            rows = logits[row : row + part.num_logits]
            row += part.num_logits
            self._note_computed(chunk)
            try:
                outputs += self._tell_of_prompt(chunk, rows)
            except Exception as error:  # noqa: BLE001 - as above
                outputs.append(self._broken(chunk.sequence, error))
            if chunk.samples and chunk.sequence.request_id in self._requests:
                sampling.append((chunk, row - 1 - len(chunk.draft)))
        outputs += self._sample(sampling, logits)
        return outputs

    def _forward(
        self, chunks: Sequence[Chunk]
    ) -> tuple[list[tuple[Chunk, Part]], torch.Tensor, list[Output]]:
        """The chunks that could be computed, the logits of all their parts, one after the other,
        and the ends of the sequences that could not."""
        parts = [(chunk, self._part(chunk)) for chunk in chunks]
        computed: list[tuple[Chunk, Part]] = []
        logits: list[torch.Tensor] = []
        failed: list[Output] = []
        for group, found in in_sound_groups(parts, self._pass):
            if isinstance(found, Exception):
                [(chunk, _)] = group
                logger.error("the forward pass of one sequence failed", exc_info=found)
                problem = f"the forward pass failed: {found}"
                failed.append(self._fail(chunk.sequence, problem, keep=False))
            else:
                computed += group
                logits.append(found)
        if len(logits) == 1:
            return computed, logits[0], failed
        nothing = torch.empty(0, self._model.geometry.vocab_size)
        return computed, torch.cat(logits) if logits else nothing, failed

    def _pass(self, parts: Sequence[tuple[Chunk, Part]]) -> torch.Tensor:
        try:
            return self._model.forward(Batch.of([part for _, part in parts])).cpu()
        except Exception as error:  # the architectures are not our code
            require_device(self._device_fault, error)
            raise

    def _part(self, chunk: Chunk) -> Part:
        sequence = chunk.sequence
        tokens = [*sequence.token_ids[chunk.start : chunk.stop], *chunk.draft]
        num_logits = 1 + len(chunk.draft) if chunk.samples else 0
        if sequence.sampling.prompt_logprobs is not None and chunk.start < sequence.num_prompt:
            num_logits = len(tokens)
        self._drafted_tokens += len(chunk.draft)
        return Part(self._room[sequence].table, tokens, num_logits)

    def _note_computed(self, chunk: Chunk) -> None:
        """The chunk's own tokens are there."""
        sequence = chunk.sequence
        if chunk.draft:
            self._room[sequence].table.rewind(chunk.stop)
        request = self._requests[sequence.request_id]
        if request.num_cached is None:
            request.num_cached = min(chunk.start, sequence.num_prompt)
        self._scheduler.computed(chunk)

    def _tell_of_prompt(self, chunk: Chunk, rows: torch.Tensor) -> list[Output]:
        """What is to be told of the prompt, now that the chunk's tokens are there."""
        sequence = chunk.sequence
        request = self._requests[sequence.request_id]
        if chunk.samples and not self._settle(chunk, rows[-1]):
            return []
        count = sequence.sampling.prompt_logprobs
        begin = max(chunk.start + 1, request.num_told)  # more than once where it gave way
        end = min(chunk.stop + 1, sequence.num_prompt)
        if count is None or begin >= end:
            return []
        own = rows[begin - chunk.start - 1 : end - chunk.start - 1]
        try:
            found = prompt_logprobs(own, sequence.token_ids[begin:end], count)
        except InvalidLogits as error:
            return [self._fail(sequence, str(error), keep=False)]
        request.num_told = end
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

    def _sample(self, sampling: Sequence[tuple[Chunk, int]], logits: torch.Tensor) -> list[Output]:
        """Add a token to each sequence, and further ones where its draft was right. Each comes with
        the row of `logits` that its first token follows from."""
        emitted: dict[str, list[Sampled]] = {}
        outputs: list[Output] = []
        running = set(self._scheduler.running)
        going_on = [(chunk, row) for chunk, row in sampling if chunk.sequence in running]
        position = 0
        while going_on:
            rows = [row + position for _, row in going_on]
            further = []
            for (chunk, row), token in zip(
                going_on, self._choose(going_on, rows, logits), strict=True
            ):
                own = emitted.setdefault(chunk.sequence.request_id, [])
                try:
                    reason, goes_on = self._take(chunk, token, own, position)
                    if goes_on:
                        further.append((chunk, row))
                    else:
                        outputs += self._emit(chunk.sequence, own, reason)
                except InvalidLogits as error:
                    outputs += self._emit(chunk.sequence, own, None)
                    invalid = isinstance(error, NoTokenLeft)
                    failed = self._fail(chunk.sequence, str(error), keep=False, invalid=invalid)
                    outputs.append(failed)
                except Exception as error:  # noqa: BLE001 - as above
                    outputs.append(self._broken(chunk.sequence, error))
            going_on = further
            position += 1
        return outputs

    def _choose(
        self, going_on: Sequence[tuple[Chunk, int]], rows: Sequence[int], logits: torch.Tensor
    ) -> list[Sampled | Exception]:
        """The token that follows from each of `rows`, or why there is none."""
        samplers = [self._requests[chunk.sequence.request_id].sampler for chunk, _ in going_on]

        def together(some: Sequence[int]) -> list[Sampled | InvalidLogits]:
            wanted = [rows[index] for index in some]
            own = logits if wanted == list(range(len(logits))) else logits[wanted]
            return sample(own, [samplers[index] for index in some])

        chosen: list[Sampled | Exception] = []
        for _, found in in_sound_groups(range(len(rows)), together):
            chosen += [found] if isinstance(found, Exception) else found
        return chosen

    def _take(
        self, chunk: Chunk, token: Sampled | Exception, taken: list[Sampled], position: int
    ) -> tuple[FinishReason | None, bool]:
        """Add one more to the tokens that a sequence has `taken` in this step. Returns why it has
        ended, if it has, and whether the draft was right, so that another follows. Raises what
        there is in the token's place."""
        if isinstance(token, Exception):
            raise token
        reason = self._accept(chunk.sequence, token.token)
        taken.append(token)
        right = position < len(chunk.draft) and token.token == chunk.draft[position]
        if reason is not None or not right or not self._has_arrived(chunk.sequence):
            return reason, False
        self._accepted_tokens += 1
        chunk.sequence.num_computed += 1
        self._room[chunk.sequence].table.commit(1)
        return None, True

    def _accept(self, sequence: GenerationSequence, token: int) -> FinishReason | None:
        sampler = self._requests[sequence.request_id].sampler
        sampler.accept(token)
        sequence.token_ids.append(token)
        sequence.num_generated += 1
        return self._finish_reason(sequence, sampler)

    def _emit(
        self, sequence: GenerationSequence, tokens: list[Sampled], reason: FinishReason | None
    ) -> list[Output]:
        if not tokens:
            return []
        request = self._requests[sequence.request_id]
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sequence.sampling.logprobs is not None:
            logprobs = tuple(one.logprobs for one in tokens if one.logprobs is not None)
        output = Output(
            request_id=sequence.request_id,
            token_ids=tuple(one.token for one in tokens),
            finish_reason=reason,
            logprobs=logprobs,
            num_cached=request.num_cached or 0,
        )
        request.num_cached = 0
        if reason is not None:
            self._forget(sequence)
        return [output]

    def _finish_reason(
        self, sequence: GenerationSequence, sampler: SequenceSampler
    ) -> FinishReason | None:
        """Whether the last generated token was the last one."""
        sampling = sequence.sampling
        token = sequence.token_ids[-1]
        if token in sampling.stop_token_ids and sequence.num_generated > sampling.min_tokens:
            return "stop"
        if token in self._eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if sampler.finished:
            return "stop"
        if sequence.num_generated >= sampling.max_tokens:
            return "length"
        if len(sequence.token_ids) >= self._max_model_len:
            return "length"
        return None

    # --- ends

    def _refuse(self, request: Generate, problem: str, *, invalid: bool = False) -> None:
        self._answered.append(_error(request.request_id, problem, invalid=invalid))

    def _fail(
        self,
        sequence: GenerationSequence,
        problem: str,
        *,
        keep: bool = True,
        invalid: bool = False,
        kind: Problem = "",
    ) -> Output:
        self._forget(sequence, keep=keep)
        return _error(sequence.request_id, problem, invalid=invalid, kind=kind)

    def _broken(self, sequence: GenerationSequence, error: Exception) -> Output:
        """End a sequence over which something was raised that nobody expects. What it computed is
        not kept: nobody knows how far it was right."""
        logger.error("request %s ends by an error", sequence.request_id, exc_info=error)
        return self._fail(sequence, unexpected(error), keep=False)

    def _forget(self, sequence: GenerationSequence, *, keep: bool = True) -> None:
        self._scheduler.remove(sequence.request_id)
        self._room.end(sequence, keep=keep)
        self._requests.pop(sequence.request_id).sampler.leave()


def _unlimited(
    layout: KVLayout, max_model_len: int, max_num_seqs: int, device: torch.device
) -> KVCache:
    num_bytes = max_num_seqs * layout.num_blocks(max_model_len) * layout.block_bytes
    return KVCache(layout, device=device, private_limit_bytes=num_bytes)


def _error(request_id: str, problem: str, *, invalid: bool, kind: Problem = "") -> Output:
    return Output(
        request_id=request_id,
        token_ids=(),
        finish_reason="error",
        invalid=invalid,
        problem=kind,
        error=for_the_wire(problem),
    )
