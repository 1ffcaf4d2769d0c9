"""Files of safetensors: what their headers say, and which files a folder's weights are in.

Owns the byte layout of the format: 8 bytes of header length (little-endian), a JSON header, then
the tensors, without gaps (https://github.com/huggingface/safetensors, "Format"). Invariants:
nothing a header says is believed before it was checked against the file's size; no tensor is read.
Does not know what tensors are for, and torch is not needed to ask.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from workers.config.model_file import opened, read_file
from workers.errors import CheckpointCorrupt, CheckpointNotFound, UnsupportedCheckpoint

MAX_HEADER_BYTES: Final = 100_000_000
MAX_ELEMENTS: Final = 1 << 60
MAX_NAME_CHARS: Final = 1024
MAX_TENSORS: Final = 1 << 18
"""Of a file. The largest models there are, with experts stored one by one, have some 150,000."""
_MAX_INDEX_BYTES: Final = 64 << 20
_USUAL: Final = "model.safetensors"

ITEM_BYTES: Final[Mapping[str, int]] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Of an element, by the names that headers have for dtypes."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: bytes [begin, end) of the file."""

    file: Path
    dtype: str
    """As the header names it."""
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """One file comes before an index, which an earlier state of the model may have left, as
    transformers has it; unless the index names it with others."""
    index = folder / "model.safetensors.index.json"
    usual = folder / _USUAL
    if os.path.lexists(usual) and (not os.path.lexists(index) or not _names(index, _USUAL)):
        return [usual]  # what lies beside it is an adapter, or the same model in another layout
    if os.path.lexists(index):
        try:
            names = msgspec.json.decode(
                read_file(index, _MAX_INDEX_BYTES), type=_Index
            ).weight_map.values()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointCorrupt(
                f"{index} holds no weight_map from tensors to files: {error}"
            ) from error
        if not names or not all(name.endswith(".safetensors") for name in names):
            raise CheckpointCorrupt(f"{index} holds no weight_map from tensors to files")
        files = [folder / Path(name).name for name in sorted(set(names))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointNotFound(
                f"{index} names {len(missing)} files that are missing: {', '.join(missing[:5])}. "
                "Download the model again."
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if os.fsencode(file).decode(errors="ignore") != str(file):
            raise CheckpointNotFound(f"the name of {os.fsencode(file)!r} is no UTF-8: rename it")
    if files:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UnsupportedCheckpoint(
            f"{folder} holds pickled weights, which are never loaded because they can run code: "
            "convert them to safetensors"
        )
    raise CheckpointNotFound(f"{folder} holds no .safetensors file")


def _names(index: Path, file: str) -> bool:
    """Whether an index that can be read names the file."""
    try:
        found = msgspec.json.decode(read_file(index, _MAX_INDEX_BYTES), type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return file in found.weight_map.values()


def read_header(file: Path) -> tuple[bytes, int, int]:
    """The header's text, where the tensors begin, and the file's size."""
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        length_bytes = os.pread(descriptor, 8, 0)
        length = int.from_bytes(length_bytes, "little")
        if len(length_bytes) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointCorrupt(
                f"{file} is truncated or no safetensors file: its header should take {length} "
                f"bytes of {size}. Download it again."
            )
        text = os.pread(descriptor, length, 8)
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        raise UnsupportedCheckpoint(f"{file} holds more than {MAX_TENSORS:,} tensors")
    return text, 8 + length, size


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """By their names, in the order of the file. Raises CheckpointCorrupt, UnsupportedCheckpoint."""
    text, data_start, size = read_header(file)
    try:
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{file} has a damaged header: {error}") from error
    found: dict[str, StoredTensor] = {}
    expected = 0
    if max(map(len, entries), default=0) > MAX_NAME_CHARS:
        raise CheckpointCorrupt(f"{file} holds a tensor whose name has no end")
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in ITEM_BYTES:
            raise UnsupportedCheckpoint(f"{file}: {name!r} has the unknown dtype {entry.dtype!r}")
        if min(entry.shape, default=0) < 0:
            raise CheckpointCorrupt(f"{file}: {name!r} has a negative size")
        # Also where a size of 0 hides the others: torch can't hold their product.
        if math.prod(max(length, 1) for length in entry.shape) > MAX_ELEMENTS:
            raise CheckpointCorrupt(f"{file}: {name!r} has impossible sizes")
        num_bytes = ITEM_BYTES[entry.dtype]
        for length in entry.shape:
            num_bytes *= length
        if begin != expected or end - begin != num_bytes:
            raise CheckpointCorrupt(
                f"{file}: the offsets of {name!r} overlap another tensor's, leave a gap or do not "
                "fit its shape"
            )
        expected = end
        found[name] = StoredTensor(
            file, entry.dtype, entry.shape, data_start + begin, data_start + end
        )
    if data_start + expected != size:
        raise CheckpointCorrupt(
            f"{file} is truncated or damaged: its header describes {data_start + expected} bytes, "
            f"it has {size}. Download it again."
        )
    return found
