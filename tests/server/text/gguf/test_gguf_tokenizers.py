"""A GGUF file's tokenizer: what each kind of it makes of text, and which files are refused."""

import asyncio
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.errors import ServerError
from server.text.chat_template import Chat
from server.text.gguf import merges, pipeline
from server.text.gguf.endings import ending_ids
from server.text.gguf.metadata import GGUFDamaged, read_metadata
from server.text.gguf.pipeline import UnknownTokenizer
from server.text.gguf.splits import UnknownSplit
from server.text.gguf.vocabulary import BadVocabulary, vocabulary
from server.text.given import GivenText
from server.text.loaded_text import KeptTokenizer, LoadedText, UnusedPreTokenizer
from server.text.text import Text
from server.text.tokenizer_files import TokenizerBuildFailed, tokenizer_file, tokenizer_folder
from tests.server.text.gguf.corpus import trained
from tests.server.text.gguf.record import tokenizer_of, write_file

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def said(
    model: str,
    tokens: list[str],
    kinds: Mapping[str, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a file says, as it is read; `kinds` of tokens that are not normal."""
    given = {
        "model": model,
        "tokens": [one.encode() for one in tokens],
        "token_type": [(kinds or {}).get(one, 6 if one in BYTES else 1) for one in tokens],
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in given.items() if value is not None}


def scored(**more: Any) -> dict[str, Any]:
    """SentencePiece's BPE: letters, and of words "the" and "hat", each with a blank before it."""
    words = [f"{BLANK}t", "he", f"{BLANK}the", "at", "hat", f"{BLANK}h", f"{BLANK}hat"]
    letters = [BLANK, *"abehct"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *words, *letters]
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    scores = [0.0] * (3 + 256) + [-float(n) for n in range(len(words) + len(letters))]
    given = {"scores": scores, "bos_token_id": 1, "eos_token_id": 2, **more}
    return said("llama", tokens, kinds, **given)


def merged(*whole: str, control: bool = True, **more: Any) -> dict[str, Any]:
    """BPE of bytes, with `whole` tokens behind all others."""
    kept = trained(True, 600)
    tokens = [*kept["tokens"], *whole]
    kinds = [*kept["kinds"], *[3 if control else 4] * len(whole)]
    given = {
        "token_type": kinds,
        "merges": [one.encode() for one in kept["merges"]],
        "pre": "llama-bpe",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }
    return said("gpt2", tokens, **given)


def shown(metadata: Mapping[str, Any], text: str, *, special: bool = False) -> list[str]:
    return list(tokenizer_of(metadata).encode(text, add_special_tokens=special).tokens)


@pytest.mark.parametrize(
    ("more", "text", "tokens"),
    [
        ({}, "the hat", [f"{BLANK}the", f"{BLANK}hat"]),
        ({}, " the", [BLANK, f"{BLANK}the"]),
        ({}, "the</s>hat", [f"{BLANK}the", "</s>", f"{BLANK}hat"]),
        ({}, "the</s> hat", [f"{BLANK}the", "</s>", BLANK, f"{BLANK}hat"]),
        ({"add_space_prefix": False}, "the hat", ["t", "he", f"{BLANK}hat"]),
        ({"add_space_prefix": False}, "hat</s>hat", ["hat", "</s>", "hat"]),
        ({}, "\u00e9", [BLANK, "<0xC3>", "<0xA9>"]),
        ({}, "", []),
    ],
)
def test_blanks_before_words(more: dict[str, Any], text: str, tokens: list[str]) -> None:
    assert shown(scored(**more), text) == tokens


@pytest.mark.parametrize(
    ("metadata", "first", "last"),
    [
        (scored(), True, False),
        (scored(add_bos_token=False), False, False),
        (scored(add_eos_token=True), True, True),
        (scored(bos_token_id=None), True, False),
        (merged(), True, False),
        (merged(add_bos_token=False), False, False),
        (merged(pre="qwen2"), False, False),
        (merged(pre="qwen2", add_bos_token=True, add_eos_token=True), True, True),
        (merged(bos_token_id=None), False, False),
    ],
)
def test_what_is_put_around_a_prompt(metadata: dict[str, Any], first: bool, last: bool) -> None:
    tokens = shown(metadata, "hat", special=True)
    assert (tokens[0] == "<s>", tokens[-1] == "</s>") == (first, last)


def test_tokens_that_are_whole_are_found_as_they_are() -> None:
    """Whatever characters they are of, and shown unless they are special."""
    marks = ("<\uff5cuser\uff5c>", f"<\uff5cend{BLANK}of{BLANK}sentence\uff5c>", "   ")
    for control in (True, False):
        metadata = merged(*marks, control=control)
        num_tokens = len(metadata["tokenizer.ggml.tokens"])
        tokenizer = tokenizer_of(metadata)
        assert tokenizer.get_vocab_size() == num_tokens
        text = f"a{marks[0]}b{marks[1]}c{marks[2]}"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert [one for one in ids if one >= num_tokens - 3] == [*range(num_tokens - 3, num_tokens)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == ("abc" if control else text)


def test_letters_that_are_tokens_of_their_own_are_shown() -> None:
    """DeepSeek Coder's vocabulary has letters for the bytes that no text holds."""
    metadata = merged()
    at = metadata["tokenizer.ggml.tokens"].index("\u00f6".encode())
    metadata["tokenizer.ggml.token_type"][at] = 4
    tokenizer = tokenizer_of(metadata)
    ids = tokenizer.encode("w\u00f6rld \u00fc \u732b").ids
    assert at in ids
    assert tokenizer.decode(ids) == "w\u00f6rld \u00fc \u732b"


@pytest.mark.parametrize(
    ("whole", "more", "ends"),
    [
        (("<|eot_id|>",), {}, ("</s>", "<|im_end|>", "<|eot_id|>")),
        (("<|end|>", "<|eom_id|>"), {}, ("</s>", "<|im_end|>", "<|end|>", "<|eom_id|>")),
        (("<end_of_turn>",), {"eos_token_id": None}, ("</s>", "<|im_end|>", "<end_of_turn>")),
        (("<x>",), {"eot_token_id": 600}, ("</s>", "<|im_end|>", "<x>")),
        (("<x>",), {"eom_token_id": 600}, ("</s>", "<|im_end|>", "<x>")),
        (("<x>",), {"eot_token_id": 10**6}, ("</s>", "<|im_end|>")),
        (
            ("<|return|>", "<|call|>", "<|end|>"),
            {},
            ("</s>", "<|im_end|>", "<|return|>", "<|call|>"),
        ),
        (
            ("<|fim_pad|>", "<|file_sep|>"),
            {},
            ("</s>", "<|im_end|>", "<|fim_pad|>", "<|file_sep|>"),
        ),
        (("<|tool_response>",), {}, ("<|im_end|>", "<|tool_response>")),
    ],
)
def test_all_that_ends_a_turn_is_found(
    whole: tuple[str, ...], more: dict[str, Any], ends: tuple[str, ...]
) -> None:
    words = vocabulary(merged(*whole, **more))
    assert tuple(words.tokens[token_id] for token_id in ending_ids(words)) == ends


def test_what_html_strikes_through_ends_no_answer() -> None:
    metadata = scored(eos_token_id=1)
    kinds = metadata["tokenizer.ggml.token_type"]
    for kind in (1, 4):
        kinds[2] = kind
        assert ending_ids(vocabulary(metadata)) == (1,)


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        (merged(pre="next-year"), UnknownSplit, "'next-year'"),
        (merged(pre=7), BadVocabulary, "pre is no text"),
        (said("rwkv", ["a"]), UnknownTokenizer, "'rwkv'"),
        (said("plamo2", ["a"]), UnknownTokenizer, "'plamo2'"),
        (said("no_vocab", ["a"]), UnknownTokenizer, "gpt2, llama"),
        ({}, BadVocabulary, "no tokens"),
        (said("llama", []), BadVocabulary, "no tokens"),
        (said("llama", ["a", "b"]), BadVocabulary, "scores"),
        (said("t5", ["a", "b"]), BadVocabulary, "scores"),
        (
            said("t5", ["a", "b"], scores=[0.0, 0.0], token_type=[2, 1], precompiled_charsmap=7),
            BadVocabulary,
            "charsmap",
        ),
        (said("bert", ["a", "b"]), BadVocabulary, "unknown words"),
        (said("gpt2", ["a", "a"]), BadVocabulary, "two of its tokens are 'a'"),
        (said("gpt2", ["a"], scores=[b"x"]), BadVocabulary, "scores"),
        (said("gpt2", ["a", "b"], token_type=[1]), BadVocabulary, "token_type"),
        (said("gpt2", ["a"], merges=[1.0]), BadVocabulary, "merges"),
        (said("gpt2", ["a", "b"], merges=[b"a b"]), BadVocabulary, "'a b' to what is none"),
        (said("gpt2", ["a"], add_bos_token=True), BadVocabulary, "BOS"),
        (said("gpt2", ["a"], add_bos_token="yes"), BadVocabulary, "add_bos_token"),
        (said("gpt2", ["a"], bos_token_id="a"), BadVocabulary, "bos_token_id"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    metadata: dict[str, Any], error: type[ServerError], words: str
) -> None:
    with pytest.raises(error, match=words):
        tokenizer_of(metadata)


def test_no_kinds_are_as_good_as_none_said() -> None:
    empty, none = tokenizer_of(merged(token_type=[])), tokenizer_of(merged(token_type=None))
    assert empty.to_str() == none.to_str()


def test_a_token_that_is_no_text_is_refused() -> None:
    metadata = said("gpt2", ["a"])
    metadata["tokenizer.ggml.tokens"] = [b"a", b"\xff"]
    metadata["tokenizer.ggml.token_type"] = [1, 1]
    with pytest.raises(BadVocabulary, match="token 1 is no UTF-8"):
        vocabulary(metadata)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    metadata = {**scored(add_space_prefix=False), "tokenizer.chat_template": "{{ bos_token }}"}
    assert read_metadata(write_file(tmp_path / "a.gguf", metadata)) == {
        **metadata,
        "general.architecture": "llama",
        "tokenizer.ggml.scores": pytest.approx(metadata["tokenizer.ggml.scores"]),
    }


def _header(num_fields: int, rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, num_fields) + rest


def _field(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"GGML" + bytes(100), "does not begin"),
        (b"GGUF", "beyond its end"),
        (_header(0, b"", version=1), "version 1"),
        (_header(0, b"", version=0x03000000), "little-endian"),
        (_header(1 << 63, b""), "fields"),
        (_header(1, struct.pack("<Q", 1 << 63)), "a text of"),
        (_header(1, _field(b"a", 8, struct.pack("<Q", 1 << 62))), "beyond its end"),
        (_header(1, _field(b"tokenizer.a", 8, struct.pack("<Q", 1 << 62))), "a text of"),
        (_header(1, _field(b"a", 99, bytes(8))), "unknown type 99"),
        (_header(1, _field(b"a", 9, struct.pack("<IQ", 4, 1 << 62))), "entries"),
        (_header(1, _field(b"a", 9, struct.pack("<IQ", 4, 1 << 20))), "beyond its end"),
        (_header(1, _field(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(12))), "type 9"),
        (_header(1, _field(b"a", 9, struct.pack("<IQQ", 8, 2, 1 << 60))), "beyond its end"),
        (_header(1, _field(b"\xff", 4, bytes(4))), "no UTF-8"),
        (_header(2, 2 * _field(b"tokenizer.a", 4, bytes(4))), "twice"),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(GGUFDamaged, match=words):
        read_metadata(tmp_path / "a.gguf")


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """The folder that is built for a file that says this."""

    def built(metadata: Mapping[str, Any]) -> Path:
        return tokenizer_folder(write_file(tmp_path / "a.gguf", metadata), tmp_path / "cache")

    return built


def test_a_server_is_told_what_is_wrong(
    folder_of: Callable[[Mapping[str, Any]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        TokenizerBuildFailed, match=r"a\.gguf can't be unpacked: it says that .* 'next-year'"
    ):
        folder_of(merged(pre="next-year"))
    folder_of(merged(pre=None))
    assert "a.gguf does not say how text is cut into words" in caplog.text


def test_the_folder_of_a_file_can_be_used(
    folder_of: Callable[[Mapping[str, Any]], Path],
) -> None:
    metadata = {
        **merged("<|eot_id|>"),
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}<|eot_id|>",
    }
    text = Text.load(folder_of(metadata))
    chat = Chat([{"role": "user", "content": "hat"}])
    ids = asyncio.run(text.encode_chat(chat, context_tokens=64))
    end = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert (ids[0], ids[-1]) == (0, end)
    assert text.stop_token_ids == (1, 2, end)
    assert text.decode(ids) == "hat"
    text.close()


def test_templates_by_name_are_kept(folder_of: Callable[[Mapping[str, Any]], Path]) -> None:
    metadata = {
        **merged(),
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "{{ tools | length }} tools",
        "tokenizer.chat_template.rag": "documents",
    }
    folder = folder_of(metadata)
    others = {one.stem for one in (folder / "additional_chat_templates").iterdir()}
    assert others == {"tool_use", "rag"}
    text = Text.load(folder)
    messages = [{"role": "user", "content": "hat"}]
    assert text.rendered(Chat(messages), context_tokens=64) == "plain"
    assert text.rendered(Chat(messages, [{}, {}]), context_tokens=64) == "2 tools"
    text.close()


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".", "-x", "x" * 99])
def test_a_name_of_a_template_that_is_no_files_name_is_refused(
    name: str, folder_of: Callable[[Mapping[str, Any]], Path]
) -> None:
    with pytest.raises(TokenizerBuildFailed, match="calls a chat template"):
        folder_of({**merged(), f"tokenizer.chat_template.{name}": "x"})


# --- how text is cut, said by a person


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECOPY_CACHE_DIR", str(tmp_path / "cache"))


def test_an_unknown_way_to_cut_text_is_taken_as_a_known_one_that_is_named(
    tmp_path: Path, cache: None, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_file(tmp_path / "a.gguf", merged(pre="next-year"))
    tokenizer = KeptTokenizer.of(file, GivenText(pre_tokenizer="qwen2"))
    LoadedText.of(tokenizer).close()
    assert "a.gguf says that its text is cut into words as 'next-year'" in caplog.text
    found, digits = Tokenizer.from_file(str(tokenizer.path)), "1234 567"
    cuts = [
        one.pre_tokenizer.pre_tokenize_str(digits)
        for one in (found, *(tokenizer_of(merged(pre=pre)) for pre in ("qwen2", "gpt-2")))
    ]
    assert cuts[0] == cuts[1] != cuts[2]
    # What is built by another name, or by none, is in another folder.
    assert len({tokenizer_file(file, None, name) for name in (None, "qwen2", "gpt-2")}) == 3
    with pytest.raises(TokenizerBuildFailed, match=r"'next-year'.*--pre-tokenizer NAME"):
        tokenizer_folder(file)


@pytest.mark.parametrize(
    ("name", "told"),
    [("qwen-2", "Did you mean qwen2"), ("", "not known here"), ("x" * 999, "not known here")],
)
def test_a_name_that_nobody_knows_is_refused(name: str, told: str, tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.gguf", merged())
    with pytest.raises(UnknownSplit, match=f"--pre-tokenizer is .*{told}"):
        KeptTokenizer.of(file, GivenText(pre_tokenizer=name))


def test_a_name_that_would_not_be_used_is_refused(tmp_path: Path, cache: None) -> None:
    with pytest.raises(TokenizerBuildFailed, match=r"kind 'llama'.*omit --pre-tokenizer"):
        tokenizer_folder(write_file(tmp_path / "a.gguf", scored()), None, "qwen2")
    (folder := tmp_path / "model").mkdir()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UnusedPreTokenizer, match="is for GGUF files"):
        KeptTokenizer.of(folder, GivenText(pre_tokenizer="qwen2"))


def test_words_that_are_tokens_are_taken_whole_where_the_model_does_so() -> None:
    """Llama 3's tokenizer ignores merges for them; Qwen's does not."""
    metadata = merged(token_type=None)
    tokens = [*metadata["tokenizer.ggml.tokens"], b"xyzzy"]
    metadata = {**metadata, "tokenizer.ggml.tokens": tokens}
    assert shown(metadata, "xyzzy") == ["xyzzy"]
    assert len(shown({**metadata, "tokenizer.ggml.pre": "qwen2"}, "xyzzy")) > 1


def test_a_merge_that_looks_like_a_heading_is_none() -> None:
    metadata = merged(merges=[b"# v", b"#v e"])
    tokens = [*metadata["tokenizer.ggml.tokens"], b"#version", b"#versionx"]
    kinds = [*metadata["tokenizer.ggml.token_type"], 1, 1]
    metadata.update(
        {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": [b"#version x"],
        }
    )
    assert isinstance(tokenizer_of(metadata), Tokenizer)


@pytest.mark.parametrize("bits", [1, 6, 20])
def test_merges_by_score_are_all_pairs_that_make_a_token(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of them share a slot of the table in which halves are looked up."""
    monkeypatch.setattr(merges, "_TABLE_BITS", bits)
    tokens = trained(True, 900)["tokens"]
    scores = [-float(index * 37 % 101) for index in range(len(tokens))]
    order = sorted(range(len(tokens)), key=lambda index: -scores[index])
    known = set(tokens)
    expected = [
        f"{tokens[index][:place]} {tokens[index][place:]}"
        for index in order
        for place in range(1, len(tokens[index]))
        if tokens[index][:place] in known and tokens[index][place:] in known
    ]
    assert len(expected) > 100
    assert merges.scored_merges(tokens, scores) == expected


def test_merges_that_name_no_tokens_are_left_out() -> None:
    """And two blanks are in no word: the others are as they were."""
    tokens = ["a", "b", "c", "ab", "abc", "a b", "b c"]
    merges = [b"a b", b"x b", b"a x", b"ab c", b"a b c", b"a b", b" ", b"ab", b""]
    metadata = said("gpt2", tokens, pre="gpt-2", merges=merges)
    assert pipeline.tokenizer_json(metadata, vocabulary(metadata))["model"]["merges"] == [
        "a b",
        "ab c",
    ]
    assert shown(metadata, "abcab") == ["abc", "ab"]


def test_merges_of_scores_are_all_that_make_a_token() -> None:
    metadata = scored(add_space_prefix=False)
    words = vocabulary(metadata)
    plain = {text for text, kind in zip(words.tokens, words.kinds, strict=True) if kind != 3}
    expected = [
        (-words.scores[words.ids[text]], f"{text[:at]} {text[at:]}")
        for text in plain
        for at in range(1, len(text))
        if {text[:at], text[at:]} <= plain
    ]
    found = pipeline.tokenizer_json(metadata, words)["model"]["merges"]
    assert sorted(found) == sorted(merge for _, merge in expected)
    by_score = [-words.scores[words.ids[merge.replace(" ", "")]] for merge in found]
    assert by_score == sorted(by_score)
    assert len(found) == 8
