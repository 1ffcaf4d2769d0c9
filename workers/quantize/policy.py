"""Which tensors of a checkpoint are rounded, which are kept, and which nobody could describe. Pure.

Owns the table, by the names that tensors have in files. Invariant: every tensor is decided, with a
reason to tell; what no line knows is refused, never left as it is without a word. That the names
are those of linears is tested with every family that is served. Does not know files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from workers.errors import QuantizationRefused

Action = Literal["round", "keep", "refuse"]

_FLOATS: Final = ("BF16", "F16", "F32")


def _weight_of(*modules: str) -> str:
    """A pattern for the weight of a module that is called so."""
    return rf"(^|\.)({'|'.join(modules)})\.weight$"


_EMBEDDING: Final = _weight_of(
    *("embed_tokens", "embed_tokens_per_layer", "embed_positions", "embed_in", "wte", "wpe"),
    *("word_embeddings", "position_embeddings", "token_type_embeddings", "tok_embeddings"),
    *("embeddings", "rel_embeddings", "relative_attention_bias"),
)
_HEAD: Final = _weight_of("lm_head", "embed_out", "output_projection", r"cls\.predictions\.decoder")
_BLOCKS: Final = r"\.(mlp|moe|block_sparse_moe|feed_forward|ffn)"
_ROUTER: Final = rf"{_BLOCKS}\.((gate|router)(\.\w+)*|shared_expert_gate\.weight)$"
_EXPERTS: Final = r"\.experts\.(gate_up_proj|down_proj|gate_proj|up_proj|w1|w2|w3)(\.weight)?$"
_FUSED_EXPERTS: Final = _weight_of(r"block_sparse_moe\.(input_linear|output_linear)")
_EXPERTS_BIAS: Final = r"\.experts\.\w+_bias$"
_CONVOLUTION: Final = r"(^|\.)(\w*conv\w*(\.\w+)*|patch_embed\.proj)\.weight$"
_MEDIA: Final = (
    r"(^|\.)(vision_tower|vision_model|visual|audio_tower|audio_model|multi_modal_projector|"
    r"embed_vision|embed_audio)\."
)
_TRANSPOSED: Final = _weight_of("c_attn", "c_proj", "c_fc", "q_attn")
_WITH_TRANSPOSED: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose linears are Conv1D of transformers."""
_HEADS: Final = {"biogpt": "output_projection"}
"""Model types whose output head is not called lm_head."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What a person says in place of the table."""

    keep: tuple[str, ...] = ()
    """Patterns of names that are kept, searched anywhere in a name."""
    rounds_head: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor. `module` is the linear's name, where a tensor is a matrix that an
    engine might take for a rounded one."""

    action: Action
    reason: str
    module: str | None = None


def decide(
    name: str, dtype: str, shape: Sequence[int], model_type: str, choices: Choices
) -> Decision:
    """Of the tensor with this name in its file. Raises QuantizationRefused where a pattern is
    none."""
    module = name.removesuffix(".weight") if name.endswith(".weight") and len(shape) == 2 else None
    if any(_searched(pattern, name) for pattern in choices.keep):
        return Decision("keep", "by --keep", module)
    if len(shape) < 2 or 0 in shape:
        return Decision("keep", "vectors")
    if re.search(_MEDIA, name):
        return Decision("keep", "images and audio", module)
    if re.search(_EMBEDDING, name):
        return Decision("keep", "embeddings")
    if re.search(_HEAD, name):
        if not choices.rounds_head:
            return Decision("keep", "output head", module)
    elif re.search(_ROUTER, name):
        return Decision("keep", "routers", module)
    if re.search(_EXPERTS_BIAS, name):
        return Decision("keep", "vectors")
    if re.search(_CONVOLUTION, name):
        return Decision("keep", "convolutions")
    if dtype not in _FLOATS:
        return Decision("refuse", f"its dtype is {dtype}, which is not rounded")
    if (re.search(_EXPERTS, name) and len(shape) == 3) or re.search(_FUSED_EXPERTS, name):
        return Decision("refuse", "experts in one tensor have no place in compressed-tensors")
    if model_type in _WITH_TRANSPOSED and re.search(_TRANSPOSED, name):
        return Decision("refuse", "a transposed linear has no place in compressed-tensors")
    if module is not None:
        return Decision("round", "linears", module)
    return Decision("refuse", "it is no linear's weight, and not known otherwise")


def _searched(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise QuantizationRefused(
            f"--keep {pattern!r} is no regular expression: {error}"
        ) from error


def head_module(names: Sequence[str], model_type: str) -> str | None:
    """The output head of transformers where it is the embedding, so that no file has a tensor of
    its own: it is a linear that was not rounded, too."""
    if any(re.search(_HEAD, name) for name in names):
        return None
    return _HEADS.get(model_type, "lm_head")
