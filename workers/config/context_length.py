"""How many positions a decoder was made for, as its config says it in one of several ways. Pure.

Invariant: within that length a token's rotation depends on its own position alone.
"""

from collections.abc import Mapping
from typing import Any, Final

from workers.errors import UnsupportedCheckpoint

_LONGEST: Final = 1 << 31


def max_positions(config: Any) -> int:
    """Of a config of `transformers`. Raises UnsupportedCheckpoint.

    A length that rotations were stretched to counts even where `max_position_embeddings` still says
    the one before, as Qwen's recipe for long texts leaves it: "yarn" says both, of "linear" the
    stated length is the one before. vLLM reckons alike (vllm/config/model.py). But for Gemma 3, who
    states the length after it.

    "longrope" has other frequencies beyond its original length, for the whole batch at once, and
    "dynamic" beyond the stated one: there, a sequence would depend on its neighbours.
    """
    stated = config.max_position_embeddings
    if not isinstance(stated, int) or stated < 1:
        raise UnsupportedCheckpoint(
            f"config.json says that max_position_embeddings is {stated!r}: it can be a number from "
            "1 on"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    each = [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]
    limit: float = stated
    for parameters in each:
        kind = parameters.get("rope_type")
        if kind == "longrope":
            limit = min(limit, _number(parameters, "original_max_position_embeddings"))
        elif kind == "yarn" and parameters.get("factor") is not None:
            original = _number(parameters, "original_max_position_embeddings", stated)
            limit = original * _number(parameters, "factor")
        elif kind == "linear" and "gemma3" not in config.model_type:
            limit = stated * _number(parameters, "factor")
    if limit < 1:
        raise UnsupportedCheckpoint(
            "by its rope_parameters config.json leaves room for no position"
        )
    return int(min(limit, _LONGEST))


def _number(parameters: Mapping[str, Any], name: str, default: int | None = None) -> float:
    value = parameters.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _LONGEST:
        raise UnsupportedCheckpoint(
            f"config.json says in its rope_parameters that {name} is {value!r}: it can be a number "
            "above 0"
        )
    return value
