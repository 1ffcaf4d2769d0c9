"""Hugging Face folders: config.json and *.safetensors, read straight into shared memory.

Owns the byte layout of the format: 8 bytes of header length (little-endian), a JSON header, then
the tensors, without gaps (https://github.com/huggingface/safetensors, "Format"). Its library maps
or copies whole tensors into private memory; here the bytes go from the file into the segment.
Invariant: nothing a header says is believed before it was checked against the file's size.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from workers.checkpoint.formats.checkpoint import (
    SCRATCH_BYTES,
    OnCopied,
    SourceTensor,
    StoredBytes,
    digest,
)
from workers.checkpoint.formats.parameters import Parameter, Run, as_stored, parameters_of
from workers.checkpoint.formats.sentence_files import sentence_files
from workers.config.architecture import check_config
from workers.config.encoder_settings import task_of
from workers.config.ends import end_tokens
from workers.config.model_file import file_identity, opened, read_file, read_json
from workers.errors import (
    CheckpointCorrupt,
    CheckpointMismatch,
    CheckpointNotFound,
    UnsupportedCheckpoint,
)

MAX_HEADER_BYTES: Final = 100_000_000
MAX_ELEMENTS: Final = 1 << 60
MAX_NAME_CHARS: Final = 1024
MAX_TENSORS: Final = 1 << 18
"""Of a file. The largest models there are, with experts stored one by one, have some 150,000."""
_MAX_INDEX_BYTES: Final = 64 << 20
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class _Stored:
    """A tensor's place: bytes [begin, end) of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsCheckpoint:
    """A folder with config.json and one or more .safetensors files."""

    def __init__(self, path: Path, dtype: torch.dtype | None):
        self.path = path
        config_file = path / "config.json"
        if not os.path.lexists(config_file):
            raise CheckpointNotFound(
                f"{path} holds no config.json: give a Hugging Face model folder, or a .gguf file"
            )
        self._config = read_json(config_file)
        check_config(self._config, str(config_file))
        if quantization := self._config.get("quantization_config"):
            known = quantization if isinstance(quantization, dict) else {}
            method = str(known.get("quant_method", "unknown"))[:80]
            raise UnsupportedCheckpoint(
                f"{path} is quantized ({method}), which can't be served yet: give the unquantized "
                "checkpoint, or a GGUF file"
            )
        self.dtype = dtype or _configured_dtype(self._config)
        self._files = _weight_files(path)
        self._sentence = sentence_files(path)

    def fingerprint(self) -> dict[str, str]:
        """File identities and headers; the weights themselves are not read."""
        files = [
            f"{file.name}:{file_identity(file)}:{hashlib.sha256(_read_header(file)[0]).hexdigest()}"
            for file in self._files
        ]
        return {
            "kind": "safetensors",
            "config": digest(*self._settings()),
            "files": digest(*files),
        }

    def metadata(self) -> dict[str, str]:
        """config.json, and what sentence-transformers wrote."""
        found = {"config": msgspec.json.encode(self._config).decode()}
        if self._sentence is not None:
            found["sentence"] = msgspec.json.encode(self._sentence).decode()
        return found

    def eos_token_ids(self) -> tuple[int, ...] | None:
        """Those of generation_config.json."""
        generation = self.path / "generation_config.json"
        if not os.path.lexists(generation):
            return None
        return end_tokens(read_json(generation).get("eos_token_id"), str(generation))

    def _settings(self) -> list[str]:
        """What changes the results of the same tensors."""
        known = [self._config] if self._sentence is None else [self._config, self._sentence]
        return [msgspec.json.encode(one, order="sorted").decode() for one in known]

    def tensors(self) -> list[SourceTensor]:
        """In file order, under the names of transformers. Raises CheckpointCorrupt where a header
        and its file do not agree, CheckpointMismatch where tensors do not fit together."""
        return [
            SourceTensor(one.name, one.shape, self._laid_out(one))
            for one in self._parameters().values()
        ]

    def stored_runs(self, name: str) -> tuple[StoredBytes, ...]:
        """See `Checkpoint`."""
        parameter = self._parameters()[name]
        dtype = self._laid_out(parameter)
        runs = []
        for run in parameter.runs:
            stored = self._stored()[run.source]
            if stored.dtype != dtype:
                return ()
            if run.end > run.begin:
                begin = stored.begin + run.begin * dtype.itemsize
                runs.append(StoredBytes(stored.file, begin, (run.end - run.begin) * dtype.itemsize))
        return tuple(runs)

    def copy_into(self, name: str, out: torch.Tensor, on_copied: OnCopied) -> None:
        """Bytes go from the files into `out`; a cast goes through a small scratch buffer."""
        flat, start = out.view(-1), 0
        for run in self._parameters()[name].runs:
            length = run.end - run.begin
            self._copy_run(run, flat[start : start + length], on_copied)
            start += length

    def _copy_run(self, run: Run, out: torch.Tensor, on_copied: OnCopied) -> None:
        stored = self._stored()[run.source]
        begin = stored.begin + run.begin * stored.dtype.itemsize
        if stored.dtype == out.dtype and out.device.type == "cpu":
            _read_into(stored.file, begin, out.view(torch.uint8), on_copied)
            return
        step = SCRATCH_BYTES // stored.dtype.itemsize
        scratch = torch.empty(min(step, out.numel()), dtype=stored.dtype)
        for start in range(0, out.numel(), step):
            part = scratch[: min(step, out.numel() - start)]
            part_begin = begin + start * stored.dtype.itemsize
            _read_into(stored.file, part_begin, part.view(torch.uint8), _ignore)
            out[start : start + part.numel()].copy_(part)
            on_copied(part.numel() * out.dtype.itemsize)

    def _laid_out(self, parameter: Parameter) -> torch.dtype:
        stored = {self._stored()[run.source].dtype for run in parameter.runs}
        if all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in stored):
            if parameter.keeps_fp32:
                return torch.float32
            if self.dtype is not None:
                return self.dtype
        if len(stored) != 1:
            raise CheckpointMismatch(
                f"{self.path}: the tensors that make up {parameter.name} are of different dtypes"
            )
        return stored.pop()

    def _parameters(self) -> dict[str, Parameter]:
        if not hasattr(self, "_named"):
            shapes = {name: stored.shape for name, stored in self._stored().items()}
            if task_of(self.metadata()) == "generate":
                found = parameters_of(self._config, shapes, self.dtype)
            else:  # who binds them knows how
                found = [as_stored(name, shape) for name, shape in shapes.items()]
            self._named = {one.name: one for one in found}
        return self._named

    def _stored(self) -> dict[str, _Stored]:
        if not hasattr(self, "_tensors"):
            found: dict[str, _Stored] = {}
            for file in self._files:
                for name, stored in _read_tensors(file).items():
                    if name in found:
                        raise CheckpointCorrupt(
                            f"{file} holds {name!r}, as {found[name].file} does"
                        )
                    found[name] = stored
            if not found:
                raise CheckpointCorrupt(f"{self.path} holds no tensors: download it again")
            self._tensors = found
        return self._tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
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
    if os.path.lexists(usual := folder / "model.safetensors"):
        return [usual]  # what lies beside it is an adapter, or the same model in another layout
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


