"""The families that the native decoder computes, each as a row of a table.

Owns what the code of a model class says and its modules don't show: which module is what, and how
they are joined. Invariant: a family is data; what it needs of the kernels is one of the choices
that they offer. Does not know how modules are read (`architecture`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final


class NormKind(IntEnum):
    """rows.h's."""

    NONE = 0
    RMS = 1
    """w * bf16(x / rms)"""
    RMS_PLUS_ONE = 2
    """(1 + w) * (x / rms)"""
    RMS_UNROUNDED = 3
    """w * (x / rms)"""
    LAYER = 4
    """w * (x - mean) / deviation + b"""


class Rotation(IntEnum):
    """rows.h's."""

    HALVES = 0
    """Elements i and i + half turn together; products are rounded."""
    HALVES_UNROUNDED = 1
    PAIRS_UNROUNDED = 2
    """Elements 2 i and 2 i + 1 turn together."""


class Residual(IntEnum):
    """description.h's: how the two sublayers join the residual stream x."""

    ONE_BY_ONE = 0
    """x += attention(x); x += mlp(x)"""
    TOGETHER = 1
    """x += attention(x) + mlp(x)"""
    ONE_AFTER_OTHER = 2
    """x = (x + attention(x)) + mlp(x), both of the same x"""
    NORMED_SUMS = 3
    """x = norm(x + attention(x)); x = norm(x + mlp(x))"""


ACTIVATIONS: Final = {
    "SiLUActivation": 0,
    "SiLU": 0,
    "GELUTanh": 1,
    "NewGELUActivation": 1,
    "FastGELUActivation": 1,
    "GELUActivation": 2,
    "ReLU": 3,
    "ReLUSquaredActivation": 4,
}
"""Class of the activation → rows.h's number."""


@dataclass(frozen=True, slots=True)
class Names:
    """Attributes of the modules, or dotted paths."""

    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    """Empty: there is none."""
    head: str = "lm_head"
    """Empty: there is none."""
    attention: str = "self_attn"
    """Empty: its parts are the layer's."""
    head_dim: str = "head_dim"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    mlp: str = "mlp"
    """Empty: its parts are the layer's."""
    gate: str = "gate_proj"
    """Empty: there is none."""
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    queries_keys_values: str = ""
    """One matrix for all three: all queries, all keys, all values."""
    by_heads: str = ""
    """One matrix for all three: of each head its query, key and value."""
    gate_and_up: str = ""
    """One matrix for both."""


@dataclass(frozen=True, slots=True)
class Norms:
    """Attributes of a layer; empty: none. A norm after a sublayer comes before the sum."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One model class."""

    names: Names = Names()
    norm: NormKind = NormKind.RMS
    norms: Norms = Norms()
    head_norms: str = ""
    """Of queries and keys: "each" head by itself, or "all" heads together."""
    rotation: Rotation = Rotation.HALVES
    rope_by_layer_type: bool = False
    """Layer types have rotations of their own."""
    unrotated: str = ""
    """An attention's attribute that says, where false, that it does not rotate."""
    window: str = ""
    """Of "config", or the attribute of an "attention" that holds it."""
    residual: Residual = Residual.ONE_BY_ONE
    residual_flag: str = ""
    """A layer's attribute that says, where false, that sublayers are added one by one."""
    experts: str = ""
    """Attribute of the MLP that holds experts, where it has any."""
    rounds_expert_weights: bool = True
    normalizes_flag: str = ""
    """A router's attribute that says whether weights add up to 1; empty: they do."""
    softcaps_scores: bool = False
    softcaps_logits: bool = False
    factors: Mapping[str, str] = field(default_factory=dict)
    """"embedding", "residual", "logits" and "logits_divisor" → the config's attribute."""
    unless: tuple[str, ...] = ()
    """Attributes of the config that may not be set."""
    sees_all: bool = False
    """A token attends to those behind it, too."""
    rotates: bool = True
    embedding_norm: str = ""
    """Of the sum of a token's embedding, that of its type and that of its position."""
    type_embedding: str = ""
    position_embedding: str = ""


_GEMMA_NORMS: Final = Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_NORMS_AFTER: Final = Norms(
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
)

_BERT_NAMES: Final = Names(
    layers="encoder.layer",
    embedding="embeddings.word_embeddings",
    final_norm="",
    head="",
    attention="attention",
    head_dim="self.attention_head_size",
    query="self.query",
    key="self.key",
    value="self.value",
    output="output.dense",
    mlp="",
    gate="",
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
)
_BERT: Final = Family(
    names=_BERT_NAMES,
    norm=NormKind.LAYER,
    norms=Norms(
        before_attention="",
        after_attention="attention.output.LayerNorm",
        before_mlp="",
        after_mlp="output.LayerNorm",
    ),
    residual=Residual.NORMED_SUMS,
    sees_all=True,
    rotates=False,
    embedding_norm="embeddings.LayerNorm",
    type_embedding="embeddings.token_type_embeddings",
    position_embedding="embeddings.position_embeddings",
)

