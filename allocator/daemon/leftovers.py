"""What a daemon leaves behind that could not end in order, removed by whoever had to kill it.

Owns the list of it. Invariant: nothing is removed while a daemon of that role runs. Knows nothing
of who was killed, or why.
"""

from pathlib import Path
from typing import Final, Literal

from allocator.backends import open_device
from allocator.backends.runs import runs_of
from allocator.backends.segments import OWNER, remove
from allocator.errors import AlreadyRunning
from allocator.runtime_dir import RuntimeDir

Role = Literal["allocator", "server"]
_ZEROMQ: Final = "ipc://"


def remove_leftovers(runtime_dir: RuntimeDir, role: Role) -> list[str]:
    """Names of what was removed: sockets and locks; of an allocator also its journal, and the
    segments, which nobody can adopt then. Processes that map a segment keep it. Nothing where
    another daemon of that role has begun."""
    try:
        lock = runtime_dir.lock(role)
    except AlreadyRunning:
        return []
    try:
        removed: list[str] = []
        if role == "allocator":
            prefix = runtime_dir.segment_prefix
            removed += open_device("host").sweep(prefix, frozenset())
            for run in runs_of(prefix):
                remove(f"{run}-{OWNER}")
            requests = Path(runtime_dir.allocator_requests.removeprefix(_ZEROMQ))
            files = [runtime_dir.lifeline, runtime_dir.journal, requests]
        else:
            files = [runtime_dir.admin, runtime_dir.cores, *runtime_dir.engines()]
        for file in files:
            if file.exists():
                file.unlink()
                removed.append(file.name)
        return removed
    finally:
        lock.release()
