"""The headers of GGUF files: what they say, and where their tensors lie, in one file or in several.

Owns the way to the parts of a model that was split. Invariants: what a header claims to hold is
bounded before it is read; a header that can be read is returned whole, and anything else that a
damaged file makes the library raise is told as CheckpointCorrupt. Does not know what keys mean.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFReader, GGUFValueType

from workers.config.gguf_parts import parts_of
from workers.config.model_file import file_status, unreadable
from workers.errors import CheckpointCorrupt, UnsupportedCheckpoint, WorkerError

_LONG_STRINGS: Final = 64
_LONG_NUMBERS: Final = 1 << 10
"""No more layers than that have a value each."""
_MAX_FIELDS: Final = 1 << 14
_MAX_TENSORS: Final = 1 << 16
_MAX_ARRAY: Final = 1 << 22
"""More than any vocabulary, and its merges, have."""


class HeaderReader(GGUFReader):  # type: ignore[misc]
    """GGUFReader without the tokenizer: it builds a numpy array for each of 49,152 token strings,
    which takes 2.7 s where skipping them takes 30 ms, and a tokenizer is the server's business.
    What a header claims to hold is bounded before it is read."""

    def _build_fields(self, offs: int, count: int) -> int:
        _check_count(count, _MAX_FIELDS, "fields")
        return int(super()._build_fields(offs, count))

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[Any]]:
        _check_count(count, _MAX_TENSORS, "tensors")
        found: tuple[int, list[Any]] = super()._build_tensor_info(offs, count)
        return found

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], Any, Any]:
        if raw_type == GGUFValueType.ARRAY:
            item = int(self._get(orig_offs, np.uint32)[0])
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            skipped = [GGUFValueType.ARRAY]
            _check_count(count, _MAX_ARRAY, "entries of one field")
            if item == GGUFValueType.ARRAY:
                raise ValueError("it holds arrays of arrays, which no model's metadata has")
            if count > _LONG_STRINGS and item == GGUFValueType.STRING:
                return self._skip_strings(orig_offs + 12, count) - orig_offs, [], [], skipped
            scalar = self.gguf_scalar_to_np.get(GGUFValueType(item))
            if count > _LONG_NUMBERS and scalar:
                return 12 + count * np.dtype(scalar).itemsize, [], [], skipped
        parts: tuple[int, list[Any], Any, Any] = super()._get_field_parts(orig_offs, raw_type)
        return parts

    def _skip_strings(self, offset: int, count: int) -> int:
        length_at = struct.Struct("<Q").unpack_from
        view = memoryview(self.data)
        for _ in range(count):  # each step goes 8 bytes on at least: the file's end bounds it
            offset += 8 + int(length_at(view, offset)[0])
        return offset


def _check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"it claims to hold {int(count):,} {what}")


class Header:
    """Of a model in one file, or in the parts that the first of them names."""

    def __init__(self, path: Path):
        """Raises CheckpointNotFound, CheckpointCorrupt, UnsupportedCheckpoint."""
        self.path = path
        first = _read(path)
        self._fields = first.fields
        self.tensors: dict[str, Any] = {}
        """By their names, as the library describes them: shape, type, data."""
        self.file_of: dict[str, Path] = {}
        """In which of the parts each tensor is."""
        count = int(self.get("split.count") or 1)
        files = parts_of(path)
        if int(self.get("split.no") or 0) != 0:
            raise UnsupportedCheckpoint(
                f"{path} is part {int(self.get('split.no')) + 1} of {count} of a split model: give "
                "the first part"
            )
        if len(files) != count:
            raise UnsupportedCheckpoint(
                f"{path} is the first of {count} parts of a split model, but is not called so: "
                f"name the parts NAME-00001-of-{count:05d}.gguf and so on, as llama-gguf-split does"
                if count > 1
                else f"{path} is called one of {len(files)} parts, and holds a whole model: "
                "rename it"
            )
        for number, file in enumerate(files):
            reader = first if number == 0 else _read(file)
            if number and int(_contents(reader.get_field("split.no")) or 0) != number:
                raise CheckpointCorrupt(f"{file} is not part {number + 1} of {path}: copy it anew")
            for tensor in reader.tensors:
                if tensor.name in self.tensors:
                    raise CheckpointCorrupt(f"{file} holds {tensor.name} a second time")
                self.tensors[tensor.name] = tensor
                self.file_of[tensor.name] = file
        total = self.get("split.tensors.count")
        if total is not None and int(total) != len(self.tensors):
            raise CheckpointCorrupt(
                f"the parts of {path} hold {len(self.tensors)} tensors instead of {int(total)}: "
                "download them again"
            )

    def keys(self) -> Iterator[str]:
        """All that it says something of."""
        return iter(self._fields.keys())

    def get(self, key: str) -> Any:
        """Numbers, texts and lists of them; None where it says nothing."""
        with read_by_others(f"{self.path} has damaged metadata"):
            return _contents(self._fields.get(key))


def _read(file: Path) -> Any:
    file_status(file)
    with read_by_others(f"{file} is truncated, damaged or no GGUF file; download it again"):
        try:
            return HeaderReader(file)
        except OSError as error:
            raise unreadable(file, error) from error


def _contents(field: Any) -> Any:
    return None if field is None else _plain(field.contents())


def _plain(value: Any) -> Any:
    """numpy scalars and arrays as what JSON can hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    return value


@contextlib.contextmanager
def read_by_others(what: str) -> Iterator[None]:
    """Libraries read the file, which do not say what they raise where it is damaged. It is told as
    CheckpointCorrupt; errors of this room as they are."""
    try:
        yield
    except WorkerError:
        raise
    except Exception as error:
        raise CheckpointCorrupt(f"{what}: {error}") from error
