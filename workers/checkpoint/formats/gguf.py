"""GGUF files: header read in milliseconds, blocks dequantized piece by piece into shared memory.

Owns the step from ggml's names, blocks and row orders to those of `transformers`, whose own tables
do the naming and reordering. Invariant: the same bytes come out as `transformers` gives for the
same file and dtype (tested). Knows nothing of where the tensors go.
"""

import contextlib
import functools
import json
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType

from workers.checkpoint.formats.checkpoint import (
    SCRATCH_BYTES,
    OnCopied,
    SourceTensor,
    StoredBytes,
)
from workers.checkpoint.formats.gguf_metadata import ROPE_FACTORS, completed
from workers.config.architecture import architecture_errors, check_config
from workers.config.ends import end_tokens
from workers.config.model_file import file_identity, file_status, unreadable
from workers.errors import CheckpointCorrupt, UnsupportedCheckpoint, WorkerError

_LONG_ARRAY: Final = 64
_MAX_FIELDS: Final = 1 << 14
_MAX_TENSORS: Final = 1 << 16
_MAX_ARRAY: Final = 1 << 22
"""More than any vocabulary, and its merges, have."""
_gguf_patch = threading.Lock()


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
            if count > _LONG_ARRAY and item == GGUFValueType.STRING:
                return self._skip_strings(orig_offs + 12, count) - orig_offs, [], [], skipped
            if count > _LONG_ARRAY and (scalar := self.gguf_scalar_to_np.get(GGUFValueType(item))):
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


