"""A full disk, and a read-only one: a daemon whose images lie on one of 8 MiB of its own.

Both ends: `on_small_disk` runs this module inside a mount namespace, where it prints one JSON
object. Invariant: what it prints was seen through the public interfaces.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allocator import (
    Client,
    DiskFull,
    Manifest,
    RuntimeDir,
    TensorEntry,
    WeightSetReader,
    WeightSetWriter,
)
from allocator.errors import DiskError
from allocator.messages import Abandon, Elected, Open
from tests.allocator.daemon.raw_session import RawSession
from tests.daemon_process import DaemonProcess
from tests.leaks import wait_until
from tests.mount_namespace import run_on_tmpfs

MODULE = "tests.allocator.client.tiers_on_small_disk"
MIB = 1 << 20
FILLER = "another program's"


Part = Callable[[Client, Path, RuntimeDir], dict[str, Any]]


def on_small_disk(part: Part, runtime_dir: RuntimeDir) -> dict[str, Any]:
    """What a part of this module found with such a disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(runtime_dir.path)
        return run_on_tmpfs("size=8m", folder, MODULE, part.__name__, folder, path)


def state(memory: Client) -> list[str]:
    [one] = memory.statistics().weight_sets
    return [one.state, one.tier]


def load(memory: Client) -> None:
    """A set of 4 MiB that nobody reads."""
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    entry = TensorEntry(dtype="uint8", shape=(4 * MIB,), stride=(1,), offset=0, num_bytes=4 * MIB)
    with writer:
        writer.reserve(4 * MIB + 4096)[: 4 * MIB] = os.urandom(4 * MIB)
        writer.seal(Manifest(version=1, tensors={"x": entry}, metadata={}), 4 * MIB).release()


def sleep_on_a_full_disk(memory: Client, folder: Path, _: RuntimeDir) -> dict[str, Any]:
    """4 MiB with 3 MiB left, and then with all of it."""
    load(memory)
    status = os.statvfs(folder)
    (folder / FILLER).write_bytes(bytes(status.f_bavail * status.f_frsize - 3 * MIB))
    found: dict[str, Any] = {"too_large": ""}
    try:
        memory.sleep("k", level=2)
    except DiskFull as error:
        found["too_large"] = str(error)
    found["state_then"] = state(memory)
    found["left_then"] = [path.name for path in folder.iterdir()]
    found["damaged_then"] = memory.damaged("k")
    (folder / FILLER).unlink()
    memory.sleep("k", level=2)
    found["state_with_room"] = state(memory)
    found["damaged_at_last"] = memory.damaged("k")
    return found


def use_a_read_only_disk(memory: Client, folder: Path, runtime_dir: RuntimeDir) -> dict[str, Any]:
    """The disk can't be written any more once there is an image."""
    load(memory)
    memory.sleep("k", level=2)
    names = [path.name for path in folder.iterdir()]
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    held = memory.lease(MIB)
    held.buffer[:] = b"\7" * MIB
    found: dict[str, Any] = {"evict": ""}
    try:
        memory.evict("k", image=True)
    except DiskError as error:
        found["evict"] = str(error)
    found["state_then"] = state(memory)
    reader = memory.open_weight_set("k", {})
    assert isinstance(reader, WeightSetReader)
    found["damaged"] = memory.damaged("k")
    reader.release()
    found["state_awake"] = state(memory)
    memory.evict("k")
    found["evicted"] = state(memory)
    # Whoever finds an image damaged has it given up: it stays there, and is not found again.
    session = RawSession(runtime_dir)
    with_image = session.ask(Open(key="k", fingerprint={}, wait_ms=0))
    assert isinstance(with_image, Elected)
    session.ask(Abandon(key="k", generation=with_image.generation, discard_source=True))
    without = session.ask(Open(key="k", fingerprint={}, wait_ms=0))
    assert isinstance(without, Elected)
    found["had_sources"] = [one.source is not None for one in (with_image, without)]
    session.close()
    wait_until(lambda: not memory.statistics().weight_sets, "nothing of it is known")
    found["same_files"] = names == [path.name for path in folder.iterdir()]
    found["lease"] = bytes(held.buffer) == b"\7" * MIB
    memory.check_integrity()
    return found


def main() -> None:
    """Arguments: the name of the part, the folder, the runtime directory."""
    folder = Path(sys.argv[2])
    runtime_dir = RuntimeDir.open(sys.argv[3])
    daemon = DaemonProcess(runtime_dir, "--image-dir", str(folder))
    parts: tuple[Part, ...] = (sleep_on_a_full_disk, use_a_read_only_disk)
    [part] = (one for one in parts if one.__name__ == sys.argv[1])
    try:
        with daemon.connect() as memory:
            found = part(memory, folder, runtime_dir) | {
                "same_daemon": memory.daemon_pid == daemon.pid
            }
    finally:
        daemon.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
