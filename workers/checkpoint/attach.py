"""Attach to a checkpoint's weights: load them into shared memory once, map them ever after.

Owns the five steps of the sharing flow from a worker's side: plan → one allocation → copy → seal →
aliased tensors. Invariant: whoever calls, and however many at once, one of them copies and all get
tensors over the same bytes. Knows nothing of models.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch

from allocator import (
    Client,
    TensorEntry,
    UnknownWeightSet,
    WeightSetReader,
    WeightSetWriter,
    file_handle,
    manifest_bytes,
)
from workers.checkpoint.formats.checkpoint import Checkpoint
from workers.checkpoint.load import fill
from workers.checkpoint.offloaded import KEY as OFFLOADED
from workers.checkpoint.offloaded import OffloadedLayers, decoded
from workers.checkpoint.open import open_checkpoint
from workers.checkpoint.plan import FORMAT_VERSION, make_plan
from workers.errors import CheckpointChanged, CheckpointCorrupt
from workers.packed_format import METADATA as PACKED

OnProgress = Callable[[int, int, int], None]
"""Called with (written bytes, total bytes, pid of the process that writes)."""

_PROGRESS_STEP: Final = 32
"""Progress is reported this many times over a load, so that messages do not grow with its size."""


@dataclass(frozen=True)
class AttachedWeights:
    """Tensors over the shared bytes. They stay valid as long as any of them is referenced."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    reader: WeightSetReader
    loaded: bool
    """Whether this process copied the weights in, rather than finding them sealed."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its floating-point tensors; None where each has its own."""
        named = getattr(torch, self.metadata.get("dtype", ""), None)
        return named if isinstance(named, torch.dtype) else None

    @property
    def num_bytes(self) -> int:
        """The segment's size, and that of files mapped beside it."""
        return self.reader.handle.num_bytes + sum(file.num_bytes for file in self.reader.files)

    @property
    def offloaded(self) -> OffloadedLayers | None:
        """Where the layers are that are not among its tensors."""
        return decoded(self.metadata)

    @property
    def facts(self) -> dict[str, str]:
        """What its metadata say of the model, wherever its layers are, and packed or not."""
        return {
            name: text for name, text in self.metadata.items() if name not in (OFFLOADED, PACKED)
        }

    def identity(self, computed_by: str | None) -> str:
        """What tells the keys and values of these weights from all others: the weights' bytes, as
        far as they have digests, and who computes, since each rounds and orders them in its own
        way."""
        known = hashlib.sha256(f"{self.reader.key} {computed_by} ".encode())
        for name, entry in sorted(self.reader.manifest.tensors.items()):
            known.update(f"{name} {entry.digest} ".encode())
        return known.hexdigest()


def attach_weights(
    memory: Client, path: Path | str, dtype: str = "auto"
) -> dict[str, torch.Tensor]:
    """Name → aliased, read-only tensor of the checkpoint at `path`.

    The first process to ask loads it; every other one attaches. `dtype` is "auto", "bfloat16",
    "float16" or "float32". Raises workers.errors.CheckpointError, allocator.AllocatorError.
    """
    return attach(memory, open_checkpoint(path, dtype)).tensors


def attach_served(
    memory: Client, key: str, on_progress: OnProgress | None = None
) -> AttachedWeights:
    """What the allocator has under this key, sealed, asleep or being loaded; the checkpoint's files
    are not looked at, unless they are what it maps. Raises UnknownWeightSet where it has nothing
    (any more), else as `attach_weights` does."""
    opened = memory.open_weight_set(key, None, on_wait=on_progress)
    if isinstance(opened, WeightSetWriter):
        opened.abandon()  # whoever loaded it has given up
        raise UnknownWeightSet(f"no weight set is called {key!r} any more")
    return _attached(opened, loaded=False)


