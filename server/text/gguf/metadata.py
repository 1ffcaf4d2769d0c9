"""The part of a GGUF file's header that is about text, read once from front to back.

Owns the walk over the header. Invariants: no length in it is used before it was held against the
file's end, and what is kept is bounded by `MAX_ENTRIES`; the tensors behind it are never touched.
262,144 tokens with their scores take 0.2 s; the `gguf` package's reader makes an array of each and
takes 20. Does not know what the values mean.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from server.errors import ServerError
from workers import opened

MAX_FIELDS: Final = 1 << 14
MAX_ENTRIES: Final = 1 << 22
"""Of one array: more than any vocabulary, and its merges, have."""
MAX_TEXT_BYTES: Final = 4 << 20
"""Of one text, such as a template."""
_PREFIXES: Final = ("tokenizer.", "general.architecture", "general.name")

_TEXT: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""By GGUF's number of a type, the letter that `struct` and memoryview have for it."""


class GGUFDamaged(ServerError):
    """The header can't be read to its end."""

    code = "gguf_damaged"


def read_metadata(file: Path) -> dict[str, Any]:
    """What the file says under `tokenizer.`, and its architecture and name. Texts are str, arrays
    of texts lists of bytes, other arrays lists of numbers. Raises GGUFDamaged, CheckpointError."""
    with opened(file) as descriptor:
        try:
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file
            raise GGUFDamaged("it is empty") from error
        with mapped:
            try:
                return _Header(mapped).fields()
            except struct.error as error:
                raise GGUFDamaged("its header goes on beyond its end") from error


class _Header:
    def __init__(self, mapped: mmap.mmap):
        self._mapped = mapped
        self._at = 0

    def fields(self) -> dict[str, Any]:
        if self._bytes(4) != b"GGUF":
            raise GGUFDamaged("it does not begin as a GGUF file does")
        version = self._number("I")
        if version not in (2, 3):
            raise GGUFDamaged(
                f"it is of version {version}; 2 and 3, of little-endian machines, are read"
            )
        self._number("Q")  # of tensors
        num_fields = self._number("Q")
        if num_fields > MAX_FIELDS:
            raise GGUFDamaged(f"it claims to hold {num_fields:,} fields")
        found: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._text()
            kept = name.startswith(_PREFIXES)
            if name in found:
                raise GGUFDamaged(f"it says {name[:80]} twice")
            value = self._value(self._number("I"), name, kept)
            if kept:
                found[name] = value
        return found

    def _value(self, kind: int, name: str, kept: bool) -> Any:
        if kind == _TEXT:
            return self._text(MAX_TEXT_BYTES) if kept else self._bytes(self._number("Q"))
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise GGUFDamaged(f"{name[:80]} is of the unknown type {kind}")
        item, count = self._number("I"), self._number("Q")
        if count > MAX_ENTRIES:
            raise GGUFDamaged(f"{name[:80]} claims to hold {count:,} entries")
        if item == _TEXT:
            return self._texts(count, kept)
        if item not in _SCALARS:
            raise GGUFDamaged(f"{name[:80]} holds entries of the type {item}, which nobody reads")
        letter = _SCALARS[item]
        content = self._bytes(count * struct.calcsize(letter))
        return list(struct.unpack(f"<{count}{letter}", content)) if kept else None

    def _texts(self, count: int, kept: bool) -> list[bytes]:
        mapped, at, end = self._mapped, self._at, len(self._mapped)
        length_at: Callable[..., tuple[Any, ...]] = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):  # each goes 8 bytes on at least: the file's end bounds it
            start = at + 8
            at = start + length_at(mapped, at)[0]
            if at > end:
                raise GGUFDamaged("its header goes on beyond its end")
            if kept:
                found.append(mapped[start:at])
        self._at = at
        return found

    def _text(self, most: int = 1 << 16) -> str:
        length = self._number("Q")
        if length > most:
            raise GGUFDamaged(f"it claims to hold a text of {length:,} bytes")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise GGUFDamaged(f"a text in its header is no UTF-8: {error.reason}") from error

    def _number(self, letter: str) -> Any:
        one = struct.Struct("<" + letter)
        (value,) = one.unpack(self._bytes(one.size))
        return value

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._mapped):
            raise GGUFDamaged("its header goes on beyond its end")
        return self._mapped[start : self._at]
