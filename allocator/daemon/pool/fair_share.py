"""How much of the pool each session may hold while one of them lacks room.

Whoever asks first may hold everything, as long as nobody else wants it. Once a session is refused
room within its fair share, an equal part for everybody who holds or wants some, the others are told
to give back what they hold beyond theirs, and get no more until it has its room or stops asking.

Equal parts can be too small for a single task each. A session that has only one (a sequence that
it computes) can't give way within itself, and two of those would wait for each other for ever. So
such tasks go by age: while the oldest of those that were refused lacks room, everybody else gets
nothing, and gives up what younger tasks hold. There is always an oldest one, and it comes to its
end.

Pure: numbers and a clock of the caller's. Knows nothing of extents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from allocator.books import SessionId

PATIENCE_S: Final = 1.0
"""A session that was refused and has not asked again for so long wants nothing any more."""
STILL_S: Final = 10.0
"""One that holds room and has asked nothing for so long is not at work: who waits for it waits in
vain."""


@dataclass(frozen=True)
class Lone:
    """The one task of a session that lacks room for it."""

    since_ms: int
    session: SessionId


class FairShare:
    """Of one pool."""

    def __init__(self) -> None:
        self._refused: dict[SessionId, float] = {}
        self._lone: dict[SessionId, tuple[Lone, float]] = {}
        self._heard: dict[SessionId, float] = {}

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
        self._lone.pop(session, None)

    # --- tasks that are alone in their session

    def refused_alone(self, session: SessionId, since_ms: int, now: float) -> None:
        """Its only task, which began then, lacks room."""
        self._lone[session] = Lone(since_ms, session), now

    def older_than(self, session: SessionId, since_ms: int, now: float) -> Lone | None:
        """The oldest such task of another session, unless this session's own, which began then, is
        older. 0: it has several, or does not say."""
        for one in [one for one, (_, at) in self._lone.items() if now - at > PATIENCE_S]:
            del self._lone[one]
        others = [lone for one, (lone, _) in self._lone.items() if one != session]
        oldest = min(others, key=lambda one: (one.since_ms, one.session), default=None)
        if oldest is None:
            return None
        own = (since_ms, session)
        return None if since_ms and own < (oldest.since_ms, oldest.session) else oldest

    # --- who is at work

    def heard(self, session: SessionId, now: float) -> None:
        """It asked something about the pool."""
        self._heard[session] = now

    def others_come_on(self, session: SessionId, held: Mapping[SessionId, int], now: float) -> bool:
        """Whether another session that holds room is at work, so that it will have ended some
        time."""
        return any(
            num_bytes and one != session and now - self._heard.get(one, -STILL_S) < STILL_S
            for one, num_bytes in held.items()
        )

    def ended(self, session: SessionId) -> None:
        """It wants nothing any more."""
        self._refused.pop(session, None)
        self._lone.pop(session, None)
        self._heard.pop(session, None)

    def _lacking(self, now: float) -> list[SessionId]:
        late = [one for one, at in self._refused.items() if now - at > PATIENCE_S]
        for one in late:
            del self._refused[one]
        return list(self._refused)