class GGUFCheckpoint:
    """One .gguf file, laid out as the dense model that `transformers` would make of it."""

    def __init__(self, path: Path, dtype: torch.dtype | None):
        self.path = path
        self.dtype: torch.dtype = dtype or torch.bfloat16
        self._reader: Any = None
        self._names: dict[str, str] = {}
        self._processor: Any = None
        self._config: dict[str, Any] = {}
        self._architecture = ""

    def fingerprint(self) -> dict[str, str]:
        """The file's identity; nothing of it is read."""
        return {"kind": "gguf", "files": f"{self.path.name}:{file_identity(self.path)}"}

    def metadata(self) -> dict[str, str]:
        """The config that `transformers` derives from the file's metadata, as JSON."""
        self._open()
        return {"config": json.dumps(self._config)}

    def eos_token_ids(self) -> tuple[int, ...] | None:
        """The config has them: there is one file only."""
        return None

    def tensors(self) -> list[SourceTensor]:
        """In file order, under the names of `transformers`."""
        self._map_names()
        return [
            SourceTensor(
                self._names[tensor.name], tuple(int(n) for n in reversed(tensor.shape)), self.dtype
            )
            for tensor in self._reader.tensors
            if tensor.name in self._names
        ]

    def stored_runs(self, name: str) -> tuple[StoredBytes, ...]:
        """Every tensor is converted: blocks are dequantized, rows of some projections move."""
        return ()

    def copy_into(self, name: str, out: torch.Tensor, on_copied: OnCopied) -> None:
        """Dequantize to fp32 and cast, rows at a time where no rows are reordered."""
        self._map_names()
        source = next(t for t in self._reader.tensors if self._names.get(t.name) == name)
        if self._rearranges(source.name):
            rows = self._dequantize(source.data, source.tensor_type)
            with _read_by_others(
                f"{self.path}: {source.name} does not fit the model it belongs to"
            ):
                result = self._processor.process(
                    weights=rows, name=source.name, tensor_key_mapping=self._names
                )
            if result.name is None:
                raise UnsupportedCheckpoint(
                    f"{self.path}: {source.name} is merged with other tensors, which can't be "
                    "done from a GGUF file yet: give the safetensors checkpoint"
                )
            out.copy_(torch.from_numpy(np.ascontiguousarray(result.weights)).view(out.shape))
            on_copied(out.numel() * out.dtype.itemsize)
            return
        data = source.data if source.data.ndim > 1 else source.data[None]
        data = data.reshape(-1, data.shape[-1])
        target = out.view(data.shape[0], -1)
        step = max(1, SCRATCH_BYTES // (4 * target.shape[1]))
        for start in range(0, data.shape[0], step):
            rows = self._dequantize(data[start : start + step], source.tensor_type)
            target[start : start + step].copy_(torch.from_numpy(rows).view(-1, target.shape[1]))
            on_copied(rows.size * out.dtype.itemsize)

    def _rearranges(self, gguf_name: str) -> bool:
        """Whether the tensor must be seen whole. Embeddings never are; of a Llama only the rows of
        the rotary projections move, from ggml's interleaved order to that of `transformers`; of a
        Gemma nothing but vectors changes."""
        from transformers import modeling_gguf_pytorch_utils as legacy

        if type(self._processor) is legacy.TensorProcessor or gguf_name == "token_embd.weight":
            return False
        if type(self._processor) is legacy.LlamaTensorProcessor:
            return ".attn_q." in gguf_name or ".attn_k." in gguf_name
        if type(self._processor) in (legacy.Gemma2TensorProcessor, legacy.NemotronTensorProcessor):
            return "norm.weight" in gguf_name  # stored with 1 added
        return True

    def _dequantize(self, data: Any, kind: Any) -> Any:
        with _read_by_others(f"{self.path} is damaged"):
            try:
                # The file is mapped read-only, and torch wants to know that it may write.
                return np.require(gguf.dequantize(data, kind), np.float32, ["C", "W"])
            except NotImplementedError as error:
                raise UnsupportedCheckpoint(
                    f"{self.path} holds blocks of type {kind.name}, which can't be dequantized: "
                    f"{error}"
                ) from error

    def _open(self) -> None:
        if self._reader is not None:
            return
        file_status(self.path)
        with _read_by_others(
            f"{self.path} is truncated, damaged or no GGUF file; download it again"
        ):
            try:
                reader = HeaderReader(self.path)
            except OSError as error:
                raise unreadable(self.path, error) from error
        self._config, self._architecture = self._read_config(reader)
        self._reader = reader

    def _read_config(self, reader: HeaderReader) -> tuple[dict[str, Any], str]:
        from transformers import modeling_gguf_pytorch_utils as legacy

        field = reader.get_field("general.architecture")
        if field is None:
            raise CheckpointCorrupt(f"{self.path} does not name its architecture")
        with _read_by_others(f"{self.path} has damaged metadata"):
            architecture = str(field.contents())
        said = f"{self.path}: the architecture {architecture!r} can't be served from a GGUF file"
        with architecture_errors(said), _faster_gguf():
            config = dict(legacy.load_gguf_checkpoint(str(self.path))["config"])
        with _read_by_others(f"{self.path} has damaged metadata"):
            config = self._completed(config, reader, architecture)
            embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
            if embedding is not None:  # the vocabulary itself was skipped, and it may be padded
                config["vocab_size"] = int(embedding.shape[1])
            eos = [config.get("eos_token_id")]
            if (turn := reader.get_field("tokenizer.ggml.eot_token_id")) is not None:
                eos.append(turn.contents())
            plain = {k: _plain(v) for k, v in config.items() if not k.startswith("_")}
            plain["eos_token_id"] = list(end_tokens(_plain(eos), str(self.path)) or ())
            return plain, architecture

    def _completed(
        self, config: dict[str, Any], reader: HeaderReader, architecture: str
    ) -> dict[str, Any]:
        from transformers.integrations import GGUF_CONFIG_MAPPING

        model_type = str(config.get("model_type")).removesuffix("_text")
        heard = GGUF_CONFIG_MAPPING.get(model_type) or GGUF_CONFIG_MAPPING.get(architecture, {})
        factors = next((t for t in reader.tensors if t.name == ROPE_FACTORS), None)
        rope_factors = None
        if factors is not None:
            rope_factors = torch.from_numpy(self._dequantize(factors.data, factors.tensor_type))
        said = {
            name.removeprefix(f"{architecture}."): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(f"{architecture}.")
        }
        try:
            return completed(
                config, said, {key for key, name in heard.items() if name}, rope_factors
            )
        except UnsupportedCheckpoint as error:
            raise UnsupportedCheckpoint(f"{self.path}: {error}") from error

    def _map_names(self) -> None:
        if self._names:
            return
        self._open()
        architecture = self._architecture
        from transformers import AutoModelForCausalLM
        from transformers import modeling_gguf_pytorch_utils as legacy
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        model_type = self._config.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise UnsupportedCheckpoint(
                f"{self.path}: the architecture {architecture!r} is not known to transformers"
            )
        check_config(self._config, str(self.path))
        processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
        with architecture_errors(f"{self.path}: the architecture {architecture!r} can't be served"):
            self._processor = processor(config=self._config)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**self._config))
            with _faster_gguf():
                names = legacy.get_gguf_hf_weights_map(model, self._processor)
        known = {name for name, _ in model.named_parameters()}
        stored = {tensor.name for tensor in self._reader.tensors} - {ROPE_FACTORS}
        unknown = sorted(name for name in stored if names.get(name) not in known)
        targets = Counter(names[name] for name in stored if name not in unknown)
        merged = sorted(name for name in stored if targets[names.get(name, "")] > 1)
        for found, what in ((unknown, "has no place in"), (merged, "is one of several parts in")):
            if found:
                raise UnsupportedCheckpoint(
                    f"{self.path}: {found[0]} {what} {type(model).__name__}: give the safetensors "
                    "checkpoint"
                )
        self._names = {name: names[name] for name in stored}


@contextlib.contextmanager
def _read_by_others(what: str) -> Iterator[None]:
    """Libraries read the file, which do not say what they raise where it is damaged. It is told as
    CheckpointCorrupt; errors of this room as they are."""
    try:
        yield
    except WorkerError:
        raise
    except Exception as error:
        raise CheckpointCorrupt(f"{what}: {error}") from error


@contextlib.contextmanager
def _faster_gguf() -> Iterator[None]:
    """Let `transformers` use our header reader instead of a GGUFReader of its own, and one table of
    names a model instead of one a module (6.4 s for 397 modules)."""
    with _gguf_patch:
        reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = HeaderReader, functools.cache(name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _plain(value: Any) -> Any:
    """numpy scalars and arrays as what JSON can hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    return value
