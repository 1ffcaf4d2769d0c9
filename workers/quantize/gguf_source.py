"""A GGUF file as what is quantized: blocks become bfloat16, some rows at a time.

Owns the reading. Invariants: what comes out is what a server of the file computes with; a piece
takes memory of its own size and of a few blocks; the file is not mapped. How rows make up
parameters, another process has said (`workers/quantize/gguf_rows.py`), since that takes torch.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import msgspec
import numpy as np

from allocator import module_command, module_environment
from workers.config.gguf_parts import parts_of
from workers.config.model_file import file_identity, identity_of, opened, unreadable
from workers.errors import (
    CheckpointChanged,
    CheckpointCorrupt,
    UnsupportedCheckpoint,
)
from workers.quantize.gguf_rows import Described, GGUFRows, Rows, StoredRows
from workers.quantize.plan import Input

_STEP_ELEMENTS: Final = 1 << 17
"""As many become numbers at a time: what dequantizing takes beside them is several times that."""
_NOT_FOR_A_FOLDER: Final = frozenset({"special_ids.json"})


class GGUFSource:
    """One .gguf file, or the first of several; `tokenizer` is a folder with what goes along."""

    def __init__(self, path: Path, tokenizer: Path | None):
        """Seconds, most of them the other process's imports. Raises CheckpointError."""
        self.path = path
        self._tokenizer = tokenizer
        said = _described(path)
        self.config: dict[str, Any] = said.config
        self._tensors = said.tensors
        self._orders = [np.asarray(one, np.int64) for one in said.orders]
        self._parameters = {one.name: one for one in said.parameters}
        self._identities = {str(file): file_identity(file) for file in parts_of(path)}
        self._descriptors: dict[str, int] = {}
        self._opened = contextlib.ExitStack()

    def tensors(self) -> list[Input]:
        """See Source."""
        return [Input(one.name, "BF16", one.shape) for one in self._parameters.values()]

    def identity(self) -> dict[str, str]:
        """See Source."""
        return {file.name: file_identity(file) for file in parts_of(self.path)}

    def open(self) -> None:
        """See Source."""
        for file, identity in self._identities.items():
            descriptor = self._opened.enter_context(opened(Path(file)))
            if identity_of(os.fstat(descriptor)) != identity:
                raise CheckpointChanged(f"{file} has changed while it was looked at: try again")
            self._descriptors[file] = descriptor

    def read(self, name: str, begin: int, out: memoryview) -> None:
        """See Source. Bytes are those of bfloat16, so all are at even places."""
        one = self._parameters[name]
        elements = np.frombuffer(out, np.uint16)
        first = begin // 2
        if one.constant is not None:
            elements[:] = _rounded(np.full(len(elements), one.constant, np.float32))
            return
        if not one.rows:
            raise UnsupportedCheckpoint(
                f"{self.path}: {name} is not made of whole rows, and can't be written from a GGUF "
                "file: give the safetensors checkpoint"
            )
        length = one.shape[-1] if len(one.shape) > 1 else 1
        done = 0
        while done < len(elements):
            row, column = divmod(first + done, length)
            # The rest of a row that was begun, or some whole ones.
            if column or len(elements) - done < length:
                count = min(length - column, len(elements) - done, _STEP_ELEMENTS)
                values = self._part(one, row, column, count)
            else:
                rows = min((len(elements) - done) // length, max(1, _STEP_ELEMENTS // length))
                values = self._rows(one, row, rows, length)
                count = len(values)
            if one.subtract:
                values = values - np.float32(one.subtract)
            elements[done : done + count] = _rounded(values)
            done += count

    def side_files(self) -> Iterator[tuple[str, Path]]:
        """See Source: the tokenizer's."""
        if self._tokenizer is None:
            return
        for file in sorted(self._tokenizer.rglob("*")):
            name = file.relative_to(self._tokenizer)
            if file.is_file() and str(name) not in _NOT_FOR_A_FOLDER:
                yield str(name), file

    def close(self) -> None:
        """See Source."""
        self._descriptors.clear()
        self._opened.close()

    def _stored_row(self, one: Described, row: int) -> tuple[StoredRows, int]:
        """Where a row of the parameter is."""
        for rows in one.rows:
            if row < rows.count:
                at = row if rows.order < 0 else int(self._orders[rows.order][row])
                return self._tensors[rows.tensor], rows.begin + at
            row -= rows.count
        raise CheckpointCorrupt(f"{self.path}: {one.name} has fewer rows than its shape says")

    def _rows(self, one: Described, first: int, count: int, length: int) -> Any:
        """Whole ones, one after the other # [count * length] fp32."""
        found = []
        for rows in one.rows:
            last = min(first + count, rows.count)
            if first < last:
                found.append(self._rows_of(rows, first, last - first, length))
                count -= last - first
                first = last
            first -= rows.count
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _rows_of(self, rows: Rows, first: int, count: int, length: int) -> Any:
        """Of one tensor. Where their order is another, all that lie between them are read, too, if
        these are not many more."""
        stored, begin = self._tensors[rows.tensor], rows.begin
        if rows.order < 0:
            return self._elements(stored, (begin + first) * length, count * length)
        wanted = self._orders[rows.order][first : first + count]
        least, most = int(wanted.min()), int(wanted.max()) + 1
        if most - least > 2 * count:
            each = [self._elements(stored, (begin + int(at)) * length, length) for at in wanted]
            return np.concatenate(each)
        between = self._elements(stored, (begin + least) * length, (most - least) * length)
        return between.reshape(-1, length)[wanted - least].reshape(-1)

    def _part(self, one: Described, row: int, column: int, count: int) -> Any:
        stored, at = self._stored_row(one, row)
        length = one.shape[-1] if len(one.shape) > 1 else 1
        return self._elements(stored, at * length + column, count)

    def _elements(self, stored: StoredRows, begin: int, count: int) -> Any:
        """Elements of a tensor, row-major; a row is a whole number of blocks."""
        kind = gguf.GGMLQuantizationType(stored.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        first, last = begin // block, -(-(begin + count) // block)
        data = np.empty((last - first) * block_bytes, np.uint8)
        descriptor = self._descriptors[stored.file]
        _fill(descriptor, stored.offset + first * block_bytes, data.data, stored.file)
        try:
            values = gguf.dequantize(data.view(_FLOATS.get(kind, np.uint8)), kind)
        except NotImplementedError as error:
            raise UnsupportedCheckpoint(
                f"{self.path} holds blocks of type {kind.name}, which can't be dequantized: {error}"
            ) from error
        skipped = begin - first * block
        return np.asarray(values, np.float32).reshape(-1)[skipped : skipped + count]


_FLOATS: Final = {
    gguf.GGMLQuantizationType.F32: np.float32,
    gguf.GGMLQuantizationType.F16: np.float16,
}


def _described(path: Path) -> GGUFRows:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_WAIT_POLICY": "PASSIVE"}
    command = module_command("workers.quantize.gguf_rows", str(path))
    ended = subprocess.run(  # noqa: S603 - our own interpreter and module
        command,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=module_environment(**quiet),
        check=False,
    )
    words = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if ended.returncode == 1 and words:
        raise UnsupportedCheckpoint(words)
    try:
        return msgspec.json.decode(ended.stdout, type=GGUFRows)
    except msgspec.DecodeError as error:
        raise CheckpointCorrupt(
            f"reading the header of {path} ended with status {ended.returncode}: {words or error}"
        ) from error


def _fill(descriptor: int, begin: int, out: memoryview, file: str) -> None:
    done = 0
    try:
        while done < len(out):
            count = os.preadv(descriptor, [out[done:]], begin + done)
            if count == 0:
                raise CheckpointCorrupt(f"{file} became shorter while it was read")
            done += count
    except OSError as error:
        raise unreadable(Path(file), error) from error


def _rounded(values: Any) -> Any:
    """The bits of bfloat16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest.astype(np.uint16))
