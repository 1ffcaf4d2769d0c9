"""Writers of weight sets that somebody has stopped, while others wait for what they write.

Owns since when each has been so. Invariant: only who is seen stopped at every look for so long, and
waited for at each of them, is given up.
"""

from typing import Final

from allocator.daemon.clients.sessions import Session
from allocator.processes.process_state import ProcessState

PATIENCE_S: Final = 10.0


class HungWriters:
    """Of one daemon."""

    def __init__(self) -> None:
        self._stopped_since: dict[int, float] = {}  # by the session's number

    def give_up(self, writer: Session, now: float) -> bool:
        """Somebody waits for this writer. Whether it has been stopped for too long: its session is
        to be ended then, as if its process had, and the next who waits is elected."""
        state = ProcessState.of(writer.process.pid)
        if state is None or not state.is_stopped:
            self._stopped_since.pop(writer.number, None)
            return False
        since = self._stopped_since.setdefault(writer.number, now)
        return now - since >= PATIENCE_S

    def forget(self, writer: Session) -> None:
        """Its session has ended."""
        self._stopped_since.pop(writer.number, None)
