"""Sleeping on a full disk: a daemon whose folder of images lies on a disk of 8 MiB of its own.

Both ends: `on_small_disk` runs this module inside a mount namespace, where it prints one JSON
object. Invariant: what it prints was seen through the public interfaces.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from allocator import Client, DiskFull, Manifest, RuntimeDir, TensorEntry, WeightSetWriter
from tests.daemon_process import DaemonProcess
from tests.mount_namespace import run_on_tmpfs

MODULE = "tests.allocator.tiers_on_small_disk"
MIB = 1 << 20
FILLER = "another program's"


def on_small_disk(runtime_dir: RuntimeDir) -> dict[str, Any]:
    """What was found with such a disk."""
    with tempfile.TemporaryDirectory() as folder:
        return run_on_tmpfs("size=8m", folder, MODULE, folder, str(runtime_dir.path))


def state(memory: Client) -> list[str]:
    [one] = memory.statistics().weight_sets
    return [one.state, one.tier]


def sleep_on_a_full_disk(memory: Client, folder: Path) -> dict[str, Any]:
    """4 MiB with 3 MiB left, and then with all of it."""
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    entry = TensorEntry(dtype="uint8", shape=(4 * MIB,), stride=(1,), offset=0, num_bytes=4 * MIB)
    with writer:
        writer.reserve(4 * MIB + 4096)[: 4 * MIB] = os.urandom(4 * MIB)
        writer.seal(Manifest(version=1, tensors={"x": entry}, metadata={}), 4 * MIB).release()
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


def main() -> None:
    """Arguments: the folder, the runtime directory."""
    folder = Path(sys.argv[1])
    daemon = DaemonProcess(RuntimeDir.open(sys.argv[2]), "--image-dir", str(folder))
    try:
        with daemon.connect() as memory:
            found = sleep_on_a_full_disk(memory, folder)
    finally:
        daemon.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
