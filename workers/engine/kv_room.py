"""Joins the scheduler's sequences with the blocks of their keys and values.

Invariants: a cache lives exactly as long as its sequence runs; what is raised over one sequence's
blocks is that one's failure.
"""

import logging
from collections.abc import Iterable, Sequence

from workers.engine.sequence import GenerationSequence
from workers.kv.cache import KVCache, SequenceCache

logger = logging.getLogger(__name__)


class KVRoom:
    """See `workers.engine.scheduler.Room`."""

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self._failures: dict[GenerationSequence, Exception] = {}

    def admit(self, sequence: GenerationSequence) -> None:
        """Begin with what is known of its tokens."""
        known = sequence.token_ids if sequence.may_skip else ()
        try:
            sequence.cache = self.kv.open(known, sequence.cache_salt)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this sequence's
            self._failures.setdefault(sequence, error)
            sequence.cache = self.kv.open(())

    def grow(self, sequence: GenerationSequence, num_tokens: int) -> bool:
        """Blocks for so many tokens of it in all; False where there is no room."""
        try:
            return self.kv.grow(sequence.held, num_tokens, sequence.since_ms)
        except Exception as error:  # noqa: BLE001 - as above
            self._failures.setdefault(sequence, error)
            return False

    def take_failures(self) -> list[tuple[GenerationSequence, Exception]]:
        """The sequences over which something was raised since this was asked last: to be ended."""
        failures, self._failures = self._failures, {}
        return list(failures.items())

    def give_up(self, sequence: GenerationSequence) -> None:
        """Its blocks are free; what it has computed can be found again while nobody needs the
        room."""
        self._close(sequence, sequence.held, sequence.token_ids)

    def seal(self, sequence: GenerationSequence) -> bool:
        """See `KVCache.seal`."""
        return self.kv.seal(sequence.held, sequence.token_ids)

    def end(self, sequence: GenerationSequence, *, keep: bool = True) -> None:
        """It has ended, or never begun. `keep` what it has computed for others to find."""
        if sequence.cache is not None:
            self._close(sequence, sequence.cache, sequence.token_ids if keep else None)

    def _close(
        self, sequence: GenerationSequence, cache: SequenceCache, token_ids: Sequence[int] | None
    ) -> None:
        sequence.cache = None
        if token_ids is not None:
            try:
                self.kv.seal(cache, token_ids)
            except Exception:
                logger.exception("what a sequence computed can't be kept for others")
        self.kv.close(cache)

    def check(self, running: Iterable[GenerationSequence]) -> None:
        """Raise `AssertionError` unless the caches are those of the sequences that run."""
        self.kv.check()
        held = {id(sequence.cache) for sequence in running}
        if held != self.kv.open_caches():
            raise AssertionError("there are caches that no sequence has, or the other way round")
