"""The ids of every kind of tokenizer that a GGUF file can name are those that llama.cpp gives.

What llama.cpp said is in llamacpp.json (`record.py` wrote it, with its version). Where it cuts text
otherwise than the models' own tokenizers, ours is given its rules first: nothing else differs.
"""

import json
from typing import Any

import pytest

from server.text.gguf import pipeline
from server.text.gguf.splits import SPLITS, Split
from tests.server.text.gguf.approximations import AS_LLAMACPP
from tests.server.text.gguf.record import RECORD, SCORED, metadata_of, tokenizer_of


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def test_all_splits_and_ways_were_recorded(record: dict[str, Any]) -> None:
    assert record["kinds"].keys() == {*SPLITS, *SCORED}
    assert len(SPLITS) == 91
    # As many answers as there are rules: two of them that were mixed up would be seen.
    assert len({tuple(chosen) for chosen in record["kinds"].values()}) > 30


@pytest.mark.parametrize("name", [*SPLITS, *SCORED])
def test_the_ids_are_those_of_llamacpp(
    name: str, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_llamacpp(named: str) -> Split:
        return AS_LLAMACPP.get(named, SPLITS[named])

    monkeypatch.setattr(pipeline, "split_named", as_llamacpp)
    tokenizer = tokenizer_of(metadata_of(name, record["vocabularies"]))
    wrong = {}
    for text, said, chosen in zip(
        record["texts"], record["ids"], record["kinds"][name], strict=True
    ):
        ids = tokenizer.encode(text).ids
        if ids != said[chosen]:
            wrong[text] = (ids, said[chosen])
    assert not wrong


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-4o", "हिन्दी में", ["हिन्दी", " में"]),
        ("gpt-4o", "ÉCOLEs fooBar", ["ÉCOLEs", " foo", "Bar"]),
        ("tekken", "e\u0301te\u0301 42", ["e\u0301te\u0301", " ", "4", "2"]),
        ("kimi-k2", "漢字かな aB", ["漢字", "かな", " a", "B"]),
        ("tiny_aya", "1234567 1234a", ["1", "234", "567", " ", "123", "4", "a"]),
        ("afmoe", "a  1234", ["a", "  ", "1", "234"]),
        ("youtu", "fooBar", ["foo", "Bar"]),
        ("deepseek-llm", "a\u3000b", ["a", "\u3000", "b"]),
        ("superbpe", "n = \u0661\u0662\u0663\u0664", ["n = ", "\u0661", "\u0662\u0663\u0664"]),
    ],
)
def test_where_llamacpp_approximates_words_are_those_of_the_model(
    name: str, text: str, words: list[str], record: dict[str, Any]
) -> None:
    """By the expressions of the models' own tokenizer.json."""
    cut = tokenizer_of(metadata_of(name, record["vocabularies"])).pre_tokenizer
    found = cut.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == words


@pytest.mark.parametrize("name", [name for name, split in SPLITS.items() if split.composes])
def test_characters_are_composed_as_the_model_does_it(name: str, record: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(metadata_of(name, record["vocabularies"]))
    assert tokenizer.encode("cafe\u0301").ids == tokenizer.encode("caf\u00e9").ids
