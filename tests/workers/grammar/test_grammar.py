"""Grammars: whatever the model prefers, the text matches, and ends where it may.

The model is the worst one: it chooses at random among all that a mask leaves, from a byte-level
vocabulary with longer tokens that straddle whatever a grammar is made of.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from tests.leaks import Leaks
from tests.workers.grammar.byte_tokenizer import PIECES, byte_tokenizer
from workers import grammar_problem
from workers.errors import GrammarFailed, NoTokenLeft, UnknownVocabulary
from workers.grammar.vocabulary import read_vocabulary
from workers.messages import GrammarKind, GrammarSpec, SamplingParams
from workers.sampling import GrammarCompiler, Sampled, SequenceSampler, Tokens, sample

SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "kind": {"enum": ["ab", "abc", "no"]},
        "inner": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}, "codes": {"type": "array", "maxItems": 2}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
    "required": ["id", "kind", "inner"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return byte_tokenizer(path), path


Sampler = Callable[..., SequenceSampler]


@pytest.fixture(scope="module")
def compiler(tokenizer: tuple[Tokenizer, Path]) -> Iterator[GrammarCompiler]:
    made, path = tokenizer
    vocab_size = made.get_vocab_size() + 5  # padded, as models' are
    compiler = GrammarCompiler(path, vocab_size, (made.token_to_id("<end>"),))
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def sampler(tokenizer: tuple[Tokenizer, Path], compiler: GrammarCompiler) -> Sampler:
    made = tokenizer[0]
    vocab_size = made.get_vocab_size() + 5
    end = made.token_to_id("<end>")

    def of(kind: GrammarKind, source: str = "", **changes: Any) -> SequenceSampler:
        grammar = GrammarSpec(kind=kind, source=source)
        params = SamplingParams(
            **{"max_tokens": 999, "temperature": 1.0, "grammar": grammar, **changes}
        )
        return SequenceSampler(params, Tokens([0], 1), vocab_size, (end,), compiler.grammar(params))

    return of


def written(one: SequenceSampler, tokenizer: Tokenizer, most: int = 400) -> tuple[str, bool]:
    """The text of random choices, and whether it came to its end."""
    end, turn = tokenizer.token_to_id("<end>"), tokenizer.token_to_id("<turn>")
    ids: list[int] = []
    for _ in range(most):
        logits = torch.zeros(1, tokenizer.get_vocab_size() + 5)
        logits[0, [end, turn]] = 2.0  # the model would rather end, everywhere
        (got,) = sample(logits, [one])
        assert isinstance(got, Sampled), got
        one.accept(got.token)
        if got.token in (end, turn):
            assert one.finished
            return tokenizer.decode(ids), True
        assert not one.finished
        ids.append(got.token)
    return tokenizer.decode(ids), False


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(
        [
            "[0-9]{3}",
            "(ab|abc)+",
            "a*b?",
            "yes|no",
            r'\{"x": (true|12)\}',
            "é+z",
            "a/b\n?c",
            r"\d\w",
        ]
    ),
    st.integers(0, 1 << 30),
)
def test_any_text_matches_its_regular_expression(
    sampler: Sampler, tokenizer: tuple[Tokenizer, Path], regex: str, seed: int
) -> None:
    text, ended = written(sampler("regex", regex, seed=seed), tokenizer[0])
    assert ended
    assert re.fullmatch(regex, text, re.ASCII)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 30))
def test_any_json_matches_its_schema(
    sampler: Sampler, tokenizer: tuple[Tokenizer, Path], seed: int
) -> None:
    text, ended = written(sampler("json_schema", json.dumps(SCHEMA), seed=seed), tokenizer[0], 2000)
    if not ended:  # a number without end
        return
    value = json.loads(text)
    assert isinstance(value["id"], int)
    assert value["kind"] in ("ab", "abc", "no")
    assert isinstance(value["inner"]["on"], bool)
    assert len(value["inner"].get("codes", [])) <= 2
    assert value.keys() <= SCHEMA["properties"].keys()


@pytest.mark.slow
def test_objects_choices_and_grammars(sampler: Sampler, tokenizer: tuple[Tokenizer, Path]) -> None:
    choices = ['yes "and" no', "ab", "abc", "tab\tlet", "é"]
    met = set()
    for seed in range(40):
        text, ended = written(sampler("choice", json.dumps(choices), seed=seed), tokenizer[0])
        assert ended
        met.add(text)
        lark = 'start: "<" item ("," item)* ">"\nitem: "ab" | NUMBER\nNUMBER: /[1-9]/'
        text, ended = written(sampler("lark", lark, seed=seed), tokenizer[0])
        assert ended
        assert re.fullmatch(r"<(ab|[1-9])(,(ab|[1-9]))*>", text)
        text, ended = written(sampler("json_object", seed=seed), tokenizer[0], 60)
        assert text.lstrip().startswith("{") or not text.strip()
        if ended:
            assert isinstance(json.loads(text), dict)
    assert met == set(choices)


def test_an_end_is_allowed_exactly_where_the_text_may_end(
    sampler: Sampler, tokenizer: tuple[Tokenizer, Path]
) -> None:
    made = tokenizer[0]
    end, turn = made.token_to_id("<end>"), made.token_to_id("<turn>")

    def choice(one: SequenceSampler, **preferred: float) -> int:
        logits = torch.zeros(1, made.get_vocab_size() + 5)
        for name, value in {"end": 5.0, **preferred}.items():
            logits[0, {"end": end, "turn": turn, "a": made.token_to_id("a")}[name]] = value
        (got,) = sample(logits, [one])
        assert isinstance(got, Sampled)
        return got.token

    a = made.token_to_id("a")
    greedy: dict[str, Any] = {"temperature": 0.0}
    one = sampler("regex", "aa+", **greedy)
    for _ in range(2):
        assert choice(one) == a
        one.accept(a)
    assert choice(one) == end
    assert choice(one, turn=9.0) != turn  # a special token that ends nothing
    one.accept(a)
    assert choice(one) == end
    # The request's own ends are ends, too; none comes before the least length.
    one = sampler("regex", "aa+", stop_token_ids=(turn,), min_tokens=3, **greedy)
    for _ in range(3):
        assert choice(one, turn=9.0) == a
        one.accept(a)
    assert choice(one, turn=9.0) == turn
    # One that is text elsewhere is an end all the same.
    b, c = made.token_to_id("b"), made.token_to_id("c")
    one = sampler("regex", "[ab]c", stop_token_ids=(a,), **greedy)
    for expected in (b, c, a):
        assert choice(one, end=0.0, a=9.0) == expected
        one.accept(expected)
    assert one.finished
    # Where nothing can follow, the text ends whatever was asked for.
    for changes in ({"ignore_eos": True}, {"min_tokens": 50}):
        one = sampler("regex", "aaa?", **greedy, **changes)
        for _ in range(3):
            assert choice(one) == a
            one.accept(a)
        assert choice(one) == end
        one.accept(end)
        assert one.finished


def test_a_sequence_goes_on_elsewhere(tokenizer: tuple[Tokenizer, Path], no_leaks: Leaks) -> None:
    made, path = tokenizer
    vocab_size, end = made.get_vocab_size() + 5, made.token_to_id("<end>")
    here, elsewhere = (GrammarCompiler(path, vocab_size, (end,)) for _ in range(2))
    params = SamplingParams(
        max_tokens=999,
        temperature=0.9,
        seed=3,
        grammar=GrammarSpec(kind="json_schema", source=json.dumps(SCHEMA)),
    )
    whole = SequenceSampler(params, Tokens([0], 1), vocab_size, (end,), here.grammar(params))
    logits = torch.zeros(1, vocab_size)
    ids: list[int] = []
    for _ in range(25):
        tokens = Tokens([0, *ids], 1)
        anew = SequenceSampler(params, tokens, vocab_size, (), elsewhere.grammar(params))
        (got,) = sample(logits, [whole])
        assert sample(logits, [anew]) == [got]
        assert isinstance(got, Sampled)
        whole.accept(got.token)
        ids.append(got.token)
        anew.leave()
    here.close()
    elsewhere.close()


def test_masks_of_several_sequences_do_not_mix(
    sampler: Sampler, tokenizer: tuple[Tokenizer, Path]
) -> None:
    made = tokenizer[0]
    kinds = [("regex", "[0-9]"), ("choice", '["ab"]'), ("regex", "x")]
    every = [sampler(kind, source) for kind, source in kinds]
    every.append(sampler("regex", "[ab]", allowed_token_ids=(made.token_to_id("b"),)))
    none_left = sampler("regex", "a", allowed_token_ids=(made.token_to_id("b"),))
    plain = sampler("regex", "a", grammar=None, logit_bias={5: 100.0})
    random.Random(0).shuffle(every)
    logits = torch.zeros(len(every) + 2, made.get_vocab_size() + 5)
    got = sample(logits, [*every, none_left, plain])
    assert isinstance(got[-2], NoTokenLeft)
    for one, found in zip([*every, plain], [*got[:-2], got[-1]], strict=True):
        assert isinstance(found, Sampled)
        (alone,) = sample(logits[:1], [one])
        assert found == alone


BAD = [
    ("json_schema", "{", "not JSON"),
    ("json_schema", "[]", "is an object"),
    ("json_schema", '{"type": "strange"}', "strange"),
    ("json_schema", '{"$ref": "http://example.com/schema"}', "example.com"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"uniqueItems": true, "x-guidance": {"lenient": true}}', "uniqueItems"),
    ("json_schema", '{"a":' * 20_000, "not JSON"),
    ("regex", "(", "unclosed group"),
    ("regex", "", "empty"),
    ("regex", "(?=a)b", "look-ahead"),
    ("choice", "[]", "between 1 and"),
    ("choice", '["a", 1]', "between 1 and"),
    ("lark", "start: other", "other"),
    ("lark", "", "start"),
    ("lark", '%llguidance {"no_forcing": false}\nstart: "a"', "not allowed"),
]


@pytest.mark.parametrize(("kind", "source", "message"), BAD)
def test_what_is_wrong_with_a_grammar_is_said_by_server_and_instance(
    sampler: Sampler, kind: GrammarKind, source: str, message: str
) -> None:
    problem = grammar_problem(GrammarSpec(kind=kind, source=source))
    assert problem is not None
    assert re.search(message, problem)
    assert len(problem) < 1000
    grammar = sampler(kind, source).grammar
    assert grammar is not None
    with pytest.raises(GrammarFailed, match=message):
        grammar.fill_mask(np.zeros(40, np.uint8), np.zeros(0, np.int64))
    assert grammar.is_invalid


def test_what_becomes_too_much_on_the_way_is_the_requests_own_fault(
    sampler: Sampler, tokenizer: tuple[Tokenizer, Path]
) -> None:
    source = "start: " + " | ".join(f'"a{number}"' for number in range(5000))
    one = sampler("lark", source)
    one.accept(tokenizer[0].token_to_id("a"))
    logits = torch.zeros(2, tokenizer[0].get_vocab_size() + 5)
    failed, other = sample(logits, [one, sampler("regex", "a")])
    assert isinstance(failed, NoTokenLeft)
    assert "max is" in str(failed)
    assert isinstance(other, Sampled)


def test_sound_grammars_have_no_problem() -> None:
    for kind, source in (
        ("json_object", ""),
        ("json_schema", json.dumps(SCHEMA)),
        ("regex", "[a-z]+"),
        ("choice", json.dumps([f"choice {number}" for number in range(1024)])),
        ("lark", 'start: "a"'),
    ):
        assert grammar_problem(GrammarSpec(kind=kind, source=source)) is None  # type: ignore[arg-type]


def test_who_has_no_tokenizer_or_no_end_says_so(tokenizer: tuple[Tokenizer, Path]) -> None:
    params = SamplingParams(max_tokens=1, grammar=GrammarSpec(kind="json_object"))
    with pytest.raises(GrammarFailed, match="no tokenizer"):
        GrammarCompiler(None, 300, (1,)).grammar(params)
    with pytest.raises(GrammarFailed, match="no end token"):
        GrammarCompiler(tokenizer[1], 300, ()).grammar(params)
    assert GrammarCompiler(None, 300, ()).grammar(SamplingParams(max_tokens=1)) is None


# --- what tokens stand for


def test_bytes_of_tokens(tokenizer: tuple[Tokenizer, Path]) -> None:
    made, path = tokenizer
    texts = read_vocabulary(path, made.get_vocab_size() + 2, [made.token_to_id("x")])
    assert len(texts) == made.get_vocab_size() + 2
    assert sorted(text for text in texts if len(text) == 1) == [
        bytes([number]) for number in range(256) if number != ord("x")
    ]
    for piece in PIECES:
        assert piece.encode() in texts
    assert texts[made.token_to_id("<end>")] == texts[-1] == b""


def test_bytes_of_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("\u2581a", -1.0), ("b\u2581", -2.0), ("<0xC3>", -3.0), ("é", -4.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens([AddedToken("<unk>")])
    made.add_tokens([AddedToken("own")])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    assert read_vocabulary(path, 6) == [b"", b" a", b"b ", b"\xc3", "é".encode(), b"own"]
    assert read_vocabulary(path, 2) == [b"", b" a"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"vocab": {"a": "b"}}}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UnknownVocabulary, match=r"tokenizer\.json"):
        read_vocabulary(path, 10)
    path.write_bytes(b'{"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}')
    with pytest.raises(UnknownVocabulary, match="WordPiece"):
        read_vocabulary(path, 10)
