"""Layers whose tensors stay in files: where their bytes are, for who reads them when they are
needed.

Owns that list and its form beside the other tensors of a weight set. Invariants: what is read from
the files, run after run, is a tensor exactly as it is laid out; a file that has changed since is
refused by whoever opens it. Does not know when a layer is read, or where to, or how one is
converted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from workers.checkpoint.formats.checkpoint import Checkpoint, SourceTensor, StoredBytes, digest
from workers.config.model_file import file_identity
from workers.errors import CheckpointChanged

if TYPE_CHECKING:
    from workers.skeleton.decoder import LayerNames

KEY: Final = "offloaded"
"""Of a weight set's metadata."""
FILE_ALIGNMENT: Final = 64
"""Of a tensor in a file of converted layers."""
FILE_BLOCK: Final = 1 << 16
"""Of a layer there: what any kernel can map."""


class OffloadedFile(msgspec.Struct, frozen=True, array_like=True):
    """As it was when the weight set was made."""

    path: str
    identity: str

    def check(self, identity: str) -> None:
        """Of what is there, or open, now. Raises CheckpointChanged."""
        if identity != self.identity:
            raise CheckpointChanged(
                f"{self.path} is not the file any more that the offloaded layers were found in: "
                "`onecopy reload` serves what it is now"
            )


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
        """What tells weight sets of one checkpoint apart that have other layers on the device, or
        know them in another file."""
        indices = ",".join(str(layer.index) for layer in self.layers)
        return f"without {digest(indices, *(file.identity for file in self.files))}"

    def encoded(self) -> str:
        """For the metadata of a weight set."""
        return msgspec.json.encode(self).decode()


def decoded(metadata: Mapping[str, str]) -> OffloadedLayers | None:
    """What `encoded` wrote there, None where all tensors are in the set."""
    text = metadata.get(KEY)
    return None if text is None else msgspec.json.decode(text, type=OffloadedLayers)


def find_layers(
    checkpoint: Checkpoint, layers: "Sequence[LayerNames]", indices: Sequence[int], converted: Path
) -> OffloadedLayers:
    """Those layers of the checkpoint. Of one that is not stored as it is computed with all tensors
    are in the file `converted`, one after the other; that file's identity is "" until it was
    written. Raises CheckpointError."""
    sources = {one.name: one for one in checkpoint.tensors()}
    numbers: dict[Path, int] = {}
    found = []
    end = 0
    for index in indices:
        layer = layers[index]
        own = {name: sources[layer.prefix + name] for name in layer.names}
        stored = {name: checkpoint.stored_runs(one.name) for name, one in own.items()}
        if all(runs or not own[name].num_bytes for name, runs in stored.items()):
            tensors = {name: _stored(own[name], stored[name], numbers) for name in own}
        else:
            end += -end % FILE_BLOCK
            file = numbers.setdefault(converted, len(numbers))
            tensors = {}
            for name, source in own.items():
                tensors[name] = _tensor(source, (FileRun(file, end, source.num_bytes),))
                end += -(-source.num_bytes // FILE_ALIGNMENT) * FILE_ALIGNMENT
        found.append(OffloadedLayer(index, layer.prefix, tensors))
    files = tuple(
        OffloadedFile(str(path), "" if path == converted else file_identity(path))
        for path in numbers
    )
    return OffloadedLayers(files, tuple(found))


def _stored(
    source: SourceTensor, runs: Sequence[StoredBytes], numbers: dict[Path, int]
) -> OffloadedTensor:
    files = [numbers.setdefault(run.file.resolve(), len(numbers)) for run in runs]
    return _tensor(
        source,
        tuple(
            FileRun(file, run.begin, run.num_bytes) for file, run in zip(files, runs, strict=True)
        ),
    )


def _tensor(source: SourceTensor, runs: tuple[FileRun, ...]) -> OffloadedTensor:
    return OffloadedTensor(str(source.dtype).removeprefix("torch."), source.shape, runs)