def _read_header(file: Path) -> tuple[bytes, int, int]:
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


def _read_tensors(file: Path) -> dict[str, _Stored]:
    text, data_start, size = _read_header(file)
    try:
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{file} has a damaged header: {error}") from error
    found: dict[str, _Stored] = {}
    expected = 0
    if max(map(len, entries), default=0) > MAX_NAME_CHARS:
        raise CheckpointCorrupt(f"{file} holds a tensor whose name has no end")
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in _DTYPES:
            raise UnsupportedCheckpoint(f"{file}: {name!r} has the unknown dtype {entry.dtype!r}")
        dtype = _DTYPES[entry.dtype]
        if min(entry.shape, default=0) < 0:
            raise CheckpointCorrupt(f"{file}: {name!r} has a negative size")
        # Also where a size of 0 hides the others: torch can't hold their product.
        if math.prod(max(length, 1) for length in entry.shape) > MAX_ELEMENTS:
            raise CheckpointCorrupt(f"{file}: {name!r} has impossible sizes")
        num_bytes = dtype.itemsize
        for length in entry.shape:
            num_bytes *= length
        if begin != expected or end - begin != num_bytes:
            raise CheckpointCorrupt(
                f"{file}: the offsets of {name!r} overlap another tensor's, leave a gap or do not "
                "fit its shape"
            )
        expected = end
        found[name] = _Stored(file, dtype, entry.shape, data_start + begin, data_start + end)
    if data_start + expected != size:
        raise CheckpointCorrupt(
            f"{file} is truncated or damaged: its header describes {data_start + expected} bytes, "
            f"it has {size}. Download it again."
        )
    return found


def _configured_dtype(config: dict[str, Any]) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _read_into(file: Path, begin: int, out: torch.Tensor, on_copied: OnCopied) -> None:
    """Fill `out` # [num_bytes] uint8 from the file, a bounded piece a system call."""
    target = memoryview(out.numpy())  # type: ignore[arg-type]  # numpy 2 arrays are buffers
    done = 0
    with opened(file) as descriptor:
        while done < len(target):
            piece = target[done : done + SCRATCH_BYTES]
            count = os.preadv(descriptor, [piece], begin + done)
            if count == 0:
                raise CheckpointCorrupt(f"{file} became shorter while it was read")
            done += count
            on_copied(count)


def _ignore(_num_bytes: int) -> None:
    """A cast reports what it wrote, not what it read."""