ENCODERS: Final[Mapping[str, Family]] = {
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "XLMRobertaModel": _BERT,
    "CamembertModel": _BERT,
    "ElectraModel": _BERT,
    "DistilBertModel": replace(
        _BERT,
        names=replace(
            _BERT_NAMES,
            layers="transformer.layer",
            head_dim="attention_head_size",
            query="q_lin",
            key="k_lin",
            value="v_lin",
            output="out_lin",
            mlp="ffn",
            up="lin1",
            down="lin2",
            activation="activation",
        ),
        norms=replace(_BERT.norms, after_attention="sa_layer_norm", after_mlp="output_layer_norm"),
        type_embedding="",
    ),
    "NomicBertModel": Family(
        names=Names(embedding="embeddings.word_embeddings", final_norm="", head=""),
        norm=NormKind.LAYER,
        norms=Norms(
            before_attention="",
            after_attention="post_attention_layernorm",
            before_mlp="",
            after_mlp="post_mlp_layernorm",
        ),
        residual=Residual.NORMED_SUMS,
        sees_all=True,
        embedding_norm="embeddings.LayerNorm",
        type_embedding="embeddings.token_type_embeddings",
    ),
}
"""Models without a head whose tokens see each other."""

DECODERS: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window="config"),
    "Qwen2ForCausalLM": Family(window="attention"),
    "Qwen3ForCausalLM": Family(head_norms="each", window="attention"),
    "Qwen3MoeForCausalLM": Family(
        head_norms="each", window="attention", experts="experts", normalizes_flag="norm_topk_prob"
    ),
    "MixtralForCausalLM": Family(window="config", experts="experts", rounds_expert_weights=False),
    "SmolLM3ForCausalLM": Family(window="attention", unrotated="use_rope"),
    "Phi3ForCausalLM": Family(
        names=Names(
            queries_keys_values="qkv_proj", gate_and_up="gate_up_proj", activation="activation_fn"
        ),
        window="config",
    ),
    "GemmaForCausalLM": Family(norm=NormKind.RMS_PLUS_ONE),
    "Gemma2ForCausalLM": Family(
        norm=NormKind.RMS_PLUS_ONE,
        norms=_GEMMA_NORMS,
        window="attention",
        softcaps_scores=True,
        softcaps_logits=True,
    ),
    "Gemma3ForCausalLM": Family(
        norm=NormKind.RMS_PLUS_ONE,
        norms=_GEMMA_NORMS,
        head_norms="each",
        window="attention",
        softcaps_logits=True,
        rope_by_layer_type=True,
    ),
    "Olmo2ForCausalLM": Family(
        norm=NormKind.RMS_UNROUNDED,
        norms=_NORMS_AFTER,
        head_norms="all",
        rotation=Rotation.HALVES_UNROUNDED,
    ),
    "GraniteForCausalLM": Family(
        factors={
            "embedding": "embedding_multiplier",
            "residual": "residual_multiplier",
            "logits_divisor": "logits_scaling",
        }
    ),
    "Starcoder2ForCausalLM": Family(
        names=Names(gate="", up="c_fc", down="c_proj", activation="act"),
        norm=NormKind.LAYER,
        window="config",
    ),
    "PhiForCausalLM": Family(
        names=Names(
            final_norm="final_layernorm",
            output="dense",
            gate="",
            up="fc1",
            down="fc2",
            activation="activation_fn",
        ),
        norm=NormKind.LAYER,
        norms=Norms(before_mlp=""),
        residual=Residual.TOGETHER,
        unless=("qk_layernorm",),
    ),
    "GPTNeoXForCausalLM": Family(
        names=Names(
            base="gpt_neox",
            embedding="embed_in",
            final_norm="final_layer_norm",
            attention="attention",
            head_dim="head_size",
            by_heads="query_key_value",
            output="dense",
            gate="",
            up="dense_h_to_4h",
            down="dense_4h_to_h",
            activation="act",
        ),
        norm=NormKind.LAYER,
        residual=Residual.TOGETHER,
        residual_flag="use_parallel_residual",
    ),
    "CohereForCausalLM": Family(
        norm=NormKind.LAYER,
        norms=Norms(before_mlp=""),
        rotation=Rotation.PAIRS_UNROUNDED,
        residual=Residual.ONE_AFTER_OTHER,
        factors={"logits": "logit_scale"},
        unless=("use_qk_norm",),
    ),
}
