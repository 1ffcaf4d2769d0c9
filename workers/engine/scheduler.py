"""Which tokens of which sequences the next step computes.

Owns the order: who waits, who runs, how far each has come, who gives way. Invariants: a sequence is
in exactly one place, each of its tokens is computed once and in order since it last began, and of
equal priority the earlier goes first. Does not know tensors, blocks, time or what a token means:
whether there is room for tokens it asks `Room`.

          add              room among the running          finish, abort
    ──────────► waiting ─────────────────────────► running ─────────────► (forgotten)
          (priority, arrival)  ◄───────────────────┘  prefill in chunks, then a token a step
                                 preempted: no room
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from workers.engine.sequence import GenerationSequence

_RETRY_STEPS: Final = 8
"""Steps after which a sequence for which there was no room is tried again, if nobody left."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the tokens [start, stop) of `sequence` in this step, and `draft` behind them."""

    sequence: GenerationSequence
    start: int
    stop: int
    draft: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether a new token follows from it."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that it computes."""
        return self.stop - self.start + len(self.draft)


class Room(Protocol):
    """What the scheduler must know of memory."""

    def admit(self, sequence: GenerationSequence) -> None:
        """It begins, and has a cache from now on; its first tokens may be known already."""

    def grow(self, sequence: GenerationSequence, num_tokens: int) -> bool:
        """Hold room for so many tokens of it in all; False where there is none."""

    def give_up(self, sequence: GenerationSequence) -> None:
        """It gave way: its cache is gone, and its room free again."""


