"""Whether a process still does anything: told by what the kernel counts, not by a clock alone.

Owns the judgement of one process. Invariant: what uses a processor, or would if it got one, is
slow, never hung; time during which nobody looked does not count. Pure: who looks, and what follows,
is not known here.
"""

from typing import Final

from allocator import ProcessState

LOOK_EVERY_S: Final = 0.5
_LONGEST_GAP_S: Final = 2 * LOOK_EVERY_S
"""What may count between two looks: on a machine that stood still, the process did, too."""
_DOUBT_STOPPED_S: Final = LOOK_EVERY_S
_DOUBT_WAITING_S: Final = 2.0


class VitalSigns:
    """Of one process, from the first look on."""

    def __init__(self) -> None:
        self._last_at = 0.0
        self._last: ProcessState | None = None
        self._quiet_since: float | None = None
        self._quiet_s = 0.0
        self.is_stopped = False
        """Whether somebody had stopped it at the last look."""

    def look(self, at: float, state: ProcessState | None, *, owes: bool) -> None:
        """`at` a time, it was in this `state`. `owes`: somebody waits for something that it has not
        done; a process that owes nothing may do nothing."""
        if state is None or state.has_ended:  # its end is told elsewhere
            self._quiet_since, self._quiet_s = None, 0.0
            self._last, self.is_stopped = None, False
            return
        moved = self._last is None or state.counts != self._last.counts or state.letter == "R"
        if moved or not (owes or state.is_stopped):
            self._quiet_since, self._quiet_s = None, 0.0
        else:
            self._quiet_s += min(at - self._last_at, _LONGEST_GAP_S)
            if self._quiet_since is None:
                self._quiet_since = self._last_at
        self._last_at, self._last, self.is_stopped = at, state, state.is_stopped

    @property
    def quiet_since(self) -> float | None:
        """Since when it has done nothing, though it is stopped or owes something; None where it
        does something, or has not been quiet for long enough to say so."""
        doubt_s = _DOUBT_STOPPED_S if self.is_stopped else _DOUBT_WAITING_S
        return self._quiet_since if self._quiet_s >= doubt_s else None

    def is_hung(self, stopped_s: float, waiting_s: float) -> bool:
        """Whether it has been quiet for longer than may be: `stopped_s` where somebody stopped it,
        `waiting_s` where it waits for something that does not come."""
        return self._quiet_s >= (stopped_s if self.is_stopped else waiting_s)

    def __str__(self) -> str:
        """What is the matter with it."""
        if self.is_stopped:
            return "stopped by a signal"
        return "waiting, without using a processor"
