"""Run below rough_preadv.c: reads one file whole, and prints as JSON what came of it.

python -m tests.workers.placement.rough_files {native|python} ACCESS FILE [GATE]
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.leaks import wait_until
from tests.workers.placement.memory import Memory
from tests.workers.placement.reading_threads import use
from workers.errors import ReadFailed
from workers.placement.reader import Reader

PIECE_BYTES = 1 << 17
TIMEOUT_S = 300.0


def read_whole(reader: Reader, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    memory = Memory(len(content) + PIECE_BYTES)
    file = reader.open(path)
    found: dict[str, Any] = {"opened": reader.access(file)}
    read = memory.read(file, 0, len(content))
    job = reader.start([read])
    try:
        reader.wait(job, TIMEOUT_S)
    except ReadFailed as error:
        found |= {"errno": error.errno, "begin": error.begin, "path": str(error.path)}
    return found | {"is_equal": memory.read_by(read) == content, "read": reader.access(file)}


def cancel_at_gate(reader: Reader, path: Path, gate: Path) -> dict[str, Any]:
    """Cancels the job while its first pieces can't get on; then lets them."""
    memory = Memory(path.stat().st_size + PIECE_BYTES)
    job = reader.start([memory.read(reader.open(path), 0, path.stat().st_size)])
    wait_until(gate.with_name(f"{gate.name}.arrived").exists, "a piece is under way")
    reader._threads.cancel(job)
    found: dict[str, Any] = {"ended at the gate": reader.done(job)}
    gate.unlink()
    reader.cancel(job)
    found["bytes_read"] = reader.statistics().bytes_read
    memory.wipe()
    reader.close()
    return found | {"is_untouched": memory.is_untouched}


def main(kind: str, access: Any, path: str, *gate: str) -> None:
    use(kind)
    with Reader(4, PIECE_BYTES, access=access) as reader:
        if gate:
            print(json.dumps(cancel_at_gate(reader, Path(path), Path(*gate))))
        else:
            print(json.dumps(read_whole(reader, Path(path))))


if __name__ == "__main__":
    main(*sys.argv[1:])
