"""Which instances hang, by what the kernel and their pulse say of them.

Owns how long each thing may take. Invariant: an instance is looked at, never asked, so that a look
costs no more than reading a file. What is done about one that hangs is the fleet's.
"""

import math
import time
from dataclasses import dataclass
from typing import Final

from allocator import ProcessState
from server.fleet.forks import WAITING_AT_START_S
from server.fleet.instance import Instance
from server.processes.vital_signs import LOOK_EVERY_S, VitalSigns

LONGEST_END_S: Final = 2.0
"""What an instance without requests may take to end."""
_WAITING_S: Final = 10.0
"""How long an instance that has something to do may wait for something, using no processor."""
_LONGEST_STEP_S: Final = 300.0
"""What computes for longer is given up, however busy it is."""


@dataclass(frozen=True)
class Hang:
    """How it shows, and whether what the instance computes may be the reason."""

    how: str
    by_itself: bool


def overdue(instance: Instance, *, has_requests: bool) -> Hang | None:
    """Of one that was to end when its requests had, and did not. Counts the looks."""
    is_idle = instance.state == "draining" and not has_requests
    instance.num_idle_looks = instance.num_idle_looks + 1 if is_idle else 0
    stopped = is_idle and instance.signs.is_stopped
    if stopped or instance.num_idle_looks * LOOK_EVERY_S > LONGEST_END_S:
        return Hang("it was to end, and did not", by_itself=False)
    return None


def hang_of(instance: Instance, pid: int, hang_timeout_s: float) -> Hang | None:
    """Looks at the process, and keeps in the instance since when it has shown no sign of life."""
    now, signs, beat = time.monotonic(), instance.signs, instance.leash.look()
    starts = instance.state in ("starting", "loading")
    since = beat.since if beat is not None else None
    num_read = beat.num_read if beat is not None else 0
    owes = starts or since is not None or num_read < instance.num_sent
    signs.look(now, ProcessState.of(pid), owes=owes)
    instance.unresponsive_since = signs.quiet_since
    for rank, rank_pid in enumerate(instance.rank_pids, 1):
        # What waits for the first rank may wait: that it does not come on shows in the first.
        of_rank = instance.rank_signs.setdefault(rank_pid, VitalSigns())
        of_rank.look(now, ProcessState.of(rank_pid), owes=False)
        instance.unresponsive_since = instance.unresponsive_since or of_rank.quiet_since
        if of_rank.is_hung(hang_timeout_s, math.inf):
            return Hang(f"its rank {rank} (pid {rank_pid}) hangs: {of_rank}", by_itself=False)
    if signs.is_hung(hang_timeout_s, WAITING_AT_START_S if starts else _WAITING_S):
        return Hang(f"it hangs: {signs}", by_itself=not signs.is_stopped)
    if since is not None and now - since > _LONGEST_STEP_S:
        return Hang(f"its step has taken more than {_LONGEST_STEP_S:.0f} s", by_itself=True)
    return None
