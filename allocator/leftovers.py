"""What a daemon leaves behind that could not end in order, removed by whoever had to kill it.

Owns the list of it. Invariant: nothing is removed while a daemon of that role runs. Knows nothing
of who was killed, or why.
"""

from pathlib import Path
from typing import Final, Literal

from allocator.backends import open_device
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
            removed += open_device("host").sweep(runtime_dir.segment_prefix, frozenset())
            endpoint = runtime_dir.allocator_requests
            files = [runtime_dir.lifeline, runtime_dir.journal]
        else:
            endpoint = runtime_dir.engines
            files = [runtime_dir.admin, runtime_dir.cores]
        for file in (*files, Path(endpoint.removeprefix(_ZEROMQ))):
            if file.exists():
                file.unlink()
                removed.append(file.name)
        return removed
    finally:
        lock.release()
