"""Layers whose tensors stay in files: where their bytes are, for who reads them when they are
needed.

Owns that list and its form beside the other tensors of a weight set. Invariants: what is read from
the files, run after run, is a tensor exactly as it is laid out; a file that has changed since is
refused by whoever opens it. Does not know when a layer is read, or where to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import torch

from workers.checkpoint.formats.checkpoint import Checkpoint, SourceTensor
from workers.config.model_file import file_identity
from workers.errors import CheckpointChanged, UnsupportedCheckpoint

if TYPE_CHECKING:
    from workers.skeleton.decoder import LayerNames

KEY: Final = "offloaded"
"""Of a weight set's metadata."""


class OffloadedFile(msgspec.Struct, frozen=True, array_like=True):
    """As it was when the weight set was made."""

    path: str
    identity: str

    def check(self) -> Path:
        """Where it is. Raises CheckpointChanged, and as `file_status` does."""
        path = Path(self.path)
        if file_identity(path) != self.identity:
            raise CheckpointChanged(
                f"{path} is not the file any more that the offloaded layers were found in: "
                "`onecopy reload` serves what it is now"
            )
        return path


class FileRun(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [begin, begin + num_bytes) of a file, which is counted in `OffloadedLayers.files`."""

    file: int
    begin: int
    num_bytes: int


class OffloadedTensor(msgspec.Struct, frozen=True, array_like=True):
    """Contiguous, of a dtype by torch's name; its runs one after the other are its bytes."""

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[FileRun, ...]

    @property
    def num_bytes(self) -> int:
        """Of all runs."""
        return sum(run.num_bytes for run in self.runs)


class OffloadedLayer(msgspec.Struct, frozen=True, array_like=True):
    """The tensors of layer `index`, by their names within it; in the checkpoint they begin with
    `prefix`."""

    index: int
    prefix: str
    tensors: dict[str, OffloadedTensor]


class OffloadedLayers(msgspec.Struct, frozen=True, array_like=True):
    """All that are not on the device, in order."""

    files: tuple[OffloadedFile, ...]
    layers: tuple[OffloadedLayer, ...]

    @property
    def names(self) -> frozenset[str]:
        """Of their tensors, as the checkpoint calls them."""
        return frozenset(layer.prefix + name for layer in self.layers for name in layer.tensors)

    @property
    def layout(self) -> str:
        """What tells weight sets of one checkpoint apart that have other layers on the device."""
        return "without layers " + ",".join(str(layer.index) for layer in self.layers)

    def encoded(self) -> str:
        """For the metadata of a weight set."""
        return msgspec.json.encode(self).decode()


def decoded(metadata: Mapping[str, str]) -> OffloadedLayers | None:
    """What `encoded` wrote there, None where all tensors are in the set."""
    text = metadata.get(KEY)
    return None if text is None else msgspec.json.decode(text, type=OffloadedLayers)


def find_layers(
    checkpoint: Checkpoint, layers: "Sequence[LayerNames]", indices: Sequence[int]
) -> OffloadedLayers:
    """Those layers of the checkpoint. Raises UnsupportedCheckpoint where one must be converted,
    CheckpointError."""
    sources = {one.name: one for one in checkpoint.tensors()}
    numbers: dict[Path, int] = {}
    found = []
    for index in indices:
        layer = layers[index]
        tensors = {
            name: _found(checkpoint, sources[layer.prefix + name], numbers) for name in layer.names
        }
        found.append(OffloadedLayer(index, layer.prefix, tensors))
    files = tuple(OffloadedFile(str(path), file_identity(path)) for path in numbers)
    return OffloadedLayers(files, tuple(found))


def _found(
    checkpoint: Checkpoint, source: SourceTensor, numbers: dict[Path, int]
) -> OffloadedTensor:
    runs = checkpoint.stored_runs(source.name)
    if not runs and source.num_bytes:
        raise UnsupportedCheckpoint(
            f"{source.name} of {checkpoint.path} is not stored as it is computed with, "
            f"{_name(source.dtype)}, so its layer can't be read piece by piece when it is needed: "
            "offload a safetensors checkpoint of that dtype, or choose its own with --dtype"
        )
    return OffloadedTensor(
        _name(source.dtype),
        source.shape,
        tuple(
            FileRun(numbers.setdefault(run.file.resolve(), len(numbers)), run.begin, run.num_bytes)
            for run in runs
        ),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
