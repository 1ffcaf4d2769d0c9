"""Hugging Face folders: config.json and *.safetensors, read straight into shared memory.

Owns the way from a folder's stored tensors (`workers/config/safetensors_file.py`) to those of the
architecture. The format's own library maps or copies whole tensors into private memory; here the
bytes go from the file into the segment. Invariant: a tensor is read by pieces of a bounded size.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
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
from workers.checkpoint.formats.expanded import Expanded, expand
from workers.checkpoint.formats.packed_levels import Packed, packed
from workers.checkpoint.formats.parameters import Parameter, Run, as_stored, parameters_of
from workers.checkpoint.formats.sentence_files import sentence_files
from workers.config.architecture import check_config
from workers.config.encoder_settings import task_of
from workers.config.ends import end_tokens
from workers.config.model_file import file_identity, opened, read_json
from workers.config.quantization import (
    QUANTIZATION_KEYS,
    SIDE_FILES,
    StoredLevels,
    method_of_tensors,
    named_method,
    stored_levels,
)
from workers.config.safetensors_file import read_header, read_tensors, weight_files
from workers.errors import (
    CheckpointCorrupt,
    CheckpointMismatch,
    CheckpointNotFound,
    UnsupportedCheckpoint,
)
from workers.packed_format import METADATA, encoded
from workers.skeleton.packed import can_be_packed

log = logging.getLogger("onecopy.instance")

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


@dataclass(frozen=True)
class _Stored:
    """A tensor's place: bytes [begin, end) of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsCheckpoint:
    """A folder with config.json and one or more .safetensors files. With `packs`, levels of a
    quantized one that can be are laid out as packed weights."""

    def __init__(self, path: Path, dtype: torch.dtype | None, *, packs: bool = False):
        self.path = path
        config_file = path / "config.json"
        if not os.path.lexists(config_file):
            raise CheckpointNotFound(
                f"{path} holds no config.json: give a Hugging Face model folder, or a .gguf file"
            )
        self._said = read_json(config_file)
        check_config(self._said, str(config_file))
        self._levels = stored_levels(self._said)
        if self._levels is None:
            self._refuse_quantized(named_method(self._said) or _method_of_side_files(path))
        self._config = {
            name: value for name, value in self._said.items() if name not in QUANTIZATION_KEYS
        }
        """Of the whole weights."""
        self.dtype = dtype or _configured_dtype(self._config)
        self._packs = packs and self._levels is not None
        if self._packs and dtype is None and self.dtype != torch.float32:
            self.dtype = torch.bfloat16  # what is computed beside packed weights
        self._packed: dict[str, Packed] = {}
        self._files = weight_files(path)
        self._sentence = sentence_files(path)

    def _refuse_quantized(self, method: str | None) -> None:
        if method is not None:
            raise UnsupportedCheckpoint(
                f"{self.path} is quantized ({method}), which can't be served yet: give the "
                "unquantized checkpoint, a GGUF file, or one of compressed-tensors, GPTQ or AWQ "
                "in 4 or 8 bits"
            )

    def fingerprint(self) -> dict[str, str]:
        """File identities and headers; the weights themselves are not read."""
        files = [
            f"{file.name}:{file_identity(file)}:{hashlib.sha256(read_header(file)[0]).hexdigest()}"
            for file in self._files
        ]
        return {
            "kind": "safetensors",
            "config": digest(*self._settings()),
            "files": digest(*files),
            **({"weights": "packed"} if self._packs else {}),
        }

    def metadata(self) -> dict[str, str]:
        """config.json, what sentence-transformers wrote, and how tensors are packed, if some
        are."""
        found = self._described()
        if self._packs:
            self._parameters()
        if self._packed:
            found[METADATA] = encoded({name: one.layout for name, one in self._packed.items()})
        return found

    def _described(self) -> dict[str, str]:
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
        known = [self._said] if self._sentence is None else [self._said, self._sentence]
        return [msgspec.json.encode(one, order="sorted").decode() for one in known]

    def tensors(self) -> list[SourceTensor]:
        """In file order, under the names of transformers. Raises CheckpointCorrupt where a header
        and its file do not agree, CheckpointMismatch where tensors do not fit together."""
        return [self._source(one) for one in self._parameters().values()]

    def _source(self, one: Parameter) -> SourceTensor:
        if (whole := self._packed.get(one.name)) is None:
            return SourceTensor(one.name, one.shape, self._laid_out(one))
        return SourceTensor(one.name, whole.layout.shape(*whole.weight.shape), torch.uint8)

    def stored_runs(self, name: str) -> tuple[StoredBytes, ...]:
        """See `Checkpoint`."""
        parameter = self._parameters()[name]
        dtype = self._laid_out(parameter)
        runs = []
        for run in parameter.runs:
            stored = self._stored()[run.source]
            if isinstance(stored, Expanded) or stored.dtype != dtype:
                return ()
            if run.end > run.begin:
                begin = stored.begin + run.begin * dtype.itemsize
                runs.append(StoredBytes(stored.file, begin, (run.end - run.begin) * dtype.itemsize))
        return tuple(runs)

    def copy_into(self, name: str, out: torch.Tensor, on_copied: OnCopied) -> None:
        """Bytes go from the files into `out`; a cast goes through a small scratch buffer."""
        parameter = self._parameters()[name]
        if name in self._packed:
            self._packed[name].copy(out, on_copied)
            return
        flat, start = out.view(-1), 0
        for run in parameter.runs:
            length = run.end - run.begin
            self._copy_run(run, flat[start : start + length], on_copied)
            start += length

    def _copy_run(self, run: Run, out: torch.Tensor, on_copied: OnCopied) -> None:
        stored = self._stored()[run.source]
        if isinstance(stored, Expanded):
            stored.copy(run.begin, out, on_copied)
            return
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
            if task_of(self._described()) == "generate":
                found = self._without_empty_biases(parameters_of(self._config, shapes, self.dtype))
                if self._packs and self.dtype == torch.bfloat16:
                    self._packed = self._packable(found)
            else:  # who binds them knows how
                found = [as_stored(name, shape) for name, shape in shapes.items()]
            self._named = {one.name: one for one in found}
            self._tell()
        return self._named

    def _packable(self, parameters: Sequence[Parameter]) -> dict[str, Packed]:
        """Linears and embeddings, each of one stored weight."""
        from workers.skeleton.decoder import skeleton

        places = can_be_packed(skeleton(self._config, torch.bfloat16))
        found: dict[str, Packed] = {}
        for one in parameters:
            whole = self._stored()[one.runs[0].source] if len(one.runs) == 1 else None
            if one.name not in places or not isinstance(whole, Expanded):
                continue
            if whole.shape == one.shape and (made := packed(whole)) is not None:
                found[one.name] = made
        return found

    def _tell(self) -> None:
        """Say what becomes of quantized weights."""
        num_levels = sum(isinstance(one, Expanded) for one in self._stored().values())
        if self._levels is None or not num_levels:
            return
        told = f"{self.path} is quantized ({self._levels.told})"
        if self._packed:
            log.info("%s: %d weights stay packed", told, len(self._packed))
        if num_levels > len(self._packed):
            log.info(
                *("%s: %d weights are expanded to %s while they are read", told),
                *(num_levels - len(self._packed), _dtype_text(self.dtype or torch.bfloat16)),
            )

    def _without_empty_biases(self, found: list[Parameter]) -> list[Parameter]:
        """GPTQ's tools write a bias of zeros for each linear that has none."""
        if self._levels is None or self._levels.layout != "gptq":
            return found
        from workers.skeleton.decoder import skeleton

        weights = {name for name, one in self._stored().items() if isinstance(one, Expanded)}
        slots = skeleton(self._config, self.dtype or torch.float32).state_dict()

        def is_empty(one: Parameter) -> bool:
            module, _, ending = one.name.rpartition(".")
            if ending != "bias" or one.name in slots or f"{module}.weight" not in weights:
                return False
            bias = torch.empty(one.shape, dtype=torch.float32)
            self._copy_run(one.runs[0], bias.view(-1), _ignore)
            return not bias.any()

        return [one for one in found if not is_empty(one)]

    def _stored(self) -> Mapping[str, "_Stored | Expanded"]:
        if not hasattr(self, "_tensors"):
            found: dict[str, _Stored] = {}
            for file in self._files:
                for name, one in read_tensors(file).items():
                    if name in found:
                        raise CheckpointCorrupt(
                            f"{file} holds {name!r}, as {found[name].file} does"
                        )
                    found[name] = _Stored(file, _DTYPES[one.dtype], one.shape, one.begin, one.end)
            if not found:
                raise CheckpointCorrupt(f"{self.path} holds no tensors: download it again")
            if self._levels is None:
                self._refuse_quantized(method_of_tensors(found))
                self._tensors: Mapping[str, _Stored | Expanded] = found
            else:
                self._tensors = self._whole_weights(found, self._levels)
        return self._tensors

    def _whole_weights(
        self, stored: Mapping[str, _Stored], how: StoredLevels
    ) -> dict[str, "_Stored | Expanded"]:
        """In the order of the files, each weight where its levels are."""

        def read(name: str, begin: int, out: torch.Tensor) -> None:
            one = stored[name]
            start = one.begin + begin * one.dtype.itemsize
            _read_into(one.file, start, out.view(-1).view(torch.uint8), _ignore)

        expanded, used = expand(stored, how, read)
        if not expanded:
            self._refuse_quantized(how.told)
        at = {one.parts[0]: one for one in expanded.values()}
        found: dict[str, _Stored | Expanded] = {}
        for name, tensor in stored.items():
            if name in at:
                found[at[name].name] = at[name]
            elif name not in used:
                found[name] = tensor
        return found


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _method_of_side_files(folder: Path) -> str | None:
    there = (method for name, method in SIDE_FILES.items() if os.path.lexists(folder / name))
    return next(there, None)


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
