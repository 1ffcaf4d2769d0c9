"""One client in a process of its own, told what to do line by line. Run by `ClientProcess`.

Reads `["method", [argument, …], {"name": argument, …}]` from stdin, answers `{"value": …}` or
`{"error": …, "message": …}`.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from allocator import (
    Block,
    Lease,
    Manifest,
    TensorEntry,
    WeightSetReader,
    WeightSetWriter,
    connect,
)

MANIFEST_BYTES = 4096


class ClientProgram:
    """What it can be told to do: one method each, over at most one weight set at a time."""

    def __init__(self, runtime_dir: str, options: dict[str, str]):
        self.memory = connect(runtime_dir, **options)
        self.writer: WeightSetWriter | None = None
        self.reader: WeightSetReader | None = None
        self.num_bytes = 0
        self.buffer: Any = None
        self.waits: list[tuple[int, int]] = []
        self.leases: dict[int, Lease] = {}  # by offset
        self.blocks: dict[str, Block] = {}  # by digest

    # --- weight sets

    def open(self, key: str, fingerprint: dict[str, str], timeout_s: float = 60.0) -> str:
        opened = self.memory.open_weight_set(
            key,
            fingerprint,
            timeout_s=timeout_s,
            on_wait=lambda done, total, _writer: self.waits.append((done, total)),
        )
        if isinstance(opened, WeightSetWriter):
            self.writer = opened
            return "writer"
        self.reader = opened
        return "reader"

    def reserve(self, num_bytes: int) -> str:
        """The segment's name."""
        assert self.writer is not None
        self.buffer = self.writer.reserve(num_bytes + MANIFEST_BYTES)
        self.num_bytes = num_bytes
        assert self.writer._handle is not None
        return self.writer._handle.segment

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
        return hashlib.sha256(self.reader._mappings[0].buffer[: extent.num_bytes]).hexdigest()

    def damaged(self) -> list[str]:
        assert self.reader is not None
        return self.reader.damaged()

    def mappings(self) -> list[tuple[str, str]]:
        """(permissions, inode) of every segment in this address space."""
        lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
        return [(f[1], f[4]) for f in lines if len(f) > 5 and f[5].startswith("/dev/shm/onecopy-")]

    def seen_waits(self) -> list[tuple[int, int]]:
        return self.waits

    def evict(self, key: str) -> None:
        self.memory.evict(key)

    def sleep(self, key: str, level: int, timeout_s: float = 60.0) -> None:
        self.memory.sleep(key, level=level, timeout_s=timeout_s)

    def wake(self, key: str) -> None:
        self.memory.wake(key)

    # --- the pool

    def lease(self, num_bytes: int, count: int = 1) -> list[int]:
        """The offsets."""
        leases = self.memory.lease_many(num_bytes, count)
        self.leases |= {lease.extent.offset: lease for lease in leases}
        return [lease.extent.offset for lease in leases]

    def fill_leases(self, values: list[tuple[int, int]]) -> None:
        """(offset, the value of all its bytes)."""
        for offset, value in values:
            lease = self.leases[offset]
            lease.buffer[:] = bytes([value]) * lease.extent.num_bytes

    def lease_digest(self, offset: int) -> str:
        return hashlib.sha256(self.leases[offset].buffer).hexdigest()

    def release_leases(self, offsets: list[int]) -> None:
        self.memory.release_many([self.leases[offset] for offset in offsets])

    def put(self, blocks: list[tuple[str, int]]) -> list[bool]:
        """(digest, offset of the lease). Whether the index took it."""
        put = self.memory.put_blocks(
            [(bytes.fromhex(digest), self.leases[offset]) for digest, offset in blocks]
        )
        self.blocks |= {
            digest: block for (digest, _), block in zip(blocks, put, strict=True) if block
        }
        return [block is not None for block in put]

    def look_up(self, digests: list[str]) -> list[int]:
        """The offsets of those that were found."""
        found = self.memory.look_up_blocks([bytes.fromhex(digest) for digest in digests])
        self.blocks |= {block.digest.hex(): block for block in found}
        return [block.extent.offset for block in found]

    def block_digest(self, digest: str) -> str:
        return hashlib.sha256(self.blocks[digest].buffer).hexdigest()

    def release_blocks(self, digests: list[str]) -> None:
        self.memory.release_blocks([self.blocks[digest] for digest in digests])

    def write_to_block(self, digest: str) -> None:
        self.blocks[digest].buffer[0] = 0

    # --- the session

    def is_alive(self) -> bool:
        return self.memory.is_alive()


def main(kind: type[ClientProgram] = ClientProgram) -> None:
    """Obey until stdin ends."""
    program = kind(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"value": "connected"}), flush=True)
    for line in sys.stdin:
        method, given, named = json.loads(line)
        try:
            answer = {"value": getattr(program, method)(*given, **named)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)
    program.memory.close()


if __name__ == "__main__":
    main()
