"""Leases when /dev/shm is full: a daemon and a client on one of 8 MiB of their own.

Both ends: `on_small_shm` runs this module inside a mount namespace, where it prints one JSON
object. Invariant: what it prints was seen through the public interfaces.
"""

import json
import os
import sys
from typing import Any

from allocator import Client, OutOfDeviceMemory, RuntimeDir
from allocator.backends.host import SHM_ROOT
from tests.daemon_process import DaemonProcess
from tests.mount_namespace import run_on_tmpfs

MODULE = "tests.allocator.client.leases_on_small_shm"
MIB = 1 << 20
FILLER = "another program's"


def on_small_shm(runtime_dir: RuntimeDir) -> dict[str, Any]:
    """What was found with such a /dev/shm."""
    return run_on_tmpfs("size=8m", str(SHM_ROOT), MODULE, str(runtime_dir.path))


def used_bytes() -> int:
    status = os.statvfs(SHM_ROOT)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def lease_too_much(memory: Client) -> dict[str, Any]:
    """Another program leaves room for each of two extents, but not for both: who leases them finds
    out when it commits the second."""
    first = memory.lease(2 * MIB)
    first.buffer[:] = b"\1" * (2 * MIB)
    (SHM_ROOT / FILLER).write_bytes(bytes(3 * MIB))
    before = used_bytes()
    found: dict[str, Any] = {"refused": ""}
    try:
        memory.lease_many(2 * MIB, 2)
    except OutOfDeviceMemory as error:
        found["refused"] = str(error)
    found["nothing_taken"] = used_bytes() == before
    pool = memory.statistics().pool
    found["leased_bytes"] = pool.leased_bytes
    found["first"] = bytes(first.buffer) == b"\1" * (2 * MIB)
    (SHM_ROOT / FILLER).unlink()
    second = memory.lease(5 * MIB)
    second.buffer[:] = b"\2" * (5 * MIB)
    found["then"] = memory.statistics().pool.leased_bytes
    memory.release_many([first, second])
    pools = SHM_ROOT.glob("*-pool*")
    found["used_at_last"] = sum(path.stat().st_blocks * 512 for path in pools)
    return found


def main() -> None:
    """Argument: the runtime directory."""
    daemon = DaemonProcess(RuntimeDir.open(sys.argv[1]))
    try:
        with daemon.connect() as memory:
            found = lease_too_much(memory)
    finally:
        daemon.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