def attach(
    memory: Client,
    checkpoint: Checkpoint,
    on_progress: OnProgress | None = None,
    *,
    map_files: bool = False,
    offloaded: OffloadedLayers | None = None,
    only: str = "",
) -> AttachedWeights:
    """As `attach_weights`, with what else the weight set tells. `map_files` maps the checkpoint's
    own files instead of copying them, where nothing in them needs converting: nothing is read at
    the start, but who changes such a file in place changes the weights of whoever serves them.
    `offloaded` layers stay in their files, and the set says where. With `only`, a key, what would
    be another set is not loaded.

    Raises as `attach_weights` does, and CheckpointChanged."""
    files = checkpoint.fingerprint()
    map_files = map_files and can_be_mapped(checkpoint)
    layout = "files" if map_files else "plain"
    fingerprint = {
        **files,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "layout": layout if offloaded is None else f"{layout} {offloaded.layout}",
        "format": str(FORMAT_VERSION),
        "names": f"transformers {importlib.metadata.version('transformers')}",  # its tables' names
    }
    key = weight_set_key(checkpoint.path, fingerprint)
    if only not in ("", key):
        raise CheckpointChanged(
            f"the weights that are served are no longer in the allocator's memory, and {key} at "
            f"{checkpoint.path} is not what they were made from: `onecopy reload` serves it"
        )
    opened = memory.open_weight_set(key, fingerprint, on_wait=on_progress)
    if isinstance(opened, WeightSetWriter):
        if map_files:
            return _attached(_map(opened, checkpoint), loaded=True)
        reader = _load(opened, checkpoint, files, offloaded, on_progress)
        return _attached(reader, loaded=True)
    return _attached(opened, loaded=False)


def _attached(reader: WeightSetReader, *, loaded: bool) -> AttachedWeights:
    return AttachedWeights(reader.tensors(), reader.manifest.metadata, reader, loaded)


def weight_set_key(path: Path, fingerprint: dict[str, str]) -> str:
    """Readable, and different for every checkpoint, dtype and layout."""
    text = json.dumps(fingerprint, sort_keys=True)
    return f"{path.name[:200]}@{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What lies beside the tensors: all that an instance must know to build the model. Beside the
    checkpoint's own files the "dtype" that they are served in, "" where each has its own."""
    dtype = "" if checkpoint.dtype is None else str(checkpoint.dtype).removeprefix("torch.")
    return {**checkpoint.metadata(), "dtype": dtype}


def can_be_mapped(checkpoint: Checkpoint) -> bool:
    """Whether every tensor lies in one piece in a file as it would be laid out."""
    for tensor in checkpoint.tensors():
        runs = checkpoint.stored_runs(tensor.name)
        if tensor.num_bytes and (len(runs) != 1 or runs[0].begin % tensor.dtype.itemsize):
            return False
    return True


def _map(writer: WeightSetWriter, checkpoint: Checkpoint) -> WeightSetReader:
    """Seal a segment that holds the manifest alone; the tensors are where they are."""
    with writer:
        plan = make_plan(checkpoint.tensors(), metadata_of(checkpoint))
        paths: dict[Path, int] = {}
        entries: dict[str, TensorEntry] = {}
        for name, entry in plan.manifest.tensors.items():
            runs = checkpoint.stored_runs(name)
            if not runs:
                entries[name] = msgspec.structs.replace(entry, offset=0)
                continue
            [stored] = runs
            segment = paths.setdefault(stored.file.resolve(), len(paths) + 1)
            entries[name] = msgspec.structs.replace(entry, offset=stored.begin, segment=segment)
        manifest = msgspec.structs.replace(plan.manifest, tensors=entries)
        writer.reserve_uncommitted(manifest_bytes(manifest))
        return writer.seal(manifest, 0, [file_handle(path) for path in paths])


def _load(
    writer: WeightSetWriter,
    checkpoint: Checkpoint,
    files: dict[str, str],
    offloaded: OffloadedLayers | None,
    on_progress: OnProgress | None,
) -> WeightSetReader:
    with writer:  # an error on the way gives the election back
        tensors, metadata = checkpoint.tensors(), metadata_of(checkpoint)
        if offloaded is not None:
            gone = offloaded.names
            tensors = [tensor for tensor in tensors if tensor.name not in gone]
            metadata = {**metadata, OFFLOADED: offloaded.encoded()}
        plan = make_plan(tensors, metadata)
        mapping = writer.reserve_uncommitted(plan.segment_bytes)
        done = reported = 0

        def copied(num_bytes: int) -> None:
            nonlocal done, reported
            done += num_bytes
            if (done - reported) * _PROGRESS_STEP >= plan.num_bytes or done == plan.num_bytes:
                reported = done
                writer.progress(done)
                if on_progress is not None:
                    on_progress(done, plan.num_bytes, os.getpid())

        manifest = fill(writer, mapping, plan, checkpoint, copied)
        if checkpoint.fingerprint() != files:
            raise CheckpointCorrupt(
                f"{checkpoint.path} changed while it was read: start again once it is complete"
            )
        return writer.seal(manifest, plan.num_bytes)
