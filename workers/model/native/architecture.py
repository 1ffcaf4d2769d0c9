"""What a `transformers` decoder computes, read off its modules, or why not natively.

Owns the translation of a family's modules into the kernels' structures. Invariant: nothing is taken
for granted that a module could do otherwise: each part has one of the known types and exactly the
parameters that the kernels use. Parameters are referred to, never copied. Does not know how the
kernels are called.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import torch
from torch import nn

from workers.kv.layout import FULL
from workers.model.native import library
from workers.model.native.families import (
    ACTIVATIONS,
    DECODERS,
    ENCODERS,
    Family,
    Residual,
    Rotation,
)
from workers.model.native.weights import NotNative, Weights
from workers.skeleton.packed import PackedEmbedding


class PagedLayout(Protocol):
    """Where a block of `block_size` tokens holds each layer, at `layer_offsets[layer]` bytes:
    keys [num_heads, block_size, head_dim], then values. Of less than 16 `bits`, its sections; then
    one that is not complete is, as it is, in several blocks, a layer in the one and at the bytes
    that `open_places` says."""

    @property
    def block_size(self) -> int: ...

    @property
    def layer_offsets(self) -> tuple[int, ...]: ...

    @property
    def bits(self) -> int: ...

    @property
    def open_places(self) -> tuple[tuple[int, int], ...]: ...


_STATIC_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn"})
_LENGTH_ROPES: Final = frozenset({"dynamic", "longrope"})
"""Their frequencies are those of the original length up to that length."""
_LOG2_E: Final = math.log2(math.e)
_MAX_HEAD_DIM: Final = 256


@dataclass
class Description:
    """The structures of a module, less its rope tables and sizes, and what they refer to."""

    spec: library.Decoder
    layers: Any
    """An array of library.Layer."""
    kept: list[Any] = field(default_factory=list)


def part(module: Any, path: str) -> Any:
    """What a dotted path leads to; the module itself where it is empty."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def family_of(module: Any) -> Family:
    """Raises NotNative."""
    kind, name = type(module), type(module).__name__
    with_head = name.removesuffix("TextModel").removesuffix("Model") + "ForCausalLM"
    if kind.__module__.startswith("transformers.models."):
        if name in DECODERS:
            return DECODERS[name]
        if name in ENCODERS:
            return ENCODERS[name]
        if name.endswith("Model") and with_head in DECODERS:
            family = DECODERS[with_head]
            return replace(family, names=replace(family.names, base="", head=""))
    raise NotNative(f"{name} is not one of the native decoder's families")


def base_of(module: Any) -> Any:
    """The part without the head."""
    family = family_of(module)
    return part(module, family.names.base if family.names.head else "")


def layers_of(module: Any) -> Any:
    """Its layers, the first first."""
    return part(base_of(module), family_of(module).names.layers)


def rope_tables(module: Any) -> tuple[str | None, ...]:
    """The layer types that have their own rotation; one None where all layers have the same, none
    where there is no rotation."""
    if not family_of(module).rotates:
        return ()
    if not family_of(module).rope_by_layer_type:
        return (None,)
    return tuple(sorted(set(module.config.layer_types)))


def longest(module: Any) -> int | None:
    """Positions that there are, or beyond which a rotation would depend on the whole sequence's
    length."""
    limits = []
    if family_of(module).position_embedding:
        table = part(base_of(module), family_of(module).position_embedding)
        limits.append(table.num_embeddings - _first_position(table))
    for kind in rope_tables(module):
        parameters = module.config.rope_parameters
        parameters = parameters[kind] if kind is not None else parameters
        rope_type = parameters["rope_type"]
        if rope_type in _LENGTH_ROPES:
            limit = parameters.get("original_max_position_embeddings")
            limits.append(limit or module.config.max_position_embeddings)
        elif rope_type not in _STATIC_ROPES:
            raise NotNative(f"rotary embeddings of type {rope_type!r}")
    return min(limits, default=None)


def _first_position(table: Any) -> int:
    """RoBERTa and its kin count from behind the padding token's."""
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1


def padding_token(module: Any) -> int | None:
    """That which has no position of its own in a text."""
    path = family_of(module).position_embedding
    padding: int | None = part(base_of(module), path).padding_idx if path else None
    return padding


