"""Tokens that only files beside tokenizer.json have: the ids are those that transformers gives."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from server.text.folder_tokens import ROLES, completed, named_tokens
from server.text.tokenizer_classes import AS_WRITTEN, CLASS_DEFAULTS, CLASS_OF
from server.text.tokenizer_files import TokenizerMissing

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
TEXTS = [
    "hello world",
    " hello  world ",
    "<s>hello</s> hello",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<tool>hello</tool><extra>",
    "",
]


def sentencepiece_like() -> Tokenizer:
    """As tokenizer.json was made of the tokenizer.model of Llama 2 and Mistral 7B."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(33, 127)] + [BLANK]
    trainer = BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(["hello", "world", "user", "assistant", "tool"] * 3, trainer)
    raw = json.loads(made.to_str())
    raw["added_tokens"] = [one for one in raw["added_tokens"] if "0x" not in one["content"]]
    made = Tokenizer.from_str(json.dumps(raw))
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=level.alphabet(), special_tokens=["<s>"])
    made.train_from_iterator(["hello world user assistant tool"] * 3, trainer)
    return made


SPM, BYTES = sentencepiece_like(), byte_level()
SPM_SIZE, BYTES_SIZE = SPM.get_vocab_size(), BYTES.get_vocab_size()


def token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    others = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, "special": special, **others, **flags}


def written(
    folder: Path,
    tokenizer: Tokenizer,
    config: dict[str, Any] | None,
    files: dict[str, Any] | None = None,
    model_type: str = "llama",
) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    others = {"config.json": {"model_type": model_type}, **(files or {})}
    if config is not None:
        others["tokenizer_config.json"] = config
    for name, value in others.items():
        (folder / name).write_text(json.dumps(value))
    return folder


CHATML = {
    str(SPM_SIZE): token("<|im_start|>"),
    str(SPM_SIZE + 1): token("<|im_end|>"),
}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}

FOLDERS: dict[str, tuple[Tokenizer, dict[str, Any] | None, dict[str, Any], str]] = {
    "nothing": (SPM, FAST, {}, "llama"),
    "no config": (BYTES, None, {}, "llama"),
    "a decoder's, of a Llama": (SPM, {**LLAMA, "added_tokens_decoder": CHATML}, {}, "llama"),
    "a decoder's, as written": (SPM, {**FAST, "added_tokens_decoder": CHATML}, {}, "llama"),
    "a decoder's, of a Mistral": (SPM, {**LLAMA, "added_tokens_decoder": CHATML}, {}, "mistral"),
    "a decoder's, not special": (
        SPM,
        {**FAST, "added_tokens_decoder": {str(SPM_SIZE): token("<tool>", special=False)}},
        {},
        "llama",
    ),
    "a decoder's, that strips": (
        SPM,
        {**FAST, "added_tokens_decoder": {str(SPM_SIZE): token("<tool>", rstrip=True)}},
        {},
        "llama",
    ),
    "added_tokens.json": (
        BYTES,
        FAST,
        {"added_tokens.json": {"<tool>": BYTES_SIZE, "</tool>": BYTES_SIZE + 1}},
        "llama",
    ),
    "added_tokens.json beside a decoder": (
        BYTES,
        {**FAST, "added_tokens_decoder": {str(BYTES_SIZE): token("<extra>")}},
        {"added_tokens.json": {"<tool>": BYTES_SIZE, "</tool>": BYTES_SIZE + 1}},
        "llama",
    ),
    "special_tokens_map.json": (
        BYTES,
        FAST,
        {"special_tokens_map.json": {"eos_token": "<extra>", "pad_token": token("<tool>")}},
        "llama",
    ),
    "roles": (BYTES, {**FAST, "eos_token": "<extra>", "bos_token": "hello"}, {}, "llama"),
    "a list": (BYTES, {**FAST, "additional_special_tokens": ["<tool>", "</tool>"]}, {}, "llama"),
    "names of its own": (
        BYTES,
        {**FAST, "extra_special_tokens": {"image_token": "<extra>"}, "tool_token": "<tool>"},
        {},
        "llama",
    ),
    "legacy": (SPM, {**LLAMA, "legacy": True}, {}, "llama"),
    "not legacy": (SPM, {**LLAMA, "legacy": False}, {}, "llama"),
    "fast": (SPM, {"tokenizer_class": "LlamaTokenizerFast"}, {}, "llama"),
    "no blank before": (SPM, {**LLAMA, "add_prefix_space": False}, {}, "llama"),
    "bytes of a Llama": (BYTES, LLAMA, {}, "llama"),
    "of a Mistral": (SPM, LLAMA, {}, "mistral"),
    "of a Phi 3": (SPM, LLAMA, {}, "phi3"),
    "of an OLMo": (SPM, LLAMA, {}, "olmo"),
    "taken back": (SPM, {**LLAMA, "bos_token": None}, {}, "llama"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_by_transformers(name: str, tmp_path: Path) -> None:
    tokenizer, config, files, model_type = FOLDERS[name]
    folder = written(tmp_path, tokenizer, config, files, model_type)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_buffer(completed(folder, (folder / "tokenizer.json").read_bytes()))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text), text
        for skip in (True, False):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded
    assert named_tokens(folder, config or {}, ours) == theirs.special_tokens_map


def test_a_folder_that_adds_nothing_is_left_as_it_is(tmp_path: Path) -> None:
    folder = written(tmp_path, BYTES, FAST)
    content = (folder / "tokenizer.json").read_bytes()
    assert completed(folder, content) is content


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"added_tokens_decoder": {"9000": token("<tool>")}}, "'<tool>' the id 9000, which by"),
        ({"added_tokens_decoder": {"5": token("<tool>")}}, "'<tool>' the id 5, which by"),
        ({"added_tokens_decoder": {"five": token("<tool>")}}, "by what is no number"),
        ({"added_tokens_decoder": {"300": {"special": True}}}, "does not say what token 300 is"),
        ({"added_tokens_decoder": {"300": 7}}, "does not say what token 300 is"),
    ],
)
def test_what_can_not_be_added_is_refused_by_name(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = written(tmp_path, BYTES, config)
    with pytest.raises(TokenizerMissing, match=words):
        completed(folder, (folder / "tokenizer.json").read_bytes())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"added_tokens": 7}', b"\xff"])
def test_what_is_no_tokenizer_is_left_to_who_loads_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    assert completed(tmp_path, content) == content


# --- the tables are those of transformers


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_defaults_are_those_of_the_class(name: str) -> None:
    taken = inspect.signature(getattr(transformers, name).__init__).parameters
    theirs = {
        role: parameter.default
        for role, parameter in taken.items()
        if role in ROLES and isinstance(parameter.default, str)
    }
    assert CLASS_DEFAULTS[name] == theirs


def test_classes_are_those_of_the_models() -> None:
    assert {TOKENIZER_MAPPING_NAMES[one] for one in AS_WRITTEN} == {"TokenizersBackend"}
    assert {one: TOKENIZER_MAPPING_NAMES[one] for one in CLASS_OF} == dict(CLASS_OF)
    named_wrongly = MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS & CLASS_OF.keys()
    assert named_wrongly == {"qwen2"}
