"""What a GGUF file says of its model, asked key by key.

Owns which keys have been heard. Invariant: nothing that the file says of the model is passed over:
it is asked for, known to change nothing with the value that it has, or the file is refused by name,
since leaving it out would compute another model. Does not know architectures.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

from gguf.constants import MODEL_ARCH_NAMES

from workers.errors import UnsupportedCheckpoint

ADVICE: Final = "give the safetensors checkpoint"

Shape = tuple[int, ...]


def _is(*neutral: object) -> Callable[[Any], bool]:
    return lambda value: value in neutral


def _anything(_value: Any) -> bool:
    return True


_WITHOUT_EFFECT: Final[Mapping[str, Callable[[Any], bool]]] = {
    "attention.causal": _is(True),
    "attention.clamp_kqv": _is(0),
    "attention.max_alibi_bias": _is(0),
    "attention.shared_kv_layers": _is(0),
    "attention.sliding_window": _is(0),
    "attention.temperature_scale": _is(0),
    "attn_logit_softcapping": _is(0),
    "embedding_scale": _is(0, 1),
    "expert_count": _is(0),
    "expert_group_count": _is(0, 1),
    "expert_group_used_count": _is(0, 1),
    "expert_shared_count": _is(0),
    "expert_used_count": _is(0),
    "expert_weights_scale": _is(0, 1),
    "final_logit_softcapping": _is(0),
    "leading_dense_block_count": _is(0),
    "logit_scale": _is(0, 1),
    "nextn_predict_layers": _is(0),
    "pooling_type": _anything,  # of vectors, which are not made from a GGUF file
    "residual_scale": _is(0, 1),
    "rope.scaling.attn_factor": _is(1),
    "rope.scaling.finetuned": _anything,
    "rope.scaling.original_context_length": _anything,  # without a scaling
    "rope.scaling.type": _is("none"),
    "rope.scaling.yarn_attn_factor": _is(1),
    "rope.scaling.yarn_ext_factor": _is(1),
    "rope.scaling.yarn_log_multiplier": _is(0),
    "router_logit_softcapping": _is(0),
    "tensor_data_layout": _anything,
    "vocab_size": _anything,  # the embedding's rows are counted
}
"""Keys that may stay unheard with these values."""

_OTHER_PARTS: Final = frozenset({"adapter", "clip", "diffusion", "xielu"})
"""What stands before keys that say something of a model under no architecture's name."""


class Metadata:
    """Of one file. Keys are without the architecture's name before them."""

    def __init__(
        self,
        architecture: str,
        keys: Iterable[str],
        get: Callable[[str], Any],
        shapes: Mapping[str, Shape],
    ):
        """`get` gives what the file says under a whole key, `shapes` are those of its tensors, as
        torch has them."""
        self.architecture = architecture
        self.shapes = shapes
        self._keys = frozenset(keys)
        self._get = get
        self._heard: set[str] = set()
        self.tensors_read: set[str] = set()
        """Whose values the config is made of."""

    def get(self, key: str, default: Any = None) -> Any:
        """What the file says; a value that all layers have is given once. Raises
        UnsupportedCheckpoint where layers differ."""
        value = self.each(key)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedCheckpoint(
                    f"it says {key} = {_shown(value)}, another for each layer: {ADVICE}"
                )
            value = value[0]
        return default if value is None else value

    def each(self, key: str) -> Any:
        """As the file has it, a list too; None where it says nothing."""
        whole = key if key.partition(".")[0] in _OTHER_PARTS else f"{self.architecture}.{key}"
        self._heard.add(whole)
        return _short(self._get(whole)) if whole in self._keys else None

    def has(self, tensor: str) -> bool:
        """Whether the first layer, or the model, has such a tensor."""
        return tensor in self.shapes or f"blk.0.{tensor}" in self.shapes

    def tensor_names(self) -> Collection[str]:
        return self.shapes.keys()

    def check_all_heard(self) -> None:
        """Raises UnsupportedCheckpoint for what nobody has asked for and would change tokens."""
        architectures = frozenset(MODEL_ARCH_NAMES.values())
        for key in sorted(self._keys - self._heard):
            owner, _, rest = key.partition(".")
            if owner == self.architecture:
                without_effect = _WITHOUT_EFFECT.get(rest)
                if without_effect is not None and without_effect(self._get(key)):
                    continue
            elif owner not in architectures | _OTHER_PARTS:
                continue  # of its tokenizer, its history, or who made it
            raise UnsupportedCheckpoint(
                f"it says {rest} = {_shown(self._get(key))}, which is not computed here for "
                f"{self.architecture}: {ADVICE}"
            )


def _short(value: Any) -> Any:
    """Numbers as somebody wrote them before they were stored in 32 bits: 1e-05, not
    9.999999747378752e-06."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float):
        import numpy as np

        short = float(str(np.float32(value)))
        return short if np.float32(short) == np.float32(value) else value
    return value


def _shown(value: Any) -> str:
    return str(value)[:80]
