"""Filling a reserved segment from a checkpoint, near the speed of a plain file copy.

Owns the order and the threads. Bytes that are laid out as they are stored go from the file to the
segment by system calls: no page is zeroed before it is overwritten, none is mapped to be written.
What must be converted is written through tensors over committed memory, by another thread. Several
threads that copy would only wait: the kernel lets one at a time write to a segment. Invariant:
private memory beyond what a conversion needs is one scratch buffer. Knows nothing of formats.
"""

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from allocator import Digest, Manifest, Mapping, WeightSetWriter
from workers.checkpoint.formats.checkpoint import Checkpoint, OnCopied, StoredBytes
from workers.checkpoint.plan import Plan
from workers.config.model_file import opened
from workers.errors import CheckpointCorrupt

_PIECE_BYTES: Final = 1 << 20
"""Small enough that a piece is still in the processor's cache when it is digested and written."""


def fill(
    writer: WeightSetWriter, mapping: Mapping, plan: Plan, checkpoint: Checkpoint, copied: OnCopied
) -> Manifest:
    """Write every tensor of the plan. Returns its manifest, with the digests of the tensors that
    were copied as they are stored. `copied` is called on any thread, one at a time.

    Raises CheckpointError, OutOfDeviceMemory.
    """
    turn = threading.Lock()

    def count(num_bytes: int) -> None:
        with turn:
            copied(num_bytes)

    stored: deque[str] = deque()
    converted: list[str] = []
    for name, entry in plan.manifest.tensors.items():
        if checkpoint.stored_runs(name):
            stored.append(name)
        elif entry.num_bytes:
            converted.append(name)
    copier = _Copier(mapping, plan, checkpoint, stored, count)
    with ThreadPoolExecutor(1, thread_name_prefix="load") as threads:
        copying = threads.submit(copier.run)
        try:
            _convert(writer, mapping, plan, checkpoint, converted, count)
        except BaseException:
            stored.clear()  # the other thread stops soon, too
            raise
        digests = copying.result()
    tensors = {
        name: msgspec.structs.replace(entry, digest=digests.get(name, ""))
        for name, entry in plan.manifest.tensors.items()
    }
    return msgspec.structs.replace(plan.manifest, tensors=tensors)


def _convert(
    writer: WeightSetWriter,
    mapping: Mapping,
    plan: Plan,
    checkpoint: Checkpoint,
    names: list[str],
    count: OnCopied,
) -> None:
    """A function of its own, so that no writable tensor outlives it."""
    tensors = writer.writable_tensors(plan.manifest)
    for name in names:
        entry = plan.manifest.tensors[name]
        mapping.commit(entry.offset, entry.num_bytes)
        checkpoint.copy_into(name, tensors[name], count)


class _Copier:
    """Copies the tensors of a queue, which others may empty to stop it."""

    def __init__(
        self,
        mapping: Mapping,
        plan: Plan,
        checkpoint: Checkpoint,
        names: "deque[str]",
        count: OnCopied,
    ):
        self._mapping = mapping
        self._plan = plan
        self._checkpoint = checkpoint
        self._names = names
        self._count = count

    def run(self) -> dict[str, str]:
        """Until the queue is empty. Returns the digest of each tensor."""
        scratch = memoryview(bytearray(_PIECE_BYTES))
        digests: dict[str, str] = {}
        while True:
            try:
                name = self._names.popleft()
            except IndexError:
                return digests
            digests[name] = self._copy(name, scratch)

    def _copy(self, name: str, scratch: memoryview) -> str:
        target = self._plan.manifest.tensors[name].offset
        digest = Digest()
        for run in self._checkpoint.stored_runs(name):
            with opened(run.file) as file:
                for start in range(0, run.num_bytes, _PIECE_BYTES):
                    part = scratch[: min(_PIECE_BYTES, run.num_bytes - start)]
                    _read(file, run, start, part)
                    digest.update(part)
                    self._mapping.write(target + start, part)
                    self._count(len(part))
            target += run.num_bytes
        return digest.hexdigest()


def _read(descriptor: int, stored: StoredBytes, start: int, out: memoryview) -> None:
    done = 0
    while done < len(out):
        num_bytes = os.preadv(descriptor, [out[done:]], stored.begin + start + done)
        if num_bytes == 0:
            raise CheckpointCorrupt(f"{stored.file} became shorter while it was read")
        done += num_bytes
