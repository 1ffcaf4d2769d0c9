"""A file of layers as they are computed with, where the checkpoint's own files have them otherwise:
as blocks of a GGUF file, or in another dtype.

Owns the writing. Invariants: a file that is there is complete; private memory is what converting
one tensor takes; a disk without room is found out before anything is written. Files stay for the
next start, and whoever deletes one has it written again.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import torch

from allocator import DiskFull, cache_folder
from workers.checkpoint.formats.checkpoint import Checkpoint
from workers.checkpoint.offloaded import OffloadedLayer, OffloadedLayers
from workers.config.model_file import file_identity
from workers.errors import CacheNotWritable

OnWritten = Callable[[int, int], None]
"""Called with (written bytes, total bytes)."""

_PROGRESS_STEP: Final = 32
"""Progress is told this many times, however large the file is."""


def converted_file(checkpoint: Checkpoint, layers: str) -> Path:
    """Of these layers of this checkpoint in this dtype; another one once a file has changed."""
    of = json.dumps([checkpoint.fingerprint(), str(checkpoint.dtype), layers], sort_keys=True)
    name = checkpoint.path.name[:100]
    return (
        cache_folder() / "layers" / f"{name}@{hashlib.sha256(of.encode()).hexdigest()[:16]}.layers"
    )


def write_converted(
    checkpoint: Checkpoint, offloaded: OffloadedLayers, on_written: OnWritten
) -> OffloadedLayers:
    """The same, with all files there. Raises DiskFull, CacheNotWritable,
    CheckpointError."""
    missing = [number for number, file in enumerate(offloaded.files) if not file.identity]
    files = list(offloaded.files)
    for number in missing:
        path = Path(files[number].path)
        layers = [layer for layer in offloaded.layers if _is_in(layer, number)]
        if not path.exists():
            _write(checkpoint, layers, path, on_written)
        files[number] = msgspec.structs.replace(files[number], identity=file_identity(path))
    return msgspec.structs.replace(offloaded, files=tuple(files))


def _is_in(layer: OffloadedLayer, file: int) -> bool:
    return any(run.file == file for tensor in layer.tensors.values() for run in tensor.runs)


def _write(
    checkpoint: Checkpoint, layers: list[OffloadedLayer], path: Path, on_written: OnWritten
) -> None:
    """The file gets its name when it is complete: until then it is gone with whoever writes it.
    Where another has given the same name meanwhile, that file is the same."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0):
            _fill_file(checkpoint, layers, descriptor, on_written)
            with contextlib.suppress(FileExistsError):
                _name(descriptor, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                f"{path.parent} has no room for {_extent(layers[-1])[1]:,} bytes of converted "
                f"layers ({error.strerror}): free some, set ONECOPY_CACHE_DIR to another folder, "
                "or serve a safetensors checkpoint of the dtype that is computed with"
            ) from error
        raise CacheNotWritable(
            f"{path.parent}, where converted layers are to be written, can't be "
            f"({error.strerror}): set ONECOPY_CACHE_DIR to a folder that can"
        ) from error


def _name(descriptor: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # with a folder it is linkat(2) that follows the link in /proc (its manual, "O_TMPFILE")
        os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _fill_file(
    checkpoint: Checkpoint, layers: list[OffloadedLayer], descriptor: int, on_written: OnWritten
) -> None:
    total = _extent(layers[-1])[1]
    os.posix_fallocate(descriptor, 0, total)
    done = told = 0

    def copied(num_bytes: int) -> None:
        nonlocal done, told
        done += num_bytes
        if (done - told) * _PROGRESS_STEP >= total or done >= total:
            told = done
            on_written(min(done, total), total)

    for layer in layers:
        _fill(checkpoint, layer, descriptor, copied)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _extent(layer: OffloadedLayer) -> tuple[int, int]:
    """Where the layer begins and ends in its file."""
    runs = [run for tensor in layer.tensors.values() for run in tensor.runs]
    return min(run.begin for run in runs), max(run.begin + run.num_bytes for run in runs)


def _fill(
    checkpoint: Checkpoint, layer: OffloadedLayer, descriptor: int, copied: Callable[[int], None]
) -> None:
    """Its part of the file is mapped for no longer than it is written."""
    begin, end = _extent(layer)
    area = mmap.mmap(descriptor, end - begin, mmap.MAP_SHARED, offset=begin)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    for name, tensor in layer.tensors.items():
        [run] = tensor.runs
        if run.num_bytes:
            place = whole[run.begin - begin : run.begin - begin + run.num_bytes]
            out = place.view(getattr(torch, tensor.dtype)).view(tensor.shape)
            checkpoint.copy_into(layer.prefix + name, out, copied)
    area.flush()
