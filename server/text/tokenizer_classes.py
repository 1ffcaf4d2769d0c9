"""What the class of a tokenizer means, which transformers would make of a folder.

Owns the tables: which models' tokenizers have a class that counts, what special tokens it has where
no file names them, and how it cuts text where that is not as tokenizer.json says. They are those of
transformers, held against it by the tests. Pure.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

_BERT: Final = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA: Final = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_LLAMA: Final = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GPT2: Final = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_QWEN2: Final = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, str]]] = {
    "AlbertTokenizer": {
        **_BERT,
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
    "BertTokenizer": _BERT,
    "BioGptTokenizer": {k: v for k, v in _ROBERTA.items() if k not in ("cls_token", "mask_token")},
    "CamembertTokenizer": _ROBERTA,
    "CodeLlamaTokenizer": _LLAMA,
    "CohereTokenizer": {
        "unk_token": "<UNK>",
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
    "DebertaTokenizer": {**_BERT, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "DebertaV2Tokenizer": {**_BERT, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": {**_GPT2, "pad_token": "<|padding|>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "LlamaTokenizer": _LLAMA,
    "MPNetTokenizer": {**_ROBERTA, "unk_token": "[UNK]"},
    "Qwen2Tokenizer": _QWEN2,
    "RobertaTokenizer": _ROBERTA,
    "XLMRobertaTokenizer": _ROBERTA,
}
"""Of the classes of `transformers` whose models are served: without "Fast" at their end, which
means the same. A class that is not here has none, or no model."""

AS_WRITTEN: Final = frozenset(
    {
        "beam",
        "ernie4_5",
        "ernie4_5_moe",
        "flex_olmo",
        "glm",
        "glm4",
        "glm4_moe",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "modernbert",
        "modernbert-decoder",
        "nemotron",
        "olmo2",
        "olmo3",
        "persimmon",
        "phi3",
        "phimoe",
        "stablelm",
    }
)
"""Types of models whose tokenizer.json is taken as it is written, whatever class is named."""
CLASS_OF: Final[Mapping[str, str]] = {
    "albert": "AlbertTokenizer",
    "bert": "BertTokenizer",
    "biogpt": "BioGptTokenizer",
    "camembert": "CamembertTokenizer",
    "cohere": "CohereTokenizer",
    "cohere2": "CohereTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "jais2": "GPT2Tokenizer",
    "mpnet": "MPNetTokenizer",
    "olmo": "GPTNeoXTokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "opt": "GPT2Tokenizer",
    "phi": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "starcoder2": "GPT2Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
"""By model_type: the class where the folder names none."""
_NOT_WHAT_IS_NAMED: Final = frozenset({"qwen2"})
"""Whose folders name a wrong class often: the model's own counts."""


def tokenizer_class(
    model: Mapping[str, Any], config: Mapping[str, Any], is_byte_level: bool
) -> str | None:
    """The one that counts, without "Fast"; None where tokenizer.json alone does. Of config.json and
    tokenizer_config.json; `is_byte_level` is said of what tokenizer.json cuts."""
    model_type = str(model.get("model_type"))
    if model_type in AS_WRITTEN:
        return None
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not isinstance(named, str) or model_type in _NOT_WHAT_IS_NAMED:
        named = CLASS_OF.get(model_type)
    name = None if named is None else named.removesuffix("Fast")
    return None if name == "LlamaTokenizer" and is_byte_level else name  # as Llama 3 has it


def defaults_of(name: str | None) -> Mapping[str, str]:
    """The special tokens of a class, by role."""
    return CLASS_DEFAULTS.get(str(name), {})


def made_as_its_class(
    name: str | None, config: Mapping[str, Any], parts: Mapping[str, msgspec.Raw]
) -> dict[str, msgspec.Raw]:
    """What replaces parts of a tokenizer.json. A LlamaTokenizer puts a blank before a text, and not
    behind each special token as most files say that were converted from SentencePiece; with
    `legacy` it does. Raises msgspec.DecodeError, KeyError."""
    if name != "LlamaTokenizer":
        return {}
    if msgspec.json.decode(parts["model"], type=_Kind).type != "BPE":
        return {}
    prefix = config.get("add_prefix_space") is not False
    scheme = "always" if config.get("legacy") is True else "first"
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    made: dict[str, Any] = {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme if prefix else "never",
            "split": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
    }
    return {part: msgspec.Raw(msgspec.json.encode(value)) for part, value in made.items()}


class _Kind(msgspec.Struct):
    type: str = ""
