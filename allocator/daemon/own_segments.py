"""Which names in /dev/shm are this daemon's, and what becomes of those of daemons that are gone.

Owns the runs that this daemon answers for: its own, and those whose segments it has adopted. Their
locks show everybody else that they are not abandoned. Invariant: of others only that is removed of
which it is proven that nobody uses it (`backends.runs`), and whose directory is not here, where its
own next daemon would look for it.
"""

import itertools
import logging
import secrets
from collections.abc import Collection, Iterator

from allocator.backends.room import size
from allocator.backends.runs import (
    RunLock,
    RunOwner,
    abandoned_runs,
    new_run,
    remove_abandoned,
    run_of,
    runs_of,
)
from allocator.backends.segments import OWNER, remove
from allocator.errors import DeviceError
from allocator.runtime_dir import RuntimeDir

log = logging.getLogger("onecopy.allocator")


class OwnSegments:
    """Of one daemon."""

    def __init__(self, runtime_dir: RuntimeDir) -> None:
        """Raises DeviceError."""
        self._prefix = runtime_dir.segment_prefix
        self._owner = RunOwner.of(runtime_dir.path)
        run = new_run(self._prefix)
        self._locks = [RunLock.take(run, self._owner)]
        # A client may hold a handle of the daemon before us: no name may come again. And nobody
        # must know the next one before it is made.
        self.names: Iterator[str] = (
            f"{run}-{number}-{secrets.token_hex(3)}" for number in itertools.count(1)
        )

    def claim(self, segments: Collection[str]) -> None:
        """Answer for these of earlier daemons, too, before it is looked whether they are there:
        from now on nobody clears them up."""
        for run in sorted({run_of(segment) for segment in segments} - {""}):
            try:
                self._locks.append(RunLock.take(run, self._owner))
            except DeviceError as error:  # another user's file
                log.warning("%s", error)

    def settle(self, kept: Collection[str]) -> None:
        """Of earlier daemons of this directory only these segments are left, and the rest has been
        removed: so their runs end as well."""
        runs = {run_of(segment) for segment in kept} | {self._locks[0].run}
        for lock in [lock for lock in self._locks if lock.run not in runs]:
            self._locks.remove(lock)
            lock.release()
        for run in runs_of(self._prefix):
            if run not in runs:
                remove(f"{run}-{OWNER}")

    def remove_abandoned(self) -> Iterator[str]:
        """Clear up after daemons whose directories are gone; what was removed, for people."""
        for run in abandoned_runs(but=self._prefix):
            owner = run.owner
            if not run.may_be_removed or owner is None or owner.is_here:
                continue
            removed = remove_abandoned(run.run)
            if removed is not None:
                yield (
                    f"{len(removed.segments)} segments, {size(removed.num_bytes)}, of an allocator "
                    f"of {owner.directory}, which is gone"
                )

    def leave(self) -> None:
        """What was claimed stays, for the next daemon to claim; of our own run there is nothing."""
        own, *claimed = self._locks
        own.release()
        for lock in claimed:
            lock.leave()
        self._locks.clear()

    def close(self) -> None:
        """Nothing of ours is left."""
        for lock in self._locks:
            lock.release()
        self._locks.clear()
