"""What happens on another /dev/shm than the machine's: a small one, or one with huge pages.

Both ends: `on_own_shm` runs this module inside a mount namespace, where it prints one JSON object.
Invariant: what it prints was seen through the public interfaces, or in /proc.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allocator import Client, OutOfDeviceMemory, RuntimeDir, WeightSetWriter, connect
from allocator.backends import for_handle
from allocator.backends.host import SHM_ROOT, HostBackend
from allocator.backends.numa import huge_page_mode, page_policy_notes
from allocator.messages import Extent, Failed, Handle, Lease, Leased, MakeRoom, Manifest
from tests.allocator.daemon.raw_session import RawSession
from tests.allocator.processes import in_fork
from tests.daemon_process import DaemonProcess
from tests.leaks import descriptors, wait_until
from tests.mount_namespace import run_on_tmpfs

MODULE = "tests.allocator.backends.small_shm"
MIB = 1 << 20


def on_own_shm(part: str, runtime_dir: RuntimeDir, options: str = "size=8m") -> dict[str, Any]:
    """What a part found on a /dev/shm that is mounted with these options, for it alone."""
    return run_on_tmpfs(options, str(SHM_ROOT), MODULE, part, str(runtime_dir.path))


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


def handle_of(segment: str, num_bytes: int, page_policy: str = "") -> Handle:
    return Handle(
        backend="host", segment=segment, num_bytes=num_bytes, generation=1, page_policy=page_policy
    )


def refusal(function: Callable[[], object]) -> str:
    """The message with which there was no room, or "" where there was."""
    try:
        function()
    except OutOfDeviceMemory as error:
        return str(error)
    return ""


def free_blocks() -> int:
    return os.statvfs(SHM_ROOT).f_bfree


def segments(prefix: str) -> dict[str, object]:
    """Two segments that fit one by one, but not together: the second is refused at its commit."""
    backend = HostBackend()
    first, second, third = (handle_of(f"{prefix}{n}", 5 * MIB) for n in (1, 2, 3))
    for handle in (first, second, third):
        backend.reserve(handle.segment, handle.num_bytes)
    with contextlib.closing(backend.map(first, writable=True)) as mapping:
        mapping.buffer[:] = b"\7" * mapping.num_bytes  # committed: no SIGBUS
    used, before = free_blocks(), descriptors()
    try:
        backend.map(second, writable=True)
    except OutOfDeviceMemory:  # which holds on to what raised it
        assert descriptors() == before
    found: dict[str, object] = {
        "commit": refusal(lambda: backend.map(second, writable=True)),
        "nothing_taken": free_blocks() == used,
        "reserve": refusal(lambda: backend.reserve(f"{prefix}more", 5 * MIB)),
        "outstanding": refusal(
            lambda: backend.reserve(f"{prefix}more", 2 * MIB, outstanding_bytes=2 * MIB)
        ),
    }
    backend.reserve(f"{prefix}fits", MIB, outstanding_bytes=2 * MIB)
    backend.free(f"{prefix}fits")
    with contextlib.closing(backend.map(third, writable=True, commit=False)) as mapping:
        found["write"] = refusal(lambda: mapping.write(0, bytes(5 * MIB)))
    found["names"] = sorted(path.name for path in SHM_ROOT.iterdir())
    backend.sweep(prefix)
    return found


def pool(prefix: str) -> dict[str, object]:
    """Extents of 2 MiB until no further one can be committed."""
    backend = HostBackend()
    backend.reserve_pool(f"{prefix}pool", 64 * MIB)
    window = backend.open_pool(handle_of(f"{prefix}pool", 64 * MIB))
    extents = [Extent(offset=2 * MIB * n, num_bytes=2 * MIB) for n in range(8)]
    for number, extent in enumerate(extents[:3]):
        window.map(extent, writable=True)
        window.buffer[extent.offset : extent.offset + extent.num_bytes] = (
            bytes([number + 1]) * extent.num_bytes
        )
    used = free_blocks()
    too_large = Extent(offset=extents[3].offset, num_bytes=4 * MIB)
    found: dict[str, object] = {
        "map": refusal(lambda: window.map(too_large, writable=True)),
        "nothing_taken": free_blocks() == used,
        "fault": in_fork(lambda: str(window.buffer[too_large.offset])).signal,
        "others": [window.buffer[extent.offset] for extent in extents[:3]],
    }
    window.unmap(extents[1], discard=True)
    window.map(too_large, writable=True)
    window.buffer[too_large.offset] = 4
    found["after_discard"] = window.buffer[too_large.offset]
    window.close()
    backend.sweep(prefix)
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


def shortage(runtime_dir: RuntimeDir) -> dict[str, object]:
    """What was promised can't be committed, since another program has taken the room meanwhile."""
    filler = SHM_ROOT / "another program's"
    daemon = DaemonProcess(runtime_dir)
    try:
        with connect(runtime_dir) as memory:
            found: dict[str, object] = {"idle": load(memory, "idle", 2 * MIB)}
            writer = memory.open_weight_set("new", {})
            assert isinstance(writer, WeightSetWriter)
            with writer:
                mapping = writer.reserve_uncommitted(4 * MIB)
                filler.write_bytes(bytes(3 * MIB))
                mapping.write(0, bytes(4 * MIB - 4096))  # 3 MiB were left, and the idle set's
                writer.seal(Manifest(version=1, tensors={}, metadata={}), 4 * MIB - 4096).release()
                found["after_writing"] = keys(memory)
            filler.unlink()
            found |= unanswered_promise(runtime_dir, memory, filler)
    finally:
        status = daemon.stop()
    filler.unlink()
    left = sorted(path.name for path in SHM_ROOT.iterdir())
    return found | {"status": status, "left": left}


