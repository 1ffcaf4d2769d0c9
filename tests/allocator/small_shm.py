"""Run inside a mount namespace whose /dev/shm holds 8 MiB: what happens when the room runs out.

Prints one JSON object. Invariant: what it prints was seen through the public interfaces.
"""

import contextlib
import json
import os
import sys

from allocator import Client, OutOfDeviceMemory, RuntimeDir, WeightSetWriter, connect
from allocator.backends.host import SHM_ROOT, HostBackend
from allocator.messages import Handle, Manifest
from tests.daemon_process import DaemonProcess

MIB = 1 << 20


def load(memory: Client, key: str, num_bytes: int) -> str:
    """Fill and seal, then release: the set is idle. "loaded", or the error's message."""
    writer = memory.open_weight_set(key, {})
    assert isinstance(writer, WeightSetWriter)
    try:
        with writer:
            writer.reserve(num_bytes)[:] = b"\1" * num_bytes
            writer.seal(Manifest(version=1, tensors={}, metadata={}), 0).release()
    except OutOfDeviceMemory as error:
        return str(error)
    return "loaded"


def keys(memory: Client) -> list[str]:
    return [weight_set.key for weight_set in memory.statistics().weight_sets]


def backend_alone() -> dict[str, object]:
    """Two segments that fit one by one, but not together: the second is refused at its commit."""
    backend = HostBackend()
    first, second = (f"/onecopy-small-{os.getpid()}-{n}" for n in (1, 2))
    handles = [Handle(backend="host", segment=s, num_bytes=5 * MIB, generation=1)
               for s in (first, second)]  # fmt: skip
    for segment in (first, second):
        backend.reserve(segment, 5 * MIB)
    mapping = backend.map(handles[0], writable=True)
    with contextlib.closing(mapping):
        mapping.buffer[:] = b"\7" * mapping.num_bytes  # committed: no SIGBUS
    used = os.statvfs(SHM_ROOT)
    found: dict[str, object] = {}
    try:
        backend.map(handles[1], writable=True)
    except OutOfDeviceMemory as error:
        found["commit"] = str(error)
    after = os.statvfs(SHM_ROOT)
    found["nothing_taken"] = used.f_bfree == after.f_bfree
    try:
        backend.reserve(f"{second}-more", 5 * MIB)
    except OutOfDeviceMemory as error:
        found["reserve"] = str(error)
    found["names"] = sorted(path.name for path in SHM_ROOT.iterdir())
    backend.sweep(f"/onecopy-small-{os.getpid()}-")
    return found


def daemon_in_need(memory: Client) -> dict[str, object]:
    """The filler is not ours: the daemon's limit does not see it, the device does."""
    found: dict[str, object] = {"idle": load(memory, "idle", 3 * MIB)}
    (SHM_ROOT / "another program's").write_bytes(bytes(3 * MIB))
    found["evicting"] = load(memory, "new", 4 * MIB)
    found["after_evicting"] = keys(memory)
    found["too_large"] = load(memory, "huge", 100 * MIB)
    found["after_too_large"] = keys(memory)
    return found


def main() -> None:
    """The backend alone, then a daemon that finds its device full."""
    found = backend_alone()
    runtime_dir = RuntimeDir.open(sys.argv[1])
    daemon = DaemonProcess(runtime_dir)
    try:
        with connect(runtime_dir) as memory:
            found |= daemon_in_need(memory)
    finally:
        found["status"] = daemon.stop()
    found["left"] = sorted(path.name for path in SHM_ROOT.iterdir())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
