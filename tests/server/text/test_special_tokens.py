"""Special tokens have the names that transformers gives them."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from server.text.special_tokens import CLASS_DEFAULTS, named_tokens
from tests.server.text.sentencepiece_tokenizer import sentencepiece_tokenizer


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_the_defaults_are_those_of_the_classes(name: str) -> None:
    parameters = inspect.signature(getattr(transformers, name).__init__).parameters.values()
    theirs = {
        one.name: one.default
        for one in parameters
        if one.name.endswith("_token") and isinstance(one.default, str)
    }
    assert CLASS_DEFAULTS[name] == theirs


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize(
    ("config", "older"),
    [
        (PLAIN, {}),
        (
            {**PLAIN, "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}},
            {},
        ),
        ({**PLAIN, "bos_token": None, "add_bos_token": True, "model_max_length": 9}, {}),
        (LLAMA, {}),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {}),
        ({**LLAMA, "bos_token": None}, {}),
        ({**LLAMA, "eos_token": "<unk>", "pad_token": "</s>"}, {}),
        ({**PLAIN, "image_token": "<img>", "extra_special_tokens": {"audio": "<audio>"}}, {}),
        ({**PLAIN, "extra_special_tokens": ["<a>", "<b>"]}, {}),
        (PLAIN, {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}),
        ({**PLAIN, "bos_token": "<unk>"}, {"bos_token": "<s>"}),
        (
            {**PLAIN, "bos_token": "<unk>", "added_tokens_decoder": {"1": {"content": "<s>"}}},
            {"bos_token": "<s>"},
        ),
    ],
)
def test_the_names_are_those_of_transformers(
    tmp_path: Path, config: dict[str, Any], older: dict[str, Any]
) -> None:
    sentencepiece_tokenizer("<img>", "<audio>", "<a>", "<b>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if older:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert named_tokens(config, older) == theirs