def unanswered_promise(runtime_dir: RuntimeDir, memory: Client, filler: Path) -> dict[str, object]:
    """3 MiB are leased and not committed yet when there is no room for them any more."""
    memory.evict("new")
    wait_until(lambda: memory.statistics().limit_bytes > 7 * MIB, "the room is seen")
    load(memory, "idle", 2 * MIB)
    session = RawSession(runtime_dir)
    leased = session.ask(Lease(num_bytes=3 * MIB))
    assert isinstance(leased, Leased)
    found: dict[str, object] = {"beside_a_promise": refusal(lambda: memory.lease(6 * MIB))}
    found["before"] = keys(memory)
    filler.write_bytes(bytes(5 * MIB - 65536))
    wait_until(lambda: not keys(memory), "what is idle is given up, though nobody asks")
    found["room"] = type(session.ask(MakeRoom(num_bytes=3 * MIB))).__name__
    with filler.open("ab") as file:
        file.write(bytes(MIB))
    refused = session.ask(MakeRoom(num_bytes=3 * MIB))
    assert isinstance(refused, Failed)
    found |= {"no_room": refused.message, "code": refused.code}
    session.close()
    return found


def huge_bytes(segment: str) -> int:
    """How much of a mapped segment this process reaches through huge pages (proc(5), smaps)."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            inside = line.endswith(segment)
        elif inside and name == "ShmemPmdMapped:":
            found += int(values[0]) * 1024
    return found


def huge(prefix: str) -> dict[str, object]:
    """Segments and a pool with and without huge pages; what does not fit is an error."""
    found: dict[str, object] = {"notes": page_policy_notes("huge"), "mode": huge_page_mode()}
    for page_policy in ("huge", ""):
        backend = HostBackend(page_policy)
        seen: dict[str, int] = {}
        for commit in (True, False):
            handle = handle_of(f"{prefix}{page_policy}{commit}", 4 * MIB + 5, page_policy)
            backend.reserve(handle.segment, handle.num_bytes)
            client = for_handle(handle)
            with contextlib.closing(client.map(handle, writable=True, commit=commit)) as mapping:
                mapping.write(5, b"\7" * (4 * MIB))
            backend.seal(handle.segment)
            with contextlib.closing(client.map(handle, writable=False)) as mapping:
                assert mapping.buffer[5:] == b"\7" * (4 * MIB)
                seen[f"committed {commit}"] = huge_bytes(handle.segment)
            backend.free(handle.segment)
        # A size for which the kernel does not align the window of its own accord.
        handle = handle_of(f"{prefix}pool", 64 * MIB + backend.granularity, page_policy)
        backend.reserve_pool(handle.segment, handle.num_bytes)
        with contextlib.closing(for_handle(handle).open_pool(handle)) as window:
            window.map(Extent(offset=4 * MIB, num_bytes=4 * MIB), writable=True)
            window.buffer[4 * MIB : 8 * MIB] = b"\7" * (4 * MIB)
            seen["extent"] = huge_bytes(handle.segment)
        backend.free(handle.segment)
        found[page_policy or "none"] = seen
    first, second = (handle_of(f"{prefix}{n}", 10 * MIB, "huge") for n in (1, 2))
    backend = HostBackend("huge")
    backend.reserve(first.segment, first.num_bytes)
    backend.reserve(second.segment, second.num_bytes)
    with contextlib.closing(backend.map(first, writable=True)):
        found["commit"] = refusal(lambda: backend.map(second, writable=True))
    backend.sweep(prefix)
    return found


def daemon(runtime_dir: RuntimeDir) -> dict[str, object]:
    """A daemon that finds its device full."""
    daemon = DaemonProcess(runtime_dir)
    try:
        with connect(runtime_dir) as memory:
            found = daemon_in_need(memory)
    finally:
        status = daemon.stop()
    left = sorted(path.name for path in SHM_ROOT.iterdir())
    return found | {"status": status, "left": left}


def main() -> None:
    """The part that the first argument names."""
    runtime_dir = RuntimeDir.open(sys.argv[2])
    match sys.argv[1]:
        case "segments":
            found = segments(runtime_dir.segment_prefix)
        case "pool":
            found = pool(runtime_dir.segment_prefix)
        case "shortage":
            found = shortage(runtime_dir)
        case "huge":
            found = huge(runtime_dir.segment_prefix)
        case part:
            assert part == "daemon"
            found = daemon(runtime_dir)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
