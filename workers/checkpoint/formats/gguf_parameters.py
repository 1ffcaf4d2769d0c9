"""Which rows of a GGUF file's tensors make up each parameter of an architecture.

Owns the way back from llama.cpp's names, row orders and merged tensors to those of `transformers`;
the names are those of the `gguf` package, by which the files are written. Invariant: a parameter is
made of whole rows, so that it can be written where it will lie, a few rows at a time; a tensor that
no parameter is made of is refused by name. Does not know files.

    stored    blk.0.ffn_gate_exps [E, I, H]   blk.0.ffn_up_exps [E, I, H]
    laid out  experts.gate_up_proj [E, 2 I, H]: rows e * I + i of one go to e * 2 I + i, of the
              other to e * 2 I + I + i
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import gguf
import numpy as np
from gguf.constants import MODEL_ARCH_NAMES

from workers.checkpoint.formats.gguf_architectures import ARCHITECTURES
from workers.checkpoint.formats.gguf_metadata import ADVICE, Metadata, Shape
from workers.errors import CheckpointCorrupt, UnsupportedCheckpoint

Rows = np.ndarray[Any, np.dtype[np.int64]]

_LAYER: Final = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)\.(.*)")
_TRANSPOSED: Final = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_XIELU: Final = re.compile(r"mlp\.act_fn\.(alpha_p|alpha_n|beta|eps)$")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows [begin, begin + len(rows)) of a stored tensor go to `rows` of the parameter. Of a vector
    each element is a row."""

    tensor: str
    rows: Rows
    begin: int = 0


