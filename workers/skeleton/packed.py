"""Linears and embeddings over packed weights, in the place of transformers' own.

Owns what they compute where the kernels do not: weights are turned into the input's dtype some
strips at a time and multiplied as any others. Invariant: the weight is a tensor that someone else
owns, bound as other parameters are. Does not know which weights are packed, or why.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

from workers.packed_format import ROWS, PackedFormat, unpack

NO_PARTS: Final[Mapping[str, int]] = {}
_PIECE_WEIGHTS: Final = 1 << 20
"""Turned into floats at a time."""


class PackedLinear(nn.Module):
    """In place of an `nn.Linear`."""

    def __init__(
        self, linear: nn.Linear, layout: PackedFormat, first_column: int | None = None
    ) -> None:
        """With a `first_column` its inputs are a part of one tile, from that column on."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.layout: Final = layout
        self.first_column: Final = first_column
        width = self.in_features if first_column is None else layout.group
        self.weight = _parameter(layout, self.out_features, width)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """# [..., in_features] → [..., out_features]"""
        out = x.new_empty((*x.shape[:-1], self.out_features))
        begin = self.first_column or 0
        for first, weights in _pieces(self.layout, self.weight, self.in_features):
            end = min(first + len(weights), self.out_features)
            rows = weights[: end - first, begin : begin + self.in_features].to(x.dtype)
            bias = None if self.bias is None else self.bias[first:end]
            out[..., first:end] = nn.functional.linear(x, rows, bias)
        return out


class PackedEmbedding(nn.Module):
    """In place of an `nn.Embedding`, or of one of transformers' that scales what it finds."""

    def __init__(self, embedding: nn.Embedding, layout: PackedFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx
        self.layout: Final = layout
        self.weight = _parameter(layout, self.num_embeddings, self.embedding_dim)
        self._dtype = dtype
        if (scale := getattr(embedding, "embed_scale", None)) is not None:
            self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """# [...] → [..., embedding_dim]"""
        wanted, places = torch.unique(token_ids.reshape(-1), return_inverse=True)
        strips = unpack(self.layout, self.weight[wanted // ROWS]).view(len(wanted), ROWS, -1)
        rows = strips[torch.arange(len(wanted)), wanted % ROWS].to(self._dtype)
        found = rows[places].view(*token_ids.shape, self.embedding_dim)
        scale = getattr(self, "embed_scale", None)
        return found if scale is None else found * scale.to(found.dtype)


def with_ties(module: Any, formats: Mapping[str, PackedFormat]) -> dict[str, PackedFormat]:
    """By the names of the module's parameters; of what is tied, either may be named."""
    named = dict(formats)
    for target, source in module.all_tied_weights_keys.items():
        for name, twin in ((target, source), (source, target)):
            if twin in formats:
                named.setdefault(name, formats[twin])
    return named


def put_packed(
    module: Any,
    formats: Mapping[str, PackedFormat],
    dtype: torch.dtype,
    first_columns: Mapping[str, int] = NO_PARTS,
) -> None:
    """Put modules that take packed weights where `formats` names their weights, by the names of the
    module's parameters, or of one that is tied to them; `first_columns` names those of which the
    module has a part of one tile."""
    for name, layout in with_ties(module, formats).items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if last != "weight" or not isinstance(owner, nn.Linear | nn.Embedding):
            raise AssertionError(f"{name} is packed, and {type(owner).__name__} takes no such")
        if isinstance(owner, nn.Linear):
            module.set_submodule(path, PackedLinear(owner, layout, first_columns.get(name)))
        else:
            module.set_submodule(path, PackedEmbedding(owner, layout, dtype))


def can_be_packed(module: Any) -> frozenset[str]:
    """Names of the weights of a decoder's linears, and of its embedding of tokens."""
    embedding = module.get_input_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, one in module.named_modules()
        if type(one) is nn.Linear or one is embedding
    )


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of its parameters, as if none were packed."""
    shapes = {name: tuple(one.shape) for name, one in module.named_parameters()}
    for name, one in module.named_modules():
        if f"{name}.weight" not in shapes:
            continue
        if isinstance(one, PackedLinear):
            shapes[f"{name}.weight"] = (one.out_features, one.in_features)
        elif isinstance(one, PackedEmbedding):
            shapes[f"{name}.weight"] = (one.num_embeddings, one.embedding_dim)
    return shapes


def _parameter(layout: PackedFormat, num_rows: int, width: int) -> nn.Parameter:
    empty = torch.empty(layout.shape(num_rows, width), dtype=torch.uint8, device="meta")
    return nn.Parameter(empty, requires_grad=False)


def _pieces(
    layout: PackedFormat, weight: torch.Tensor, width: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The first row of each, and its weights."""
    step = max(1, _PIECE_WEIGHTS // (ROWS * width))
    for first in range(0, len(weight), step):
        yield first * ROWS, unpack(layout, weight[first : first + step])
