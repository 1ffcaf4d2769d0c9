"""Run inside a mount namespace whose folder FOLDER is a disk of 24 MiB: what a full disk does.

Prints one JSON object. Invariant: what it prints was seen through the public interfaces.
"""

import json
import os
import sys
from pathlib import Path

from allocator.daemon.journal.file import Journal, read_journal
from allocator.errors import DiskFull, JournalError
from allocator.images import read_record, write_image
from allocator.messages import Extent

MIB = 1 << 20
MANIFEST = Extent(offset=0, num_bytes=16)
FILLER = "another program's"


def fill(folder: Path, leave: int = 0) -> None:
    """Another program takes all the room but `leave` bytes, in whole pages."""
    status = os.statvfs(folder)
    (folder / FILLER).write_bytes(bytes(status.f_bavail * status.f_frsize - leave))


def images(folder: Path) -> dict[str, object]:
    """One image that could never fit, one that finds the disk full half-way, one that fits."""
    found: dict[str, object] = {}
    progress: list[int] = []
    try:
        write_image(folder, "huge", {}, memoryview(bytes(32 * MIB)), MANIFEST, progress.append)
    except DiskFull as error:
        found["too_large"] = str(error)
    found["too_large_progress"] = list(progress)

    def progress_of_both(num_bytes: int) -> None:
        progress.append(num_bytes)
        if num_bytes == 8 * MIB:
            fill(folder, leave=3 * MIB)

    source = memoryview(os.urandom(20 * MIB))
    try:
        write_image(folder, "k", {}, source, MANIFEST, progress_of_both)
    except DiskFull as error:
        found["midway"] = str(error)
    found["midway_progress"] = list(progress)
    found["midway_left"] = [path.name for path in folder.iterdir()]
    (folder / FILLER).unlink()
    path = write_image(folder, "k", {}, source, MANIFEST, progress.append)
    record, _ = read_record(path)
    found["then"] = record.num_bytes
    path.unlink()
    return found


def journals(folder: Path) -> dict[str, object]:
    """Records until the disk is full, a rewrite on the full disk, records once there is room."""
    path = folder / "journal"
    expected: list[bytes] = []
    journal = Journal.create(path, expected)
    fill(folder, leave=64 << 10)
    found: dict[str, object] = {}
    for number in range(10_000):
        record = b"%d " % number * 500
        try:
            journal.append(record)
        except JournalError as error:
            found["append"] = str(error)
            break
        expected.append(record)
    found["appended"] = len(expected)
    found["length"] = path.stat().st_size == journal.num_bytes
    found["good"] = read_journal(path) == expected
    try:
        journal.rewrite(expected)
    except JournalError as error:
        found["rewrite"] = str(error)
    found["good_after_rewrite"] = read_journal(path) == expected
    (folder / FILLER).unlink()
    journal.append(b"more")
    found["good_with_more"] = read_journal(path) == [*expected, b"more"]
    journal.close()
    path.unlink()
    found["left"] = [path.name for path in folder.iterdir()]
    return found


def main() -> None:
    """Images, then a journal."""
    folder = Path(sys.argv[1])
    print(json.dumps(images(folder) | journals(folder)))


if __name__ == "__main__":
    main()