class Scheduler:
    """Continuous batching: a step decodes one token for every sequence that is past its prompt, and
    spends up to `max_num_batched_tokens` tokens on prompts. So a step is at most `max_num_seqs +
    max_num_batched_tokens` tokens long (and drafts), however long a prompt is.

    Of several prompts the first in order gets half the budget at least, the others what is left,
    the shortest first; and if those others are short, the first sits out every other step, so that
    theirs is a short one. So a short prompt does not wait for a long one, and a long one comes on
    however many short ones arrive. Where room for tokens ends, the last in order gives way: it
    waits at its old place, and is computed again when there is room.
    """

    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, attention_span: int | None = None
    ) -> None:
        """Behind `attention_span` other tokens a token costs twice as much as the first, so that a
        step takes as long at the end of a long prompt as at its beginning. None counts tokens."""
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._attention_span = attention_span
        self._waiting: list[GenerationSequence] = []  # in order
        self._running: list[GenerationSequence] = []  # in order
        self._by_id: dict[str, GenerationSequence] = {}
        self._num_arrived = 0
        self._served_last: GenerationSequence | None = None
        """The first of the prompts of the last step, unless it sat out."""
        self._num_until_retry = 0
        """Steps for which nobody is admitted, because there was no room."""
        self.num_preempted = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def next_waiting(self) -> GenerationSequence | None:
        """The first in order of those that wait for room."""
        return next((one for one in self._waiting if not one.is_held), None)

    @property
    def running(self) -> Sequence[GenerationSequence]:
        """Those that hold room, in order."""
        return tuple(self._running)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[GenerationSequence]:
        """All sequences, running and waiting, as they came."""
        return iter(self._by_id.values())

    def get(self, request_id: str) -> GenerationSequence | None:
        """The sequence of this name, if it is here."""
        return self._by_id.get(request_id)

    def add(self, sequence: GenerationSequence) -> None:
        """Let a sequence wait for its turn. Its request id must not be here already."""
        if sequence.request_id in self._by_id:
            raise ValueError(f"request {sequence.request_id!r} is here already")
        sequence.arrival = self._num_arrived
        bisect.insort(self._waiting, sequence, key=_order)
        self._num_arrived += 1
        self._by_id[sequence.request_id] = sequence

    def schedule(self, room: Room) -> tuple[Chunk, ...]:
        """The next step: all decodes, then prompts. Before the one after it, the tokens of a chunk
        must be in its sequence's cache, or the sequence removed. Nothing at all while sequences
        wait that are not held means that there is no room for any."""
        self._make_way(room)
        decodes, gave_way = self._decodes(room)
        chunks = (*decodes, *self._prefills(room, admitting=not gave_way))
        # Those that have begun are in each other's way.
        while not chunks and not all(one.is_held for one in self._running):
            self.preempt(self._running[-1], room)
            self._num_until_retry = 0
            chunks = tuple(self._prefills(room, admitting=False))
        return chunks

    def preempt(self, sequence: GenerationSequence, room: Room) -> None:
        """Let a running sequence give up its room and wait at its place in the order."""
        self._running.remove(sequence)
        room.give_up(sequence)
        sequence.begin_anew()
        bisect.insort(self._waiting, sequence, key=_order)
        self.num_preempted += 1

    def remove(self, request_id: str) -> GenerationSequence | None:
        """Forget a sequence, finished or aborted. None if it is not here."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return None
        if sequence in self._running:
            self._running.remove(sequence)
            self._num_until_retry = 0
        else:
            self._waiting.remove(sequence)
        return sequence

    def check(self) -> None:
        """Raise `AssertionError` unless every sequence is in exactly one place, in order, with
        something left to compute. For tests and idle moments."""
        _assert(len(self._running) <= self._max_num_seqs, "more run than may")
        for part in (self._running, self._waiting):
            _assert(sorted(part, key=_order) == part, "sequences are out of order")
        held = [id(one) for one in (*self._running, *self._waiting)]
        _assert(len(held) == len(set(held)), "a sequence is in two places")
        _assert({id(one) for one in self} == set(held), "a sequence is lost")
        holding = {id(one) for one in self if one.cache is not None}
        running = {id(one) for one in self._running}
        _assert(holding == running, "other sequences hold memory than run")
        for sequence in self:
            _assert(sequence.num_pending >= 1, "a sequence has nothing left to compute")
            _assert(
                not sequence.is_decoding or sequence.num_pending == 1,
                "a decoding sequence has fallen behind",
            )

    # --- steps

    def _decodes(self, room: Room) -> tuple[list[Chunk], bool]:
        """A chunk of each sequence that decodes and has room, and whether any gave way."""
        decoding: list[GenerationSequence] = []
        gave_way = False
        for sequence in tuple(self._running):
            # The last in order gives way first, so it may have done so by the time of its turn.
            if sequence.is_held or not sequence.is_decoding or sequence not in self._running:
                continue
            while not room.grow(sequence, len(sequence.token_ids)):
                victim = self._running[-1]
                self.preempt(victim, room)
                gave_way = True
                if victim is sequence:
                    break
            else:
                decoding.append(sequence)
        chunks: list[Chunk] = []
        for sequence in decoding:
            length = len(sequence.token_ids)
            # A trial is no reason for anybody to give way: what is left is enough, or it is off.
            if sequence.draft and not room.grow(sequence, length + len(sequence.draft)):
                sequence.draft = ()
            chunks.append(Chunk(sequence, length - 1, length, sequence.draft))
        return chunks, gave_way

    def _prefills(self, room: Room, *, admitting: bool) -> list[Chunk]:
        begun = [one for one in self._running if not one.is_decoding and not one.is_held]
        self._num_until_retry = max(0, self._num_until_retry - 1) if self._running else 0
        free_places = self._max_num_seqs - len(self._running)
        if not admitting or self._num_until_retry:
            free_places = 0
        chunks: list[Chunk] = []
        able = (one for one in self._waiting if not one.is_held)
        candidates = [*begun, *itertools.islice(able, free_places)]
        shares = self._shares(candidates)
        self._served_last = None
        for sequence, budget in shares:
            newcomer = sequence not in begun
            if newcomer and self._num_until_retry:
                continue
            if newcomer:
                room.admit(sequence)
            stop = sequence.num_computed + self._most(sequence, budget)
            if room.grow(sequence, stop):
                chunks.append(Chunk(sequence, sequence.num_computed, stop))
                if sequence is candidates[0]:
                    self._served_last = sequence
                if newcomer:
                    self._waiting.remove(sequence)
                    bisect.insort(self._running, sequence, key=_order)
            elif newcomer:
                room.give_up(sequence)
                self._num_until_retry = _RETRY_STEPS
        return chunks

    def _shares(
        self, candidates: Sequence[GenerationSequence]
    ) -> list[tuple[GenerationSequence, int]]:
        """The budget that each of these gets, in the order in which they may take room."""
        if not candidates:
            return []
        first, *others = candidates
        left = self._max_num_batched_tokens
        if not others:
            return [(first, left)]
        if self._served_last is first and sum(one.num_pending for one in others) <= left // 2:
            return [(one, left) for one in others]
        wanted = self._cost(first, self._most(first, left))
        reserved = min(wanted, left - left // 2)
        left -= reserved
        shares: dict[int, int] = {}
        for sequence in sorted(others, key=lambda one: (one.priority, one.num_pending)):
            shares[id(sequence)] = self._cost(sequence, self._most(sequence, left)) if left else 0
            left = max(0, left - shares[id(sequence)])
        shares[id(first)] = min(wanted, reserved + left)
        return [(one, shares[id(one)]) for one in candidates if shares[id(one)]]

    def _most(self, sequence: GenerationSequence, budget: int) -> int:
        """How many of its next tokens the budget pays for, one at least. A token counts for more
        the more there are before it: of n tokens behind p others all together for
        n + (n p + n^2 / 2) / attention_span."""
        most = min(budget, sequence.num_pending, sequence.most_per_step or budget)
        span = self._attention_span
        if span is not None and self._cost(sequence, most) > budget:
            linear = 1 + sequence.num_computed / span
            paid = span * (math.sqrt(linear * linear + 2 * budget / span) - linear)
            most = max(1, min(most, int(paid)))
        return most

    def _cost(self, sequence: GenerationSequence, num_tokens: int) -> int:
        """What its next `num_tokens` take of the budget."""
        if self._attention_span is None:
            return num_tokens
        pairs = num_tokens * (sequence.num_computed + num_tokens / 2)
        return int(num_tokens + pairs / self._attention_span)

    def _make_way(self, room: Room) -> None:
        """Let the last of those that run give way to one that is more urgent."""
        urgent = self.next_waiting
        if urgent is None or not self._running:
            return
        if urgent.priority >= self._running[-1].priority:
            return
        if len(self._running) == self._max_num_seqs or self._num_until_retry:
            self.preempt(self._running[-1], room)
            self._num_until_retry = 0


def _order(sequence: GenerationSequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


def _assert(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
