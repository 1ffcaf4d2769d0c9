"""The processes of the other ranks of an instance: forked, held on a leash, waited for.

Owns them. Invariants: they are forked while this process has no thread, no ZeroMQ context and no
session; each ends when this process does, however that ends and whatever the rank does or can't do
then; none is left behind by `close`. Does not know what they compute.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from workers.kv.common import CommonMemory
from workers.process import linux
from workers.process.rank_link import Link

log = logging.getLogger("onecopy.instance")

_END_S: Final = 1.0
"""What a rank may take to end by itself, before the kernel ends it."""
_FIXED: Final = (signal.SIGKILL, signal.SIGSTOP)

Work = Callable[[int, Link, CommonMemory], int]
"""What a rank does: (rank, link to the first, memory in common) → its exit status."""


class RankProcesses:
    """Of one instance, but for the first rank, which is this process."""

    def __init__(self, name: str, num_ranks: int, inherited: Sequence[int], work: Work) -> None:
        """Fork them. `inherited` are descriptors that they have no use for. Raises OSError."""
        self.num_ranks: Final = num_ranks
        self.memory: Final = CommonMemory()
        self.links: Final[list[Link]] = []
        """To each of them, in the order of their ranks."""
        self.pids: Final[list[int]] = []
        self._pipes: list[int] = []
        self._statuses: dict[int, int | None] = {}
        """Of those that have ended; None where this process ended them."""
        for rank in range(1, num_ranks):
            # The lower descriptor: where this process ends, ranks do before its session.
            pipe_read, pipe_write = os.pipe()
            own, other = Link.pair(rank, num_ranks)
            self._pipes.append(pipe_write)
            self.links.append(own)
            pid = os.fork()
            if pid == 0:
                self._become_rank(name, rank, pipe_read, other, inherited, work)
            os.close(pipe_read)
            other.close()
            self.pids.append(pid)

    def status(self, rank: int | None, timeout_s: float = _END_S) -> int | None:
        """How that rank ended by itself, as an exit status or minus a signal's number, if it does
        so by then; None where it did not, or is none of these."""
        if rank is None or not 1 <= rank < self.num_ranks:
            return None
        self._wait([self.pids[rank - 1]], timeout_s)
        return self._statuses.get(self.pids[rank - 1])

    def close(self) -> None:
        """End them: by themselves, where they still react. Idempotent."""
        for link in self.links:
            link.close()
        self._wait(self.pids, _END_S)
        ended_here = [pid for pid in self.pids if pid not in self._statuses]
        while self._pipes:
            os.close(self._pipes.pop())
        self._wait(self.pids, None)
        self._statuses.update(dict.fromkeys(ended_here))

    def _wait(self, pids: Sequence[int], timeout_s: float | None) -> None:
        """Until all of them have ended, or the time is over."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for pid in pids:
            if pid in self._statuses:
                continue
            pidfd = os.pidfd_open(pid)  # a child that nobody waited for is there
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([pidfd], [], [], left)[0]:
                    continue
            finally:
                os.close(pidfd)
            _, wait_status = os.waitpid(pid, 0)
            self._statuses[pid] = os.waitstatus_to_exitcode(wait_status)

    def _become_rank(
        self, name: str, rank: int, pipe: int, link: Link, inherited: Sequence[int], work: Work
    ) -> None:
        """In the child. Never returns."""
        status = 1
        try:
            linux.die_with(pipe)
            # Who keeps another's pipe open keeps it alive.
            for descriptor in (*self._pipes, *inherited):
                os.close(descriptor)
            for other in self.links:
                other.close()
            # A stop of all processes at once is a drain: ranks end when the first one lets them.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            linux.set_process_name(f"onecopy:{name}.{rank}")
            status = work(rank, link, self.memory)
        except BaseException:
            log.exception("rank %d of an instance ended by an error of ours", rank)
        finally:
            logging.shutdown()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)


def end_as(status: int | None) -> None:
    """End this process by the signal, if any, that another ended by: so the server judges an
    instance by what became of its ranks. Returns where there was none."""
    if status is None or status >= 0:
        return
    if -status not in _FIXED:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
