"""By which method a Hugging Face folder is quantized, in the words that its own files have. Pure.

Invariant: whatever was quantized has a name here, so that it is refused by it before its numbers
are taken for weights. Does not know files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeGuard

SIDE_FILES: Final[Mapping[str, str]] = {
    "hf_quant_config.json": "modelopt",
    "quant_config.json": "awq",
    "quantize_config.json": "gptq",
}
"""Files in which tools have kept what config.json says today, and whose they are."""

QUANTIZATION_KEYS: Final = ("quantization_config", "compression_config")
"""Of config.json."""
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
        for key in QUANTIZATION_KEYS:
            said = part.get(key) if isinstance(part, Mapping) else None
            if said is not None and said != {}:
                return _method(said if isinstance(said, Mapping) else {})
    return None


@dataclass(frozen=True, slots=True)
class StoredLevels:
    """Weights that are stored as levels and scales, in a way from which they can be had again."""

    told: str
    """As a person calls the method."""
    layout: Literal["rows", "gptq", "awq"]
    """Words along rows, as compressed-tensors and fp8 have it, or those of the two others."""
    num_bits: int = 4
    zero_is_one_less: bool = False
    """Whether zero points are stored less 1, as the first form of GPTQ has it."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, where the config says it."""


def stored_levels(config: Mapping[str, Any]) -> StoredLevels | None:
    """What config.json says of weights that can be expanded; None where it says nothing, or a
    method of which they can't be had."""
    said = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(said, Mapping) or not isinstance(method := said.get("quant_method"), str):
        return None
    told, bits = _method(said), said.get("bits") or said.get("w_bit")
    if method == "compressed-tensors":
        formats = {said.get("format"), *_formats(said)} - {None, "mixed-precision"}
        if formats <= _FORMATS and not said.get("transform_config") and not _is_sparse(said):
            blocks = set(_blocks(said))
            if len(blocks) <= 1:
                return StoredLevels(told, "rows", block=next(iter(blocks), None))
    elif method in ("fp8", "fbgemm_fp8"):
        block = said.get("weight_block_size")
        if block is None:
            return StoredLevels(told, "rows")
        if _are_sizes(block, 2):
            return StoredLevels(told, "rows", block=(block[0], block[1]))
    elif method == "gptq" and bits in (4, 8):
        form = said.get("checkpoint_format") or "gptq"
        if form in ("gptq", "gptq_v2"):
            return StoredLevels(told, "gptq", bits, zero_is_one_less=form == "gptq")
    elif method == "awq" and bits == 4 and str(said.get("version", "gemm")).lower() == "gemm":
        return StoredLevels(told, "awq", bits)
    return None


_FORMATS: Final = frozenset(
    {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense"}
)


def _formats(said: Mapping[str, Any]) -> Iterable[Any]:
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        yield group.get("format") if isinstance(group, Mapping) else None


def _blocks(said: Mapping[str, Any]) -> Iterable[tuple[int, int]]:
    """Of the groups that have any."""
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        block = weights.get("block_structure") if isinstance(weights, Mapping) else None
        if _are_sizes(block, 2):
            yield block[0], block[1]


def _is_sparse(said: Mapping[str, Any]) -> bool:
    sparsity = said.get("sparsity_config")
    return bool(sparsity) and sparsity != {"format": "dense"}


def _are_sizes(value: Any, count: int) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in value)
    )


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
