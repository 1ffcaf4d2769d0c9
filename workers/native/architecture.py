"""What a `transformers` decoder computes, read off its modules, or why not natively.

Owns the list of families and the translation of their modules into the kernels' structures.
Invariant: nothing is taken for granted that a module could do otherwise: each part has one of the
known types and exactly the parameters that the kernels use. Parameters are referred to, never
copied. Does not know how the kernels are called.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import nn

from workers.native import library


class NotNative(Exception):
    """The message says what the native decoder does not compute."""


class PagedLayout(Protocol):
    """Where a block of `block_size` tokens holds each layer, at `layer_offsets[layer]` bytes:
    keys [num_heads, block_size, head_dim], then values."""

    @property
    def block_size(self) -> int: ...

    @property
    def layer_offsets(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Family:
    """What the code of a model class says and its modules don't show."""

    norm_plus_one: bool = False
    """Norms multiply by 1 + weight, before rounding."""
    sandwich_norms: bool = False
    head_norms: bool = False
    window_of_config: bool = False
    """All layers take the window from the config; else each attention has its own, if any."""
    softcaps_scores: bool = False
    softcaps_logits: bool = False
    fused: bool = False
    """One matrix for queries, keys and values, and one for gate and up."""
    rope_by_layer_type: bool = False


FAMILIES: Final = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window_of_config=True),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(head_norms=True),
    "Phi3ForCausalLM": Family(fused=True, window_of_config=True),
    "Gemma2ForCausalLM": Family(
        norm_plus_one=True, sandwich_norms=True, softcaps_scores=True, softcaps_logits=True
    ),
    "Gemma3ForCausalLM": Family(
        norm_plus_one=True,
        sandwich_norms=True,
        head_norms=True,
        softcaps_logits=True,
        rope_by_layer_type=True,
    ),
}

_ACTIVATIONS: Final = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1}
_STATIC_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn"})
_LENGTH_ROPES: Final = frozenset({"dynamic", "longrope"})
"""Their frequencies are those of the original length up to that length."""
_LOG2_E: Final = math.log2(math.e)


def family_of(module: Any) -> Family:
    """Raises NotNative."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in FAMILIES:
        raise NotNative(f"{kind.__name__} is not one of the native decoder's families")
    return FAMILIES[kind.__name__]


def rope_tables(module: Any) -> tuple[str | None, ...]:
    """The layer types that have their own rotation; one None where all layers have the same."""
    if not family_of(module).rope_by_layer_type:
        return (None,)
    return tuple(sorted(set(module.config.layer_types)))


def longest(module: Any) -> int | None:
    """Positions beyond which a rotation would depend on the whole sequence's length."""
    limits = []
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


def describe(module: Any, layout: PagedLayout | None) -> tuple[library.Decoder, Any, list[Any]]:
    """The structures of `module`, less its rope tables and sizes, and what must be kept alive.

    Without a layout, block offsets are missing: enough to see whether it can be done at all.
    Raises NotNative.
    """
    return _Reader(module, layout).read()


