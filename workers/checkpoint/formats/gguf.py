"""GGUF files: header read in milliseconds, blocks turned piece by piece into what memory holds.

Owns the order of that: what the metadata say of the model (`gguf_config`), which rows make
up a parameter (`gguf_parameters`), and the step from ggml's blocks to numbers. Invariant: the
tensors that come out are those that the file was made of, rounded as it rounded them (tested with
files as llama.cpp's converter writes them). Knows nothing of where the tensors go.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch

from workers.checkpoint.formats.checkpoint import SCRATCH_BYTES, OnCopied, SourceTensor, StoredBytes
from workers.checkpoint.formats.gguf_blocks import packed_format, parts_of
from workers.checkpoint.formats.gguf_config import config_of
from workers.checkpoint.formats.gguf_file import Header, read_by_others
from workers.checkpoint.formats.gguf_metadata import Metadata
from workers.checkpoint.formats.gguf_parameters import Parameter, Piece, parameters_of
from workers.config.architecture import architecture_errors, check_config
from workers.config.ends import end_tokens
from workers.config.gguf_parts import parts_of as files_of
from workers.config.model_file import file_identity
from workers.errors import CheckpointCorrupt, UnsupportedCheckpoint
from workers.packed_format import METADATA, ROWS, PackedFormat, encoded, pack
from workers.skeleton.packed import can_be_packed

log = logging.getLogger(__name__)

_UNPACKED: Final = frozenset(
    {
        gguf.GGMLQuantizationType.F32,
        gguf.GGMLQuantizationType.F16,
        gguf.GGMLQuantizationType.BF16,
    }
)


class GGUFCheckpoint:
    """One .gguf file, or the first of several, laid out as the dense model that it was made of or,
    with `packs`, with the blocks that can be as packed weights."""

    def __init__(self, path: Path, dtype: torch.dtype | None, *, packs: bool = False):
        self.path = path
        self._packs = packs
        self._packed: dict[str, PackedFormat] = {}
        self.dtype: torch.dtype = dtype or torch.bfloat16
        self._opened: tuple[Header, Metadata, dict[str, Any]] | None = None
        self._named: dict[str, Parameter] = {}

    def fingerprint(self) -> dict[str, str]:
        """The files' identities; nothing of them is read."""
        files = [f"{file.name}:{file_identity(file)}" for file in files_of(self.path)]
        packed = {"weights": "packed"} if self._packs else {}
        return {"kind": "gguf", "files": "\n".join(files), **packed}

    def metadata(self) -> dict[str, str]:
        """The config that `transformers` would have of the model, as JSON; and how tensors are
        packed, if some are."""
        _, _, config = self._open()
        self._parameters()
        packed = {METADATA: encoded(self._packed)} if self._packed else {}
        return {"config": json.dumps(config), **packed}

    def eos_token_ids(self) -> tuple[int, ...] | None:
        """The config has them: there is no other file."""
        return None

    def tensors(self) -> list[SourceTensor]:
        """In file order, under the names of `transformers`."""
        return [self._laid_out(one) for one in self._parameters()]

    def _laid_out(self, one: Parameter) -> SourceTensor:
        layout = self._packed.get(one.name)
        if layout is None:
            return SourceTensor(one.name, one.shape, self.dtype)
        num_rows, width = one.shape
        return SourceTensor(one.name, layout.shape(num_rows, width), torch.uint8)

    def stored_runs(self, name: str) -> tuple[StoredBytes, ...]:
        """Every tensor is converted: blocks are dequantized, rows of some projections move."""
        return ()

    def copy_into(self, name: str, out: torch.Tensor, on_copied: OnCopied) -> None:
        """Dequantize to fp32 and cast, or pack, some rows at a time."""
        self._parameters()
        parameter = self._named[name]
        if name in self._packed:
            self._pack_into(parameter, self._packed[name], out, on_copied)
            return
        if parameter.constant is not None:
            out.fill_(parameter.constant)
            on_copied(out.numel() * out.dtype.itemsize)
        target = out.T if parameter.transposed else out.view(-1, *out.shape[-1:])
        if out.dim() < 2:
            target = out.view(-1, 1)
        for piece in parameter.pieces:
            self._copy_piece(piece, target, parameter.subtract, on_copied)

    def _copy_piece(
        self, piece: Piece, target: torch.Tensor, subtract: float, on_copied: OnCopied
    ) -> None:
        """`target` # [num_rows, row_length] of the parameter."""
        header, _, _ = self._open()
        source = header.tensors[piece.tensor]
        data = source.data
        if data.ndim == 1 or int(source.shape[0]) != target.shape[1]:
            # Each element of a vector is a row, or all are one: dimensions of 1 may be left out.
            data = self._dequantize(data, source.tensor_type).reshape(-1, target.shape[1])
            kind = gguf.GGMLQuantizationType.F32
        else:
            data, kind = data.reshape(-1, data.shape[-1]), source.tensor_type
        step = max(1, SCRATCH_BYTES // (4 * target.shape[1]))
        end = piece.begin + len(piece.rows)
        for start in range(piece.begin, end, step):
            stop = min(start + step, end)
            rows = torch.from_numpy(self._dequantize(data[start:stop], kind))
            if subtract:
                rows = rows - subtract
            to = piece.rows[start - piece.begin : stop - piece.begin]
            if to[-1] - to[0] == len(to) - 1 and (len(to) < 2 or bool((np.diff(to) == 1).all())):
                target[int(to[0]) : int(to[-1]) + 1].copy_(rows)
            else:
                target[torch.from_numpy(to)] = rows.to(target.dtype)
            on_copied(rows.numel() * target.dtype.itemsize)

    def _pack_into(
        self, parameter: Parameter, layout: PackedFormat, out: torch.Tensor, on_copied: OnCopied
    ) -> None:
        """`out` # [num_strips, strip_bytes]"""
        header, _, _ = self._open()
        num_rows, width = parameter.shape
        step = max(1, SCRATCH_BYTES // (ROWS * width)) * ROWS
        for start in range(0, num_rows, step):
            end = min(start + step, num_rows)
            rows: Any = None
            for piece in parameter.pieces:
                source = header.tensors[piece.tensor]
                data = source.data.reshape(-1, source.data.shape[-1])
                here = np.flatnonzero((piece.rows >= start) & (piece.rows < end))
                if rows is None:
                    rows = np.empty((end - start, data.shape[1]), np.uint8)
                with read_by_others(f"{self.path} is damaged"):
                    rows[piece.rows[here] - start] = data[piece.begin + here]
            parts = parts_of(source.tensor_type, rows)
            strips = pack(
                layout,
                torch.from_numpy(parts.integers),
                torch.from_numpy(parts.scales),
                None if parts.minima is None else torch.from_numpy(parts.minima),
            )
            first = start // ROWS
            out[first : first + len(strips)] = strips
            on_copied(strips.numel())

    def _dequantize(self, data: Any, kind: Any) -> Any:
        with read_by_others(f"{self.path} is damaged"):
            try:
                # The file is mapped read-only, and torch wants to know that it may write.
                return np.require(gguf.dequantize(data, kind), np.float32, ["C", "W"])
            except NotImplementedError as error:
                raise UnsupportedCheckpoint(
                    f"{self.path} holds blocks of type {kind.name}, which can't be dequantized: "
                    f"{error}"
                ) from error

    def _open(self) -> tuple[Header, Metadata, dict[str, Any]]:
        if self._opened is None:
            header = Header(self.path)
            with _said_of(self.path), read_by_others(f"{self.path} has damaged metadata"):
                said = self._metadata(header)
                config = config_of(said, self._reader_of(header, said))
                # GGUF has one word for each kind of end.
                eos = [header.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
                config["eos_token_id"] = list(end_tokens(eos, str(self.path)) or ())
            self._opened = header, said, config
        return self._opened

    def _metadata(self, header: Header) -> Metadata:
        architecture = header.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointCorrupt("it does not name its architecture")
        if (kind := header.get("general.type")) not in (None, "model"):
            raise UnsupportedCheckpoint(f"it is no model by itself, but of type {kind!r}")
        shapes = {
            name: tuple(int(length) for length in reversed(tensor.shape))
            for name, tensor in header.tensors.items()
        }
        return Metadata(architecture, header.keys(), header.get, shapes)

    def _reader_of(self, header: Header, said: Metadata) -> Any:
        def read(name: str) -> torch.Tensor:
            if name not in header.tensors:
                raise CheckpointCorrupt(f"it holds no {name}")
            said.tensors_read.add(name)
            tensor = header.tensors[name]
            return torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type)).view(-1)

        return read

    def _parameters(self) -> list[Parameter]:
        if not self._named:
            _, said, config = self._open()
            check_config(config, str(self.path))
            model = self._model(config)
            slots = {name: tuple(one.shape) for name, one in model.state_dict().items()}
            with _said_of(self.path):
                found = parameters_of(said, config, slots)
            self._named = {one.name: one for one in found}
            if self._packs:
                self._packed = self._formats(found, can_be_packed(model))
        return list(self._named.values())

    def _formats(
        self, parameters: Sequence[Parameter], places: frozenset[str]
    ) -> dict[str, PackedFormat]:
        """Of those that are packed: linears and embeddings made of blocks of one kind."""
        header, _, _ = self._open()
        found: dict[str, PackedFormat] = {}
        expanded: set[str] = set()
        for one in parameters:
            kinds = {header.tensors[piece.tensor].tensor_type for piece in one.pieces}
            layout = packed_format(kinds.pop()) if len(kinds) == 1 else None
            plain = one.subtract == 0 and not one.transposed and len(one.shape) == 2
            whole = {int(header.tensors[piece.tensor].shape[0]) for piece in one.pieces}
            if layout is not None and plain and one.name in places and whole == {one.shape[1]}:
                found[one.name] = layout
            else:
                kinds |= {header.tensors[piece.tensor].tensor_type for piece in one.pieces}
                expanded |= {kind.name for kind in kinds if kind not in _UNPACKED}
        if expanded:
            log.info(
                "%s: blocks of type %s are expanded to %s, not packed",
                self.path,
                ", ".join(sorted(expanded)),
                str(self.dtype).removeprefix("torch."),
            )
        return found

    def rows(self) -> tuple[Header, dict[str, Any], list[Parameter]]:
        """The file's header, the model's config, and which rows make up each parameter: for who
        reads them elsewhere."""
        header, _, config = self._open()
        return header, config, self._parameters()

    def _model(self, config: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        model_type = config["model_type"]
        with (
            architecture_errors(f"{self.path}: the architecture {model_type!r} can't be served"),
            torch.device("meta"),
        ):
            return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config))


@contextlib.contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """What is refused, or damaged, is told with the file's name before it."""
    try:
        yield
    except (CheckpointCorrupt, UnsupportedCheckpoint) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