def describe(module: Any, layout: PagedLayout | None) -> Description:
    """Without a layout, block offsets are missing: enough to see whether it can be done at all.
    Raises NotNative."""
    return _Reader(module, layout).read()


class _Reader:
    def __init__(self, module: Any, layout: PagedLayout | None) -> None:
        self.family = family_of(module)
        self.names = self.family.names
        self.module = module
        self.base = base_of(module)
        self.layers = layers_of(module)
        self.config = module.config
        self.hidden_size: int = module.config.hidden_size
        self.layout = layout
        self.weights = Weights(need_places=layout is not None)

    def read(self) -> Description:
        longest(self.module)
        for attribute in self.family.unless:
            if getattr(self.config, attribute, None):
                raise NotNative(f"a model with {attribute}")
        spec = library.Decoder(residual_scale=1.0, logit_scale=1.0)
        layers = (library.Layer * len(self.layers))()
        for to, layer, index in zip(layers, self.layers, range(len(layers)), strict=True):
            self._layer(to, layer, index)
        spec.hidden_size = self.hidden_size
        self._embedding(spec)
        spec.activation = self._common_activation()
        if self.names.final_norm:
            final_norm = part(self.base, self.names.final_norm)
            spec.final_norm = self._norm(final_norm, self.hidden_size)
        if self.names.head:
            spec.head = self.weights.linear([part(self.module, self.names.head)])
            if spec.head.width != self.hidden_size:
                raise NotNative("a head of another shape")
        self._factors(spec)
        if self.family.rotates:
            spec.rotary_dim = self._rotary_dim(self.base.rotary_emb)
            spec.rotation = self.family.rotation
        heads = [layer.attention.head_dim for layer in layers]
        if spec.rotary_dim > min(heads) or spec.rotary_dim % 2:
            raise NotNative(f"rotations over {spec.rotary_dim} of a head's elements")
        self._sizes(spec, layers)
        spec.packs = self._packs(spec, layers)
        spec.kept_bits = max(layer.attention.kept_bits for layer in layers)
        unknown = self.weights.unknown(self.module)
        if unknown:
            raise NotNative(f"unknown parameters, such as {unknown[0]}")
        if self.module.training:
            raise NotNative("a module in training mode")
        return Description(spec, layers, self.weights.kept)

    def _packs(self, spec: library.Decoder, layers: Any) -> bool:
        linears = [spec.head]
        for layer in layers:
            linears += [layer.qkv, layer.output, layer.gate_up, layer.down, layer.experts.router]
        return any(one.matrices[i].format for one in linears for i in range(one.num_matrices))

    def _factors(self, spec: library.Decoder) -> None:
        factors = {
            name: float(getattr(self.config, attribute))
            for name, attribute in self.family.factors.items()
        }
        if "embedding" in factors:
            spec.embedding_scale = factors["embedding"]
        spec.residual_scale = factors.get("residual", 1.0)
        spec.logit_scale = factors.get("logits", 1.0)
        if "logits_divisor" in factors:
            spec.logit_scale = 1.0 / factors["logits_divisor"]
        if self.family.softcaps_logits:
            spec.logit_softcap = self.config.final_logit_softcapping or 0.0

    def _sizes(self, spec: library.Decoder, layers: Any) -> None:
        spec.intermediate_size = max(layer.down.width for layer in layers)
        spec.max_outputs = max(layer.qkv.num_outputs for layer in layers)
        spec.max_attended = max(layer.output.width for layer in layers)
        spec.max_head_dim = max(layer.attention.head_dim for layer in layers)
        spec.max_kv_heads = max(layer.attention.num_kv_heads for layer in layers)
        spec.max_experts = max(layer.experts.num_experts for layer in layers)
        spec.max_top_k = max(layer.experts.top_k for layer in layers)
        spec.expert_intermediate = max(layer.experts.intermediate for layer in layers)

    def _layer(self, to: library.Layer, layer: Any, index: int) -> None:
        family, norms = self.family, self.family.norms
        self._attention(to, part(layer, self.names.attention), index)
        to.residual = family.residual
        if family.residual_flag and not getattr(layer, family.residual_flag):
            to.residual = Residual.ONE_BY_ONE
        mlp = part(layer, self.names.mlp)
        if family.experts and hasattr(mlp, family.experts):
            self._experts(to.experts, mlp)
        else:
            self._mlp(to, mlp, index)
        for target, attribute in (
            ("input_norm", norms.before_attention),
            ("attention_norm", norms.after_attention),
            ("mlp_norm", norms.before_mlp),
            ("mlp_output_norm", norms.after_mlp),
        ):
            if attribute:
                setattr(to, target, self._norm(part(layer, attribute), self.hidden_size))
        if to.qkv.width != self.hidden_size or to.output.num_outputs != self.hidden_size:
            raise NotNative(f"layer {index} has another width than the rest")

    def _attention(self, to: library.Layer, attention: Any, index: int) -> None:
        names = self.names
        own = part(attention, names.head_dim.rpartition(".")[0])
        if bool(own.is_causal) == self.family.sees_all:
            how = "not causal" if own.is_causal is False else "causal"
            raise NotNative(f"layer {index} is {how}")
        head_dim = part(attention, names.head_dim)
        groups = getattr(attention, "num_key_value_groups", 1)
        output = part(attention, names.output)
        num_heads, rest = divmod(output.in_features, head_dim)
        num_kv_heads = num_heads // groups
        if rest or num_kv_heads * groups != num_heads or not 0 < head_dim <= _MAX_HEAD_DIM:
            raise NotNative(f"{num_heads} heads of {head_dim} in layer {index}")
        to.attention = library.Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=own.scaling * _LOG2_E,
            window=self._window(attention) or 0,
            sees_all=self.family.sees_all,
        )
        self._projections(to, attention, index)
        to.output = self.weights.linear([output])
        self._head_norms(to, attention)
        if self.family.softcaps_scores:
            to.attention.softcap = (attention.attn_logit_softcapping or 0.0) * _LOG2_E
        if self.family.rope_by_layer_type:
            to.rope = rope_tables(self.module).index(attention.layer_type)
        flag = self.family.unrotated
        if not self.family.rotates or (flag and not getattr(attention, flag)):
            to.rope = -1
        if self.layout is not None:
            to.attention.block_size = self.layout.block_size
            to.attention.layer_offset = self.layout.layer_offsets[index]
            if self.layout.bits != FULL:
                to.attention.kept_bits = self.layout.bits
                to.attention.open_block, to.attention.open_offset = self.layout.open_places[index]

    def _projections(self, to: library.Layer, attention: Any, index: int) -> None:
        """The matrices, and where in a row of their outputs each head's parts are."""
        names, of = self.names, to.attention
        head_dim, num_heads, num_kv_heads = of.head_dim, of.num_heads, of.num_kv_heads
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        of.query_step = of.key_step = of.value_step = head_dim
        of.key, of.value = sizes[0], sizes[0] + sizes[1]
        if names.by_heads:
            fused = getattr(attention, names.by_heads)
            to.qkv = self.weights.linear([fused])
            of.key, of.value = head_dim, 2 * head_dim
            of.query_step = of.key_step = of.value_step = 3 * head_dim
            if num_kv_heads != num_heads or fused.out_features != sum(sizes):
                raise NotNative(f"projections of other sizes in layer {index}")
            return
        if names.queries_keys_values:
            to.qkv = self.weights.split(getattr(attention, names.queries_keys_values), sizes)
        else:
            to.qkv = self.weights.linear(
                [part(attention, name) for name in (names.query, names.key, names.value)]
            )
        if [to.qkv.matrices[i].num_rows for i in range(3)] != sizes:
            raise NotNative(f"projections of other sizes in layer {index}")

    def _head_norms(self, to: library.Layer, attention: Any) -> None:
        if not self.family.head_norms:
            return
        of = to.attention
        together = self.family.head_norms == "all"
        to.norms_all_heads = together
        for target, name, count in (
            ("query_norm", self.names.query_norm, of.num_heads),
            ("key_norm", self.names.key_norm, of.num_kv_heads),
        ):
            size = of.head_dim * (count if together else 1)
            setattr(to, target, self._norm(getattr(attention, name), size))

    def _window(self, attention: Any) -> int | None:
        source = {"config": self.config, "attention": attention}.get(self.family.window)
        window: int | None = getattr(source, "sliding_window", None)
        return window

    def _mlp(self, to: library.Layer, mlp: Any, index: int) -> None:
        names = self.names
        if names.gate_and_up:
            both = getattr(mlp, names.gate_and_up)
            to.gate_up = self.weights.split(both, [both.out_features // 2] * 2)
        else:
            parts = [names.gate, names.up] if names.gate else [names.up]
            to.gate_up = self.weights.linear([part(mlp, name) for name in parts])
        to.down = self.weights.linear([part(mlp, names.down)])
        rows = {to.gate_up.matrices[i].num_rows for i in range(to.gate_up.num_matrices)}
        if (
            rows != {to.down.width}
            or to.gate_up.width != self.hidden_size
            or to.down.num_outputs != self.hidden_size
        ):
            raise NotNative(f"the MLP of layer {index} has another shape")

    def _experts(self, to: library.Experts, mlp: Any) -> None:
        experts, router = getattr(mlp, self.family.experts), mlp.gate
        gate_up, down = experts.gate_up_proj, experts.down_proj
        count, twice, hidden = gate_up.shape
        if hidden != self.hidden_size or twice % 2:
            raise NotNative(f"experts of {list(gate_up.shape)}")
        to.router = library.Linear(num_matrices=1, width=hidden, num_outputs=count)
        to.router.matrices[0] = self.weights.matrix(router.weight, None, (count, hidden))
        to.gate_up = self.weights.address(gate_up, (count, twice, hidden))
        to.down = self.weights.address(down, (count, hidden, twice // 2))
        to.num_experts, to.top_k, to.intermediate = count, router.top_k, twice // 2
        flag = self.family.normalizes_flag
        to.normalizes = bool(getattr(router, flag)) if flag else True
        to.rounds_weights = self.family.rounds_expert_weights

    def _embedding(self, spec: library.Decoder) -> None:
        embedding = part(self.base, self.names.embedding)
        scale = getattr(embedding, "embed_scale", None)
        if type(embedding) not in (nn.Embedding, PackedEmbedding) and scale is None:
            raise NotNative(f"an embedding of type {type(embedding).__name__}")
        spec.embedding = self.weights.rows_of(embedding)
        shape = (spec.embedding.num_rows, embedding.embedding_dim)
        if shape != (self.config.vocab_size, self.hidden_size):
            raise NotNative(f"an embedding laid out as {list(shape)}")
        if scale is not None:
            spec.embedding_scale = float(scale.to(torch.bfloat16))
        if self.family.type_embedding:
            types = part(self.base, self.family.type_embedding).weight
            shape = (types.shape[0], self.hidden_size)
            spec.type_embedding = self.weights.address(types, shape)
        if self.family.position_embedding:
            table = part(self.base, self.family.position_embedding)
            shape = (table.num_embeddings, self.hidden_size)
            skipped = _first_position(table)
            spec.position_embedding = self.weights.address(table.weight, shape, skipped)
        if self.family.embedding_norm:
            norm = part(self.base, self.family.embedding_norm)
            spec.embedding_norm = self._norm(norm, self.hidden_size)

    def _common_activation(self) -> int:
        names = set()
        for layer in self.layers:
            mlp = part(layer, self.names.mlp)
            owner = getattr(mlp, self.family.experts, mlp) if self.family.experts else mlp
            names.add(type(part(owner, self.names.activation)).__name__)
        if len(names) > 1:
            raise NotNative("activations that differ between layers")
        (name,) = names
        if name not in ACTIVATIONS:
            raise NotNative(f"the activation {name}")
        return ACTIVATIONS[name]

    def _rotary_dim(self, rotary: Any) -> int:
        kinds = rope_tables(self.module)
        names = [f"{kind}_inv_freq" if kind else "inv_freq" for kind in kinds]
        sizes = {2 * getattr(rotary, name).numel() for name in names}
        if len(sizes) > 1 or len(names) > 2:
            raise NotNative("rotations of several sizes")
        return int(sizes.pop())

    def _norm(self, norm: Any, size: int) -> library.Norm:
        return self.weights.norm(norm, size, self.family.norm)


__all__ = [
    "Description",
    "NotNative",
    "PagedLayout",
    "Rotation",
    "base_of",
    "describe",
    "family_of",
    "layers_of",
    "longest",
    "padding_token",
    "rope_tables",
]