@dataclass(frozen=True, slots=True)
class Parameter:
    """Of the architecture. `subtract` is taken from all its elements; a transposed one has the
    columns that pieces call rows; a constant is made of no tensor."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    subtract: float = 0.0
    transposed: bool = False
    constant: float | None = None


def parameters_of(
    said: Metadata, config: Mapping[str, Any], slots: Mapping[str, Shape]
) -> list[Parameter]:
    """All that the model with these `slots` (its state's names and shapes) has, in the order in
    which the file has them. Raises UnsupportedCheckpoint, CheckpointCorrupt."""
    finder = _Finder(said, config)
    found = []
    for name, shape in slots.items():
        if (one := finder.find(name, shape)) is not None:
            found.append(one)
        elif name != "lm_head.weight" or not config["tie_word_embeddings"]:
            raise UnsupportedCheckpoint(f"it holds nothing that {name} is made of: {ADVICE}")
    used = {piece.tensor for one in found for piece in one.pieces} | said.tensors_read
    layers = config.get("num_hidden_layers") or config["n_layer"]
    for tensor in said.tensor_names():
        if tensor not in used and not _guesses_ahead(tensor, layers, said):
            raise UnsupportedCheckpoint(
                f"{tensor} has no place in {config['model_type']}, or not with its shape "
                f"{list(said.shapes[tensor])}: {ADVICE}"
            )
    order = {tensor: index for index, tensor in enumerate(said.tensor_names())}
    return sorted(found, key=lambda one: min((order[p.tensor] for p in one.pieces), default=0))


def _guesses_ahead(tensor: str, num_layers: int, said: Metadata) -> bool:
    """Whether it belongs to further layers that only guess at tokens after the next."""
    named = re.match(r"blk\.(\d+)\.", tensor)
    further = named is not None and int(named[1]) >= num_layers
    return further and bool(said.get("nextn_predict_layers", 0))


class _Finder:
    def __init__(self, said: Metadata, config: Mapping[str, Any]):
        self._said = said
        self._config = config
        self._architecture = ARCHITECTURES[said.architecture]
        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        layers = config.get("num_hidden_layers") or config["n_layer"]
        self._names = gguf.get_tensor_name_map(kinds[said.architecture], layers)
        self._heads = int(config.get("num_attention_heads") or config["n_head"])
        self._kv_heads = int(config.get("num_key_value_heads") or self._heads)

    def find(self, name: str, shape: Shape) -> Parameter | None:
        """None where the file has none of it."""
        layer = _LAYER.match(name)
        if layer is not None and (constant := self._constant(int(layer[1]), layer[2])) is not None:
            return Parameter(name, shape, (), constant=constant)
        if layer is not None and (pieces := self._merged(layer[1], layer[2], shape)):
            return Parameter(name, shape, pieces)
        tensor = self._name(name, layer)
        if tensor is None or tensor not in self._said.shapes:
            return None
        transposed = self._said.architecture == "gpt2" and bool(_TRANSPOSED.search(name))
        laid_out = shape[::-1] if transposed else shape
        stored = self._said.shapes[tensor]
        if math.prod(stored) != math.prod(shape) or stored[-1] != laid_out[-1]:
            raise CheckpointCorrupt(
                f"{tensor} does not fit the model it belongs to: it is {list(stored)}, "
                f"and {name} is {list(shape)}"
            )
        adds_one = self._architecture.adds_one and name.endswith("norm.weight")
        return Parameter(
            name,
            shape,
            (Piece(tensor, self._order(tensor, _num_rows(laid_out))),),
            subtract=1.0 if adds_one else 0.0,
            transposed=transposed,
        )

    def _name(self, name: str, layer: re.Match[str] | None) -> str | None:
        if name == "lm_head.weight":
            return "output.weight"
        if layer is not None and name.endswith("e_score_correction_bias"):
            return f"blk.{layer[1]}.exp_probs_b.bias"
        if layer is not None and layer[2] == "block_sparse_moe.router.weight":
            return f"blk.{layer[1]}.ffn_gate_inp.weight"
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def _order(self, tensor: str, num_rows: int) -> Rows:
        """Where each stored row belongs."""
        if self._architecture.interleaved and (".attn_q." in tensor or ".attn_k." in tensor):
            heads = self._heads if ".attn_q." in tensor else self._kv_heads
            return _paired(num_rows, heads)
        if self._said.architecture == "gptneox" and ".attn_qkv." in tensor:
            rows = np.arange(num_rows).reshape(self._heads, 3, -1)
            return rows.swapaxes(0, 1).reshape(-1)
        return np.arange(num_rows)

    def _merged(self, layer: str, rest: str, shape: Shape) -> tuple[Piece, ...]:
        """Parts of one stored tensor, or several in one parameter; none where it is neither."""
        shapes, block = self._said.shapes, f"blk.{layer}."
        if rest.endswith("experts.gate_up_proj"):
            halves = (f"{block}ffn_gate_exps.weight", f"{block}ffn_up_exps.weight")
            whole = f"{block}ffn_gate_up_exps.weight"
            if all(shapes.get(half) == _half(shape) for half in halves):
                rows = np.arange(math.prod(shape[:-1])).reshape(shape[0], 2, -1)
                return tuple(
                    Piece(half, rows[:, index].reshape(-1)) for index, half in enumerate(halves)
                )
            return self._as_it_is(whole, shape)
        if rest.endswith("experts.down_proj"):
            return self._as_it_is(f"{block}ffn_down_exps.weight", shape)
        qkv = f"{block}attn_qkv.{rest.rpartition('.')[2]}"
        part = re.match(r"self_attn\.([qkv])_proj\.", rest)
        if part is not None and qkv in shapes:
            return self._part_of_qkv(qkv, part[1], shape)
        return ()

    def _as_it_is(self, tensor: str, shape: Shape) -> tuple[Piece, ...]:
        if self._said.shapes.get(tensor) != shape:
            return ()
        return (Piece(tensor, np.arange(math.prod(shape[:-1]))),)

    def _part_of_qkv(self, tensor: str, part: str, shape: Shape) -> tuple[Piece, ...]:
        stored, head_dim = self._said.shapes[tensor], int(self._config["head_dim"])
        sizes = {"q": self._heads, "k": self._kv_heads, "v": self._kv_heads}
        begins = {"q": 0, "k": self._heads, "v": self._heads + self._kv_heads}
        total = (self._heads + 2 * self._kv_heads) * head_dim
        if stored != (total, *shape[1:]) or shape[0] != sizes[part] * head_dim:
            return ()
        rows = np.arange(shape[0])
        if self._architecture.interleaved and part != "v":
            rows = _paired(shape[0], sizes[part])
        return (Piece(tensor, rows, begins[part] * head_dim),)

    def _constant(self, layer: int, rest: str) -> float | None:
        """Of Apertus' activation: the metadata have it."""
        named = _XIELU.match(rest)
        if named is None:
            return None
        values = self._said.each(f"xielu.{named[1]}")
        if not isinstance(values, list) or layer >= len(values):
            raise CheckpointCorrupt(f"it does not say xielu.{named[1]} of each layer")
        return float(values[layer])


def _paired(num_rows: int, heads: int) -> Rows:
    """Where rows 2 i and 2 i + 1 of a head belong: at i of its halves. Raises CheckpointCorrupt."""
    if num_rows % (2 * heads):
        raise CheckpointCorrupt(f"{num_rows} rows are no {heads} heads")
    rows = np.arange(num_rows).reshape(heads, 2, -1)
    return rows.swapaxes(1, 2).reshape(-1)


def _half(shape: Shape) -> Shape:
    return (shape[0], shape[1] // 2, *shape[2:])


def _num_rows(shape: Shape) -> int:
    """Of a vector each element is one."""
    return shape[0] if len(shape) == 1 else math.prod(shape[:-1])