class _Reader:
    def __init__(self, module: Any, layout: PagedLayout | None) -> None:
        self.family = family_of(module)
        self.module = module
        self.config = module.config
        self.layout = layout
        self.kept: list[Any] = []
        self.seen: set[int] = set()

    def read(self) -> tuple[library.Decoder, Any, list[Any]]:
        longest(self.module)
        base = self.module.model
        spec = library.Decoder()
        layers = (library.Layer * len(base.layers))()
        self.hidden_size = self.config.hidden_size
        for index, layer in enumerate(base.layers):
            self._layer(layers[index], layer, index)
        spec.num_layers = len(base.layers)
        spec.hidden_size = self.hidden_size
        spec.intermediate_size = layers[0].down.width
        self._embedding(spec, base.embed_tokens)
        spec.activation = self._activation(base.layers[0].mlp)
        spec.final_norm = self._norm(base.norm, self.hidden_size)
        spec.head = self._linear([self.module.lm_head])
        if spec.head.num_outputs < 16 or spec.head.width != self.hidden_size:
            raise NotNative("a head of another shape")
        if self.family.softcaps_logits:
            spec.logit_softcap = self.config.final_logit_softcapping or 0.0
        spec.rotary_dim = self._rotary_dim(base.rotary_emb)
        if spec.rotary_dim > layers[0].attention.head_dim or spec.rotary_dim % 32:
            raise NotNative(f"rotations over {spec.rotary_dim} of a head's elements")
        unknown = [n for n, p in self.module.named_parameters() if id(p) not in self.seen]
        if unknown:
            raise NotNative(f"unknown parameters, such as {unknown[0]}")
        if self.module.training:
            raise NotNative("a module in training mode")
        return spec, layers, self.kept

    def _layer(self, to: library.Layer, layer: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention(to, attention, index)
        if self.family.fused:
            gate_up = mlp.gate_up_proj
            to.gate_up = self._split(gate_up, [gate_up.out_features // 2] * 2)
        else:
            to.gate_up = self._linear([mlp.gate_proj, mlp.up_proj])
        to.down = self._linear([mlp.down_proj])
        to.input_norm = self._norm(layer.input_layernorm, self.hidden_size)
        if self.family.sandwich_norms:
            to.attention_norm = self._norm(layer.post_attention_layernorm, self.hidden_size)
            to.mlp_norm = self._norm(layer.pre_feedforward_layernorm, self.hidden_size)
            to.mlp_output_norm = self._norm(layer.post_feedforward_layernorm, self.hidden_size)
        else:
            to.mlp_norm = self._norm(layer.post_attention_layernorm, self.hidden_size)
        sizes = (to.qkv.width, to.gate_up.width, to.output.num_outputs, to.down.num_outputs)
        if set(sizes) != {self.hidden_size}:
            raise NotNative(f"layer {index} has another width than the rest")
        if to.gate_up.matrices[0].num_rows != to.gate_up.matrices[1].num_rows or (
            to.gate_up.num_outputs != 2 * to.down.width
            or to.down.width != self.module.model.layers[0].mlp.down_proj.in_features
        ):
            raise NotNative(f"the MLP of layer {index} has another shape")
        if self._activation(mlp) != self._activation(self.module.model.layers[0].mlp):
            raise NotNative("activations that differ between layers")

    def _attention(self, to: library.Layer, attention: Any, index: int) -> None:
        if not attention.is_causal:
            raise NotNative(f"layer {index} is not causal")
        head_dim = attention.head_dim
        groups = attention.num_key_value_groups
        num_heads, rest = divmod(attention.o_proj.in_features, head_dim)
        num_kv_heads = num_heads // groups
        if rest or num_kv_heads * groups != num_heads or head_dim % 32 or head_dim > 256:
            raise NotNative(f"{num_heads} heads of {head_dim} in layer {index}")
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        if self.family.fused:
            to.qkv = self._split(attention.qkv_proj, sizes)
        else:
            to.qkv = self._linear([attention.q_proj, attention.k_proj, attention.v_proj])
        if [to.qkv.matrices[i].num_rows for i in range(3)] != sizes:
            raise NotNative(f"projections of other sizes in layer {index}")
        to.output = self._linear([attention.o_proj])
        if self.family.head_norms:
            to.query_norm = self._norm(attention.q_norm, head_dim)
            to.key_norm = self._norm(attention.k_norm, head_dim)
        if self.family.window_of_config:
            window = getattr(self.config, "sliding_window", None)
        else:
            window = getattr(attention, "sliding_window", None)
        softcap = None
        if self.family.softcaps_scores:
            softcap = attention.attn_logit_softcapping
        to.attention.num_heads = num_heads
        to.attention.num_kv_heads = num_kv_heads
        to.attention.head_dim = head_dim
        to.attention.scale = attention.scaling * _LOG2_E
        to.attention.softcap = (softcap or 0.0) * _LOG2_E
        to.attention.window = window or 0
        if self.family.rope_by_layer_type:
            to.rope = rope_tables(self.module).index(attention.layer_type)
        if self.layout is not None:
            to.attention.block_size = self.layout.block_size
            to.attention.layer_offset = self.layout.layer_offsets[index]

    def _embedding(self, spec: library.Decoder, embedding: Any) -> None:
        scale = getattr(embedding, "embed_scale", None)
        if type(embedding) is not nn.Embedding and scale is None:
            raise NotNative(f"an embedding of type {type(embedding).__name__}")
        self._weight(embedding.weight, (self.config.vocab_size, self.hidden_size))
        spec.embedding = embedding.weight.data_ptr()
        if scale is not None:
            spec.embedding_scale = float(scale.to(torch.bfloat16))

    def _activation(self, mlp: Any) -> int:
        function = mlp.activation_fn if self.family.fused else mlp.act_fn
        name = type(function).__name__
        if name not in _ACTIVATIONS:
            raise NotNative(f"the activation {name}")
        return _ACTIVATIONS[name]

    def _rotary_dim(self, rotary: Any) -> int:
        kinds = rope_tables(self.module)
        names = [f"{kind}_inv_freq" if kind else "inv_freq" for kind in kinds]
        sizes = {2 * getattr(rotary, name).numel() for name in names}
        if len(sizes) > 1 or len(names) > 2:
            raise NotNative("rotations of several sizes")
        return int(sizes.pop())

    def _norm(self, norm: Any, size: int) -> library.Norm:
        if not type(norm).__name__.endswith("RMSNorm"):
            raise NotNative(f"a norm of type {type(norm).__name__}")
        self._weight(norm.weight, (size,))
        eps = norm.eps if self.family.norm_plus_one else norm.variance_epsilon
        return library.Norm(norm.weight.data_ptr(), eps, self.family.norm_plus_one)

    def _linear(self, modules: list[Any]) -> library.Linear:
        linear = library.Linear(num_matrices=len(modules), width=modules[0].in_features)
        for index, module in enumerate(modules):
            self._check_linear(module)
            if module.in_features != linear.width:
                raise NotNative("projections of one input with different widths")
            linear.matrices[index] = library.Matrix(
                module.weight.data_ptr(),
                module.bias.data_ptr() if module.bias is not None else None,
                module.out_features,
            )
            linear.num_outputs += module.out_features
        return linear

    def _split(self, module: Any, sizes: list[int]) -> library.Linear:
        """One matrix as several: its rows belong to one after the other."""
        self._check_linear(module)
        if sum(sizes) != module.out_features:
            raise NotNative("a fused projection of another size")
        linear = library.Linear(
            num_matrices=len(sizes), width=module.in_features, num_outputs=module.out_features
        )
        start = 0
        for index, size in enumerate(sizes):
            bias = module.bias
            linear.matrices[index] = library.Matrix(
                module.weight.data_ptr() + start * module.in_features * 2,
                bias.data_ptr() + start * 2 if bias is not None else None,
                size,
            )
            start += size
        return linear

    def _check_linear(self, module: Any) -> None:
        if type(module) is not nn.Linear:
            raise NotNative(f"a linear layer of type {type(module).__name__}")
        rows, width = module.out_features, module.in_features
        if width % 32 or (rows % 32 and module is not self.module.lm_head):
            raise NotNative(f"a matrix of {rows} x {width}: not multiples of 32")
        self._weight(module.weight, (rows, width))
        if module.bias is not None:
            self._weight(module.bias, (rows,))

    def _weight(self, tensor: Any, shape: tuple[int, ...]) -> None:
        if tensor.device.type != "cpu" or tensor.dtype != torch.bfloat16:
            raise NotNative(f"weights in {tensor.dtype} on {tensor.device.type}")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise NotNative(f"a weight laid out as {list(tensor.shape)}, {tensor.stride()}")
        self.kept.append(tensor)
        self.seen.add(id(tensor))
