"""What the class of a tokenizer changes of its tokenizer.json.

Owns the rules of `transformers`, whose classes build parts of a tokenizer anew. Invariant: text
becomes the ids that it becomes there. Of the classes whose published files say something else than
they do there is one: Llama's, whose files put a blank before the text behind each special token,
where the class puts one before the whole alone. Pure: it is given what the files hold.
"""

from collections.abc import Mapping
from typing import Any, Final

from tokenizers import Tokenizer, decoders, pre_tokenizers

AS_THEY_ARE: Final = frozenset(
    {
        "beam",
        "bigbird_pegasus",
        "ernie4_5",
        "ernie4_5_moe",
        "flex_olmo",
        "fuyu",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "got_ocr2",
        "gpt_bigcode",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jamba",
        "kimi_linear",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "modernbert-decoder",
        "nemotron",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "persimmon",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen4_exp",
        "stablelm",
        "xlm-roberta-xl",
    }
)
"""Models, by `model_type`, whose tokenizer.json counts though their files name Llama's class."""


def as_its_class_has_it(tokenizer: Tokenizer, config: Mapping[str, Any], model_type: str) -> None:
    """Changes the tokenizer. `config`: what tokenizer_config.json holds. What `add_bos_token` says
    there counts only where there is no tokenizer.json."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "LlamaTokenizer" and model_type not in AS_THEY_ARE and not _is_byte_level(tokenizer):
        _as_llama(tokenizer, config)


def _as_llama(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    prefixed = config.get("add_prefix_space") is not False
    first = "always" if config.get("legacy") else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=first if prefixed else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    parts = (tokenizer.pre_tokenizer, tokenizer.decoder)
    return any(b"ByteLevel" in part.__getstate__() for part in parts if part is not None)
