"""How a GGUF file's model turns queries and keys by their positions, in the words of
`transformers`.

Owns the step from llama.cpp's keys and tensors of rotations to `rope_parameters`. Invariant: what
is not known exactly is refused by name. Does not know architectures.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch

from workers.checkpoint.formats.gguf_metadata import ADVICE, Metadata
from workers.errors import UnsupportedCheckpoint

SLOWED: Final = "rope_freqs.weight"
LONG: Final = "rope_factors_long.weight"
SHORT: Final = "rope_factors_short.weight"

_DEFAULT_BASE: Final = 10_000.0
"""Where the file does not say, as llama.cpp has it."""
_ORIGINAL_CONTEXT: Final = 8192
"""Of every Llama 3."""
_LOW, _HIGH = 1.0, 4.0
"""Its bounds, in turns within that context."""

_LLAMA3_FACTORS: Final = (8.0, 32.0)
"""Of Llama 3.1 and 3.3, and of the small ones of Llama 3.2 (their config.json): where the slowest
rotation is still too quick to show it."""

ReadTensor = Callable[[str], torch.Tensor]


def rope_parameters(said: Metadata, head_dim: int, read: ReadTensor) -> dict[str, Any]:
    """Of the layers that see all positions. `read` gives a tensor of the file in fp32. Raises
    UnsupportedCheckpoint."""
    found: dict[str, Any] = {"rope_theta": float(said.get("rope.freq_base", _DEFAULT_BASE))}
    turned = said.get("rope.dimension_count", head_dim)
    if not 0 < turned <= head_dim:
        raise UnsupportedCheckpoint(
            f"it says rope.dimension_count = {turned} where heads are of {head_dim}: {ADVICE}"
        )
    found["partial_rotary_factor"] = _fraction(turned, head_dim)
    return found | _scaling(said, found["rope_theta"], turned, read)


def local_base(said: Metadata, default: float) -> float:
    """That of the layers that see a window."""
    return float(said.get("rope.freq_base_swa", default))


def _fraction(part: int, whole: int) -> float:
    """A number of which int(whole * it) is exactly `part`."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 2.0)


def _scaling(said: Metadata, base: float, turned: int, read: ReadTensor) -> dict[str, Any]:
    if said.has(LONG) or said.has(SHORT):
        return _longrope(said, read)
    if said.has(SLOWED):
        return _llama3(read(SLOWED), base, turned)
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear", 1.0))
    kind = said.get("rope.scaling.type", "linear")  # as llama.cpp takes a factor alone
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return {"rope_type": "default"}
    if not factor > 0:
        raise UnsupportedCheckpoint(
            f"it scales rotations by {kind!r} and a factor of {factor}: download it again"
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn":
        return _yarn(said, float(factor))
    raise UnsupportedCheckpoint(f"it scales rotations by {kind!r}, which is not known: {ADVICE}")


def _yarn(said: Metadata, factor: float) -> dict[str, Any]:
    context = said.get("context_length")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": said.get(
            "rope.scaling.original_context_length", context
        ),
    }
    for key, name in (
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
        ("yarn_attn_factor", "attention_factor"),
    ):
        if (value := said.get(f"rope.scaling.{key}")) is not None:
            found[name] = value
    return found


def _longrope(said: Metadata, read: ReadTensor) -> dict[str, Any]:
    context = said.get("context_length")
    original = said.get("rope.scaling.original_context_length", context)
    said.get("rope.scaling.type")
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "long_factor": [_plain(value) for value in read(LONG)],
        "short_factor": [_plain(value) for value in read(SHORT)],
    }
    usual = _longrope_scale(context / original, original)
    scale = said.get("rope.scaling.attn_factor", usual)
    if not math.isclose(scale, usual, rel_tol=1e-5):
        found["attention_factor"] = scale
    return found


def _longrope_scale(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _plain(value: torch.Tensor) -> float:
    """As it was written before it was stored in 32 bits."""
    return float(str(value.numpy()))


def _llama3(factors: torch.Tensor, base: float, turned: int) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that give these `factors` # [turned / 2]: the file
    holds its result, and transformers wants its causes."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = 1.0 / base ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    if factors.shape == plain.shape and bool((factors == 1).all()):
        return {"rope_type": "default"}
    for factor in (float(factors.max()), *_LLAMA3_FACTORS):
        parameters = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": _original_context(factors, factor, plain),
        }
        config = LlamaConfig(
            head_dim=turned,
            max_position_embeddings=1 << 30,
            rope_parameters={**parameters, "rope_theta": base},
        )
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if factors.shape == plain.shape and torch.allclose(plain / scaled, factors, rtol=1e-4):
            return parameters
    raise UnsupportedCheckpoint(
        f"it slows rotations down by {SLOWED}, and not as Llama 3 does: {ADVICE}"
    )


def _original_context(factors: torch.Tensor, factor: float, plain: torch.Tensor) -> int:
    """Between the two lengths of a turn where scaling begins and ends, a factor tells it."""
    between = (factors > 1.001) & (factors < factor * 0.999)
    if factor <= 1 or factors.shape != plain.shape or not bool(between.any()):
        return _ORIGINAL_CONTEXT
    at = int(between.nonzero()[0])
    smooth = (1 / float(factors[at]) - 1 / factor) / (1 - 1 / factor)
    length = 2 * math.pi / float(plain[at])
    return max(1, round(length * (smooth * (_HIGH - _LOW) + _LOW)))
