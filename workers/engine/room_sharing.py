"""Who gives up room to whom: sequences here to other instances, and to nobody after long enough.

Owns the patience of sequences that lack room. Invariant: of those that run, the last in order gives
way first.
"""

from collections.abc import Sequence
from typing import Final

from workers.engine.ends import Ends
from workers.engine.kv_room import KVRoom
from workers.engine.scheduler import Chunk, Scheduler
from workers.messages import Output

_SHARE_EVERY_S: Final = 0.1
"""How often to ask whether other instances lack room."""
NO_ROOM_PATIENCE_S: Final = 15.0
"""How long a sequence lacks KV memory that nobody else holds here, before it ends."""


class RoomSharing:
    """Of one engine."""

    def __init__(self, scheduler: Scheduler, room: KVRoom, ends: Ends) -> None:
        self._scheduler = scheduler
        self._room = room
        self._ends = ends
        self._share_again_at = 0.0
        self._idle_since: float | None = None  # the first of the last steps that did nothing

    @property
    def is_idle(self) -> bool:
        """Whether the last step did nothing, for want of room."""
        return self._idle_since is not None

    def share(self, now: float) -> None:
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
        num_blocks = len(last.table.held)
        self._scheduler.preempt(last, self._room)
        self._room.kv.trim()  # or it would begin again with the same blocks
        return num_blocks

    def comes_on(self, chunks: Sequence[Chunk]) -> None:
        """A step computes these. Notes who is computed further than ever before: who gives way and
        begins again for ever is not."""
        self._idle_since = None
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.stop > sequence.num_reached:
                sequence.num_reached = chunk.stop
                sequence.stalled_since = None

    def waits_for_others(self) -> None:
        """A step computes nothing, but not for want of room."""
        self._idle_since = None

    def lacks_room(self, now: float) -> list[Output]:
        """Nothing runs, and there is no room for the first of those that wait: for a while it waits
        for other instances to give some back. Those behind it wait as long, not one after another.
        """
        if self._idle_since is None:
            self._idle_since = now
        first = self._scheduler.next_waiting
        if first is None:
            return []
        if self._room.kv.is_taken:  # it is its turn as soon as older ones elsewhere have ended
            first.stalled_since = None
            return []
        if first.stalled_since is None:
            first.stalled_since = max(self._idle_since, first.added_at)
        if now - first.stalled_since < NO_ROOM_PATIENCE_S:
            return []
        problem = f"there is no room for its keys and values: {self._room.kv.problem}"
        return [self._ends.fail(first, problem, kind="no_room")]
