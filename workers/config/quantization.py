"""By which method a Hugging Face folder is quantized, in the words that its own files have. Pure.

Invariant: whatever was quantized has a name here, so that it is refused by it before its numbers
are taken for weights. Does not know files.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

SIDE_FILES: Final[Mapping[str, str]] = {
    "hf_quant_config.json": "modelopt",
    "quant_config.json": "awq",
    "quantize_config.json": "gptq",
}
"""Files in which tools have kept what config.json says today, and whose they are."""

_CONFIGS: Final = ("quantization_config", "compression_config")
_TENSORS: Final = (
    (".qweight", "gptq or awq"),
    (".qzeros", "gptq or awq"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".weight_scale", "compressed-tensors or fp8"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    ("_proj_blocks", "mxfp4"),
)
"""What names end in, beside weights that are whole."""


def named_method(config: Mapping[str, Any]) -> str | None:
    """What config.json says, of the model or of the text model in it; None where it says that
    nothing was quantized."""
    for part in (config, config.get("text_config")):
        for key in _CONFIGS:
            said = part.get(key) if isinstance(part, Mapping) else None
            if said is not None and said != {}:
                return _method(said if isinstance(said, Mapping) else {})
    return None


def method_of_tensors(names: Iterable[str]) -> str | None:
    """By the names of tensors alone, where no file says anything."""
    for name in names:
        for ending, method in _TENSORS:
            if name.endswith(ending):
                return method
    return None


def _method(said: Mapping[str, Any]) -> str:
    method = said.get("quant_method")
    if method is None and (said.get("load_in_8bit") or said.get("load_in_4bit")):
        method = "bitsandbytes"
    if method is None:
        method = said.get("quant_algo") or "unknown"
    bits = said.get("bits") or said.get("w_bit")
    shown = str(method)[:80]
    return f"{shown}, {bits} bits" if isinstance(bits, int) else shown
