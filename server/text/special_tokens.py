"""The special tokens that a model's files name, as templates know them: `bos_token` and the like.

Owns the rules of `transformers` for what has which name. Invariant: the names and texts are those
of its `special_tokens_map` for the same files. Pure: it is given what the files hold.
"""

from collections.abc import Mapping
from typing import Any, Final

_NAMES: Final = frozenset(
    {
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    }
)
_END_OF_TEXT: Final = "<|endoftext|>"
_LLAMA: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN: Final = dict.fromkeys(("eos_token", "pad_token", "unk_token"), _END_OF_TEXT)
_GPT: Final = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)

CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, str]]] = {
    "CodeLlamaTokenizer": {
        **_LLAMA,
        "eot_token": "▁<EOT>",
        "fill_token": "<FILL_ME>",
        "middle_token": "▁<MID>",
        "prefix_token": "▁<PRE>",
        "suffix_token": "▁<SUF>",
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "cls_token": "<CLS>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "mask_token": "<MASK_TOKEN>",
        "pad_token": "<PAD>",
        "sep_token": "<SEP>",
        "unk_token": "<UNK>",
    },
    "GPT2Tokenizer": _GPT,
    "GPTNeoXTokenizer": {**_GPT, "pad_token": "<|padding|>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    },
    "LlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": _QWEN,
    "Qwen3_5Tokenizer": _QWEN,
}
"""What decoders' tokenizers have where their files do not say, by the class's name."""


def named_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Their texts. `config` is what tokenizer_config.json holds; `older` special_tokens_map.json,
    which counts where the former does not list the added tokens."""
    said = config if "added_tokens_decoder" in config else {**config, **older}
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    found = dict(CLASS_DEFAULTS.get(kind, {}))
    extra = said.get("extra_special_tokens")
    named = {**said, **(extra if isinstance(extra, dict) else {})}
    for name, value in named.items():
        is_extra = isinstance(extra, dict) and name in extra
        if not (name in _NAMES or name.endswith("_token") or is_extra):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
        elif value is None:
            found.pop(name, None)
    return found
