"""One client in a process of its own, told what to do line by line. Run by `ClientProcess`.

Reads `["command", argument, …]` from stdin, answers `{"value": …}` or `{"error": …, "message": …}`.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from allocator import Manifest, TensorEntry, WeightSetReader, WeightSetWriter, connect

MANIFEST_BYTES = 4096


class Program:
    """The commands: one method each, over at most one weight set at a time."""

    def __init__(self, runtime_dir: str):
        self.memory = connect(runtime_dir)
        self.writer: WeightSetWriter | None = None
        self.reader: WeightSetReader | None = None
        self.num_bytes = 0
        self.buffer: Any = None
        self.waits: list[tuple[int, int]] = []

    def open(self, key: str, fingerprint: dict[str, str], timeout_s: float = 60.0) -> str:
        opened = self.memory.open_weight_set(
            key,
            fingerprint,
            timeout_s=timeout_s,
            on_wait=lambda done, total: self.waits.append((done, total)),
        )
        if isinstance(opened, WeightSetWriter):
            self.writer = opened
            return "writer"
        self.reader = opened
        return "reader"

    def reserve(self, num_bytes: int) -> None:
        assert self.writer is not None
        self.buffer = self.writer.reserve(num_bytes + MANIFEST_BYTES)
        self.num_bytes = num_bytes

    def fill(self, value: int) -> None:
        self.buffer[: self.num_bytes] = bytes([value]) * self.num_bytes

    def progress(self, num_bytes: int) -> None:
        assert self.writer is not None
        self.writer.progress(num_bytes)

    def seal(self) -> None:
        assert self.writer is not None
        self.buffer = None
        entry = TensorEntry(
            dtype="uint8", shape=(self.num_bytes,), stride=(1,), offset=0, num_bytes=self.num_bytes
        )
        manifest = Manifest(version=1, tensors={"x": entry}, metadata={})
        self.reader = self.writer.seal(manifest, self.num_bytes)

    def load(self, key: str, num_bytes: int, value: int) -> str:
        """The whole flow: whoever is elected writes, everyone reads."""
        role = self.open(key, {})
        if role == "writer":
            self.reserve(num_bytes)
            self.fill(value)
            self.seal()
        return role

    def abandon(self) -> None:
        assert self.writer is not None
        self.writer.abandon()

    def release(self) -> None:
        assert self.reader is not None
        self.reader.release()
        self.reader = None

    def digest(self) -> str:
        """Of the tensor's bytes, as this process sees them."""
        assert self.reader is not None
        extent = self.reader.manifest.tensors["x"]
        return hashlib.sha256(self.reader._mapping.buffer[: extent.num_bytes]).hexdigest()

    def mappings(self) -> list[tuple[str, str]]:
        """(permissions, inode) of every segment in this address space."""
        lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
        return [(f[1], f[4]) for f in lines if len(f) > 5 and f[5].startswith("/dev/shm/onecopy-")]

    def seen_waits(self) -> list[tuple[int, int]]:
        return self.waits

    def evict(self, key: str) -> None:
        self.memory.evict(key)

    def is_alive(self) -> bool:
        return self.memory.is_alive()


def main() -> None:
    """Obey until stdin ends."""
    program = Program(sys.argv[1])
    print(json.dumps({"value": "connected"}), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(program, command)(*arguments)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)
    program.memory.close()


if __name__ == "__main__":
    main()
