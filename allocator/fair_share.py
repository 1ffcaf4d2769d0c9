"""How much of the pool each session may hold while one of them lacks room.

Whoever asks first may hold everything, as long as nobody else wants it. Once a session is refused
room within its fair share, an equal part for everybody who holds or wants some, the others are told
to give back what they hold beyond theirs, and get no more until it has its room or stops asking.

Pure: numbers and a clock of the caller's. Knows nothing of extents.
"""

from collections.abc import Mapping
from typing import Final

from allocator.weight_set import SessionId

PATIENCE_S: Final = 1.0
"""A session that was refused and has not asked again for so long wants nothing any more."""


class FairShare:
    """Of one pool."""

    def __init__(self) -> None:
        self._refused: dict[SessionId, float] = {}

    def bytes_for(
        self, session: SessionId, total_bytes: int, held: Mapping[SessionId, int], now: float
    ) -> int:
        """An equal part of `total_bytes`. `held` counts the bytes of every session that has any."""
        claimants = {session, *self._lacking(now)}
        claimants.update(one for one, num_bytes in held.items() if num_bytes)
        return total_bytes // len(claimants)

    def is_wanted(self, session: SessionId, now: float) -> bool:
        """Whether another session than this one lacks room."""
        return any(one != session for one in self._lacking(now))

    def refused(self, session: SessionId, now: float) -> None:
        """It was refused what it is entitled to."""
        self._refused[session] = now

    def served(self, session: SessionId) -> None:
        """It has what it asked for."""
        self._refused.pop(session, None)

    def _lacking(self, now: float) -> list[SessionId]:
        late = [one for one, at in self._refused.items() if now - at > PATIENCE_S]
        for one in late:
            del self._refused[one]
        return list(self._refused)
