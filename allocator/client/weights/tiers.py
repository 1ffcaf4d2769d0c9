"""Moving a weight set between tiers: the copying itself, which clients do.

Owns the bytes' way down (device → host → disk) and up again. Invariants: the copy that is left is
given up only after the new one is complete, and by the daemon; what comes from disk is checked by
its digests before anybody reads it; an image that serves as it is is mapped, not copied. Knows
nothing of who uses the set.

Where a device's memory is the host's own, the host tier is only another account: the daemon moves
the set there and back itself, and nothing is copied.

The daemon never copies: a mover is a client like any other, so that a large move holds up nobody,
and a mover that dies leaves the set where it was.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from allocator import backends, images, messages
from allocator.client.session.connection import Connection
from allocator.client.weights.weight_set import (
    WeightSetReader,
    WeightSetWriter,
    map_handle,
    read_manifest,
)
from allocator.digests import differing, digest
from allocator.errors import AllocatorError, ImageCorrupt, InvalidMessage, WaitTimeout
from allocator.messages import Extent, LowerTier, Source

log = logging.getLogger("onecopy.allocator")

_PIECE_BYTES: Final = 32 << 20
_MAX_THREADS: Final = 4
_WAIT_MS: Final = 1000

OnProgress = Callable[[int], None]


def wake(writer: WeightSetWriter, source: Source, *, in_place: bool) -> WeightSetReader | None:
    """Fill the set from its copy on a lower tier. None where that copy turned out to be damaged:
    it is given up then, and so is the election. `in_place`: the device is host memory, so that an
    image can be mapped as it is."""
    with writer:  # whatever comes in between, the election is given back
        try:
            source_mapping = map_handle(source.handle)
            manifest, manifest_digest = _manifest(source, source_mapping)
            if source.tier == "disk":
                _check(source_mapping, manifest, manifest_digest)
        except (AllocatorError, FileNotFoundError) as error:
            log.warning("the copy on the %s tier is given up: %s", source.tier, str(error))
            writer.abandon(discard_source=True)
            return None
        if source.tier == "disk" and in_place:
            source_mapping.close()
            return writer.seal_in_place(manifest, manifest_digest)
        target = writer.reserve_uncommitted(source.handle.num_bytes)
        copy(source_mapping, target, writer.progress)
        source_mapping.close()
        return writer.seal_copy(manifest, manifest_digest)


def sleep(connection: Connection, key: str, tier: LowerTier, timeout_s: float) -> None:
    """Move an idle set down to `tier`. Raises UnknownWeightSet, WeightSetBusy, DiskFull,
    OutOfDeviceMemory, WaitTimeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        left_ms = max(0, int((deadline - time.monotonic()) * 1000))
        answer, descriptors = connection.exchange(
            messages.Sleep(key=key, tier=tier, wait_ms=min(_WAIT_MS, left_ms))
        )
        match answer:
            case messages.Done():
                return
            case messages.Moving():
                _move(connection, key, answer, descriptors)
            case messages.StillLoading(writer_pid=pid):
                if time.monotonic() >= deadline:
                    raise WaitTimeout(
                        f"process {pid} has been at work on {key!r} for more than {timeout_s:.0f} s"
                    )
            case _:
                raise InvalidMessage(f"unexpected answer {type(answer).__name__}")


def copy(
    source: backends.Mapping, target: backends.Mapping, on_progress: OnProgress | None = None
) -> None:
    """All bytes, by several threads: one can't fill the memory's bandwidth."""
    buffer = source.buffer
    pieces = range(0, source.num_bytes, _PIECE_BYTES)

    def copy_piece(start: int) -> int:
        with buffer[start : start + _PIECE_BYTES] as piece:
            target.write(start, piece)
            return len(piece)

    done = 0
    with ThreadPoolExecutor(_num_threads(), thread_name_prefix="copy") as threads:
        for num_bytes in threads.map(copy_piece, pieces):
            done += num_bytes
            if on_progress is not None:
                on_progress(done)


def _move(
    connection: Connection, key: str, moving: messages.Moving, descriptors: Sequence[int]
) -> None:
    def progress(num_bytes: int) -> None:
        connection.request(
            messages.Progress(key=key, generation=moving.generation, num_bytes=num_bytes),
            messages.Done,
        )

    try:
        source = map_handle(moving.handle, descriptors)
        if moving.target is not None:
            target = map_handle(moving.target, writable=True, commit=False)
            if _is_addressable(source):
                copy(source, target, progress)
            else:
                source.read(0, _committed(target))
            target.close()
        else:
            folder = Path(moving.image_folder)
            images.write_image(
                folder, key, moving.fingerprint, source.buffer, moving.manifest, progress
            )
        source.close()
        connection.request(messages.Moved(key=key, generation=moving.generation), messages.Done)
    except BaseException:
        # Refused where Moved was done, and only its answer was lost.
        with contextlib.suppress(AllocatorError):
            connection.give_back(messages.Abandon(key=key, generation=moving.generation))
        raise


def _manifest(source: Source, mapping: backends.Mapping) -> tuple[Extent, str]:
    """Where the manifest lies, and its digest as it is now, or as the image's record says."""
    if source.tier == "disk":
        record, identity = images.read_record(Path(source.handle.segment))
        if identity != source.handle.identity:
            raise ImageCorrupt(f"{source.handle.segment} was replaced meanwhile")
        manifest = Extent(offset=record.manifest_offset, num_bytes=record.manifest_num_bytes)
        return manifest, record.manifest_digest
    if source.manifest is None:
        raise InvalidMessage("a copy in host memory has no manifest")
    begin = source.manifest.offset
    return source.manifest, digest(mapping.buffer[begin : begin + source.manifest.num_bytes])


def _check(mapping: backends.Mapping, manifest: Extent, manifest_digest: str) -> None:
    """Raise ImageCorrupt where a byte of a tensor is not what was written."""
    begin = manifest.offset
    if digest(mapping.buffer[begin : begin + manifest.num_bytes]) != manifest_digest:
        raise ImageCorrupt("the manifest does not have its digest")
    tensors = read_manifest(mapping, manifest).tensors
    wrong = differing(mapping.buffer, {n: e for n, e in tensors.items() if e.segment == 0})
    if wrong:
        raise ImageCorrupt(f"{len(wrong)} tensors do not have their digests, {wrong[0]} first")


def _is_addressable(mapping: backends.Mapping) -> bool:
    try:
        return mapping.buffer is not None
    except TypeError:
        return False


def _committed(mapping: backends.Mapping) -> memoryview:
    mapping.commit(0, mapping.num_bytes)
    return mapping.buffer


def _num_threads() -> int:
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))
