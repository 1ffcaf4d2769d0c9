"""Texts to embed as token ids: special tokens, limits, and what truncation keeps."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.errors import ContextLengthExceeded, InvalidRequest
from server.text.text import INLINE_CHARS, Text

CLS, SEP = 101, 102


@pytest.fixture(scope="module")
def bert(minilm: Path) -> Iterator[Text]:
    loaded = Text.load(minilm)
    yield loaded
    loaded.close()


def ids_of(text: Text, *inputs: str, truncate_to: int | None = None, context: int = 256):
    return asyncio.run(text.encode_inputs(inputs, context_tokens=context, truncate_to=truncate_to))


INPUTS = ("Hello, World!", "Grüße, 東京! 🎉", "a  b\n\nc", "word " * 200, " ")


@pytest.mark.parametrize("which", ["bert", "text"])
def test_ids_are_those_of_a_prompt(which: str, request: pytest.FixtureRequest) -> None:
    text: Text = request.getfixturevalue(which)
    together = ids_of(text, *INPUTS)
    assert together == [asyncio.run(text.encode(one, context_tokens=256)) for one in INPUTS]
    much = [*INPUTS, "word " * (INLINE_CHARS // 5)]
    assert ids_of(text, *much, context=4096)[:-1] == together


def test_truncation_keeps_the_beginning_and_the_special_tokens(bert: Text) -> None:
    [whole] = ids_of(bert, "one two three four five")
    assert (whole[0], whole[-1], len(whole)) == (CLS, SEP, 7)
    cut, short = ids_of(bert, "one two three four five", "one", truncate_to=5)
    assert cut == [*whole[:4], SEP]
    assert short == [CLS, whole[1], SEP]
    # Much too long for the context, and cut all the same, without being encoded as a whole.
    [long] = ids_of(bert, "one " * 1_000_000, truncate_to=256)
    assert long == [CLS, *[whole[1]] * 254, SEP]


def test_truncation_that_leaves_no_text_is_refused(bert: Text) -> None:
    with pytest.raises(InvalidRequest, match="beside 2 special tokens"):
        ids_of(bert, "one", truncate_to=2)


def test_what_can_not_fit_is_refused_before_it_is_encoded(bert: Text) -> None:
    with pytest.raises(ContextLengthExceeded, match="The input has 4000000 characters") as refused:
        ids_of(bert, "ok", "one " * 1_000_000)
    assert refused.value.param == "input"


def test_half_a_character_is_no_text(bert: Text) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        ids_of(bert, "\ud83d")


def test_a_model_of_lower_case_gets_lower_case(tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_dir, tmp_path / "lower")
    settings = {"max_seq_length": 128, "do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    lower = Text.load(folder)
    try:
        assert ids_of(lower, "SHOUTED")[0] == asyncio.run(
            lower.encode("shouted", context_tokens=99)
        )
        assert ids_of(lower, "SHOUTED")[0] != asyncio.run(
            lower.encode("SHOUTED", context_tokens=99)
        )
    finally:
        lower.close()
