"""Which tokens of which sequences the next step computes.

Owns the order: who waits, who runs, how far each has come. Invariants: a sequence is in exactly one
place, each of its tokens is computed once and in order, and they are admitted first come, first
served. Does not know tensors, memory, time or what a token means.

          add              room among the running          finish, abort
    ──────────► waiting ─────────────────────────► running ─────────────► (forgotten)
                (FIFO)          prefill in chunks, then one token a step
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workers.messages import SamplingParams


@dataclass(slots=True, eq=False)
class GenerationSequence:
    """One request on its way: all its tokens, and how many of them have been computed.

    token_ids  |    prompt    | generated earlier | generated here |
               0     num_initial (as it came here) ^                ^ len(token_ids)
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    num_generated: int
    """Tokens at the end of `token_ids` that were generated, here or by an earlier instance."""
    num_initial: int
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next can be sampled. At least 1 while alive."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """All that it came with is computed: it now needs one token a step."""
        return self.num_computed >= self.num_initial


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the tokens [start, stop) of `sequence` in this step."""

    sequence: GenerationSequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether a new token follows from it."""
        return self.stop == len(self.sequence.token_ids)


class Scheduler:
    """Continuous batching: a step decodes one token for every sequence that is past its prompt, and
    spends up to `token_budget` tokens on prompts, the earliest admitted first. So a step is at most
    `max_num_seqs + token_budget` tokens long, however long a prompt is."""

    def __init__(self, max_num_seqs: int, token_budget: int) -> None:
        if max_num_seqs < 1 or token_budget < 1:
            raise ValueError("max_num_seqs and token_budget must be at least 1")
        self._max_num_seqs = max_num_seqs
        self._token_budget = token_budget
        self._waiting: deque[GenerationSequence] = deque()
        self._running: dict[str, GenerationSequence] = {}  # in the order of admission
        self._by_id: dict[str, GenerationSequence] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[GenerationSequence]:
        """All sequences, running and waiting, in the order in which they came."""
        return iter(self._by_id.values())

    def add(self, sequence: GenerationSequence) -> None:
        """Let a sequence wait for its turn. Its request id must not be here already."""
        if sequence.request_id in self._by_id:
            raise ValueError(f"request {sequence.request_id!r} is here already")
        self._by_id[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def schedule(self) -> tuple[Chunk, ...]:
        """The next step: all decodes, then prompts, of the running first and then of those that
        there is room to admit. Each chunk must be followed by `computed` or `remove`."""
        decodes = []
        prefills = []
        budget = self._token_budget
        for sequence in self._running.values():
            if sequence.is_decoding:
                decodes.append(_chunk(sequence, 1))
            elif budget > 0:
                prefills.append(_chunk(sequence, budget))
                budget -= prefills[-1].stop - prefills[-1].start
        while budget > 0 and self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting.popleft()
            self._running[sequence.request_id] = sequence
            prefills.append(_chunk(sequence, budget))
            budget -= prefills[-1].stop - prefills[-1].start
        return (*decodes, *prefills)

    def computed(self, chunk: Chunk) -> None:
        """The chunk's tokens are in the sequence's cache."""
        sequence = chunk.sequence
        if sequence.num_computed != chunk.start:
            raise ValueError(
                f"request {sequence.request_id!r} has {sequence.num_computed} tokens computed, "
                f"the chunk starts at {chunk.start}"
            )
        sequence.num_computed = chunk.stop

    def remove(self, request_id: str) -> GenerationSequence | None:
        """Forget a sequence, finished or aborted. None if it is not here."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is not None and self._running.pop(request_id, None) is None:
            self._waiting.remove(sequence)
        return sequence

    def check(self) -> None:
        """Raise `AssertionError` unless every sequence is in exactly one place, in order, with
        something left to compute. For tests and idle moments."""
        waiting = [sequence.request_id for sequence in self._waiting]
        running = list(self._running)
        order = list(self._by_id)
        _assert(len(running) <= self._max_num_seqs, "more run than may")
        _assert(running + waiting == order, "a sequence is lost, in two places or out of order")
        for sequence in self._waiting:
            _assert(sequence.num_computed == 0, "a waiting sequence holds memory")
        for sequence in self:
            _assert(sequence.num_pending >= 1, "a sequence has nothing left to compute")
            _assert(
                not sequence.is_decoding or sequence.num_pending == 1,
                "a decoding sequence has fallen behind",
            )


def total_tokens(chunks: Sequence[Chunk]) -> int:
    """How many tokens a step computes."""
    return sum(chunk.stop - chunk.start for chunk in chunks)


def _chunk(sequence: GenerationSequence, most: int) -> Chunk:
    start = sequence.num_computed
    return Chunk(sequence, start, start + min(most, sequence.num_pending))


def _assert(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
