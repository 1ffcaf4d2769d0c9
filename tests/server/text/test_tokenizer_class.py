"""A folder's tokenizer makes the ids that transformers makes with its class."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from transformers.models.auto import tokenization_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from server.text.text import Text
from server.text.tokenizer_class import AS_THEY_ARE
from tests.server.text.sentencepiece_tokenizer import sentencepiece_tokenizer

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXTS = (
    "hello world",
    " hello  world ",
    "",
    "<s>hello</s>world",
    "<s> hello </s> world",
    "[INST] the cat [/INST]",
    "a\n\nb\tc",
    "日本語 🎉 é",
    "▁hello ▁ world",
)
LLAMA = {"tokenizer_class": "LlamaTokenizer", **ROLES}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES}


def test_the_models_whose_files_count_are_those_of_transformers() -> None:
    theirs = set()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = (tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model_type) or "").removesuffix(
            "Fast"
        )
        is_wrong = model_type in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        if is_wrong or kind in (
            "TokenizersBackend",
            "PythonBackend",
            "PreTrainedTokenizerFast",
            "MistralCommonBackend",
        ):
            theirs.add(model_type)
    assert theirs == AS_THEY_ARE


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (LLAMA, {"model_type": "llama"}),
        ({**LLAMA, "tokenizer_class": "LlamaTokenizerFast"}, {"model_type": "llama"}),
        ({**LLAMA, "legacy": True}, {"model_type": "llama"}),
        ({**LLAMA, "legacy": False}, {"model_type": "llama"}),
        ({**LLAMA, "add_prefix_space": False}, {"model_type": "llama"}),
        ({**LLAMA, "add_bos_token": False}, {"model_type": "llama"}),
        ({**LLAMA, "add_bos_token": True, "add_eos_token": True}, {"model_type": "llama"}),
        (LLAMA, {"model_type": "phi3"}),
        (LLAMA, {"model_type": "gemma2"}),
        (FAST, {"model_type": "llama"}),
        ({**FAST, "add_bos_token": False}, {"model_type": "llama"}),
        ({**FAST, "add_bos_token": True, "add_eos_token": True}, {"model_type": "llama"}),
        ({**FAST, "add_bos_token": True, "bos_token": None}, {"model_type": "llama"}),
        (FAST, None),
    ],
)
def test_ids_and_texts_are_those_of_transformers(
    tmp_path: Path, config: dict[str, Any], model: dict[str, Any] | None
) -> None:
    sentencepiece_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if model is not None:
        (tmp_path / "config.json").write_text(json.dumps(model))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Text.load(tmp_path)
    ours.close()
    for text in TEXTS:
        ids = asyncio.run(ours.encode(text, context_tokens=999))
        assert ids == theirs.encode(text), text
        plain = asyncio.run(ours.encode(text, context_tokens=999, add_special_tokens=False))
        assert plain == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_a_byte_level_tokenizer_stays_as_it_is(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"})
    )
    ours = Text.load(tmp_path)
    ours.close()
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert asyncio.run(ours.encode(text, context_tokens=999)) == theirs.encode(text).ids
