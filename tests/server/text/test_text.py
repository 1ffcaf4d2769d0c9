"""Text to ids and back, with the real tokenizer and with one that has byte tokens."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from server.errors import ContextLengthExceeded, InvalidRequest
from server.text.chat_template import Chat
from server.text.given import GivenText
from server.text.incremental import Detokenizer, StopStrings
from server.text.loaded_text import KeptTokenizer, LoadedText
from server.text.text import NoChatTemplate, Text
from server.text.tokenizer_files import TokenizerFilesError, TokenizerMissing

CONTEXT = 8192
quick = settings(max_examples=150, deadline=None)


@pytest.mark.slow
def test_nothing_of_it_imports_torch_or_transformers(tokenizer_dir: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; import server.api.app\n"
        "from server.text.chat_template import Chat; from server.text.text import Text\n"
        "text = Text.load(Path(sys.argv[1]))\n"
        "chat = Chat([{'role': 'user', 'content': 'hi'}])\n"
        "asyncio.run(text.encode_chat(chat, context_tokens=100))\n"
        "text.close()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(tokenizer_dir)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- text → ids


def test_encode_agrees_with_the_library(text: Text, tokenizer_dir: Path) -> None:
    prompt = "The year 1984, naïve — 東京 🎉\n\n  def f(x): return x"
    expected = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(prompt).ids
    assert asyncio.run(text.encode(prompt, context_tokens=CONTEXT)) == expected
    assert text.decode(expected) == prompt


def test_a_chat_is_written_as_the_model_wants_it(text: Text) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = asyncio.run(text.encode_chat(Chat(messages), context_tokens=CONTEXT))
    written = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    written += "<|im_start|>assistant\n"
    assert ids == asyncio.run(text.encode(written, context_tokens=CONTEXT))
    assert ids.count(1) == 3  # <|im_start|>: no BOS besides


def test_the_chat_agrees_with_transformers(text: Text, tokenizer_dir: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "user", "content": "What is 12 + 30? <b>&"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_dir)).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert asyncio.run(text.encode_chat(Chat(messages), context_tokens=CONTEXT)) == theirs


def test_stop_tokens_come_from_all_files(text: Text, tokenizer_dir: Path, tmp_path: Path) -> None:
    assert text.stop_token_ids == (0, 2, 4)  # also the end of a text, and of a repository's name
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (tmp_path / "special_ids.json").write_text('{"end_token_ids": [2, 9]}')
    other = Text.load(tmp_path)
    other.close()
    assert other.stop_token_ids == (2, 7, 9)
    (tmp_path / "special_ids.json").write_text('{"end_token_ids": "x"}')
    with pytest.raises(TokenizerMissing, match=r"special_ids\.json .* no token's id"):
        Text.load(tmp_path)


def test_without_a_template_a_chat_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    plain = Text.load(tmp_path)
    assert not plain.has_chat_template
    with pytest.raises(NoChatTemplate, match="Use /v1/completions"):
        asyncio.run(
            plain.encode_chat(Chat([{"role": "user", "content": "hi"}]), context_tokens=CONTEXT)
        )
    assert asyncio.run(plain.encode("hi", context_tokens=CONTEXT))
    plain.close()


@pytest.mark.parametrize("kept", ["one", "named", "legacy"])
def test_a_template_is_found_where_it_was_kept(
    tokenizer_dir: Path, tmp_path: Path, kept: str
) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    source = "{{ bos_token }}{{ messages[0].content }}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    config = {"bos_token": {"content": "<|im_start|>"}}
    if kept == "legacy":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    else:
        config["chat_template"] = {"one": source, "named": named}[kept]  # type: ignore[assignment]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Text.load(tmp_path)
    ids = asyncio.run(
        loaded.encode_chat(Chat([{"role": "user", "content": "hi"}]), context_tokens=CONTEXT)
    )
    loaded.close()
    assert ids == [1, *asyncio.run(loaded.encode("hi", context_tokens=CONTEXT))]


def test_what_a_template_raises_is_an_invalid_request(tokenizer_dir: Path) -> None:
    picky = Text.load(tokenizer_dir, chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(InvalidRequest, match="no system role"):
        asyncio.run(
            picky.encode_chat(Chat([{"role": "system", "content": "x"}]), context_tokens=CONTEXT)
        )
    picky.close()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "There is no file"),
        (b"\xff", "is not text in UTF-8"),
        (b"{% if %}", "can't be used: TemplateSyntaxError"),
        (b"{{ x | no_filter }}", "can't be used: TemplateAssertionError"),
        (b"{{ " + b"(" * 5000 + b"x" + b")" * 5000 + b" }}", "can't be used: RecursionError"),
        (b"{% if x %}" * 2000 + b"{% endif %}" * 2000, "can't be used: RecursionError"),
        (b"{% if x %}" * 150 + b"{% endif %}" * 150, "can't be used: (Indentation|Syntax)Error"),
    ],
)
def test_a_template_that_is_given_has_to_be_one(
    tokenizer_dir: Path, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    file = tmp_path / "given.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TokenizerFilesError, match=problem):
        LoadedText.of(KeptTokenizer.of(tokenizer_dir, GivenText(file)))


@pytest.mark.parametrize("has_own", [False, True])
def test_a_template_that_is_given_goes_before_the_models_own(
    tokenizer_dir: Path, tmp_path: Path, has_own: bool
) -> None:
    folder, file = tmp_path / "model", tmp_path / "given.jinja"
    shutil.copytree(tokenizer_dir, folder)
    if not has_own:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "tokenizer_config.json").unlink()
    file.write_text("{{ raise_exception('no user') if messages[0].content == 'x' }}[given]")
    loaded = LoadedText.of(KeptTokenizer.of(folder, GivenText(file)))
    ids = asyncio.run(
        loaded.text.encode_chat(Chat([{"role": "user", "content": "hi"}]), context_tokens=CONTEXT)
    )
    loaded.close()
    assert loaded.text.decode(ids) == "[given]"


def test_broken_files_are_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerMissing, match=r"tokenizer\.json can't be read"):
        Text.load(tmp_path)
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerMissing, match=r"_config\.json does not hold a JSON object"):
        Text.load(tmp_path)


def test_a_prompt_that_cannot_fit_is_refused_before_any_work(text: Text) -> None:
    huge = "a" * 100_000_000
    with pytest.raises(ContextLengthExceeded, match="100000000 characters"):
        asyncio.run(text.encode(huge, context_tokens=CONTEXT))
    with pytest.raises(ContextLengthExceeded, match="at least"):
        asyncio.run(
            text.encode_chat(Chat([{"role": "user", "content": huge}]), context_tokens=CONTEXT)
        )


def test_the_longest_token_sets_the_limit(text: Text) -> None:
    longest = max((text.decode([i]) for i in range(text.vocab_size)), key=len)
    assert len(asyncio.run(text.encode(longest * 20, context_tokens=20))) >= 20


def test_truncation_and_padding_of_the_file_are_off(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Text.load(tmp_path)
    loaded.close()
    assert loaded.decode(
        asyncio.run(loaded.encode("one two three four five six", context_tokens=99))
    ) == ("one two three four five six")


def test_the_event_loop_goes_on_while_a_long_prompt_is_encoded(text: Text) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 10_000

    async def count_turns() -> int:
        encoding = asyncio.ensure_future(text.encode(prompt, context_tokens=CONTEXT))
        turns = 0
        while not encoding.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(encoding.result()) > 90_000
        return turns

    assert asyncio.run(count_turns()) > 100


# --- ids → text


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.feed([token_id]) for token_id in ids), detokenizer.finish()]


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models have it: words with a blank in front, and a token for each byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["▁", "▁▁", "▁Hello", "▁world", "lo", "a", "é"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def with_bytes() -> Text:
    return Text(byte_fallback_tokenizer())


@quick
@given(prompt=st.text(max_size=80))
def test_pieces_of_any_text_make_the_text(text: Text, prompt: str) -> None:
    ids = asyncio.run(text.encode(prompt, context_tokens=CONTEXT))
    assert "".join(pieces(text.detokenizer(), ids)) == text.decode(ids)


@quick
@given(data=st.data())
def test_pieces_of_any_ids_make_what_decoding_them_at_once_makes(
    text: Text, data: st.DataObject
) -> None:
    broken = [i for i in range(512) if "\ufffd" in text.decode([i])]
    any_id = st.integers(0, text.vocab_size + 5) | st.sampled_from(broken) | st.sampled_from([0, 2])
    ids = data.draw(st.lists(any_id, max_size=120))
    assert "".join(pieces(text.detokenizer(), ids)) == text.decode(ids)


@quick
@given(
    words=st.lists(st.sampled_from(["<s>", "</s>", "▁", "▁▁", "▁Hello", "▁world", "lo", "a", "é"])),
    tail=st.text(max_size=6),
)
def test_blanks_and_byte_tokens_come_out_as_at_once(
    with_bytes: Text, words: list[str], tail: str
) -> None:
    vocab = byte_fallback_tokenizer().get_vocab()
    ids = [vocab[word] for word in words]
    ids += [vocab[f"<0x{byte:02X}>"] for byte in tail.encode()]
    ids += [vocab[word] for word in words]
    assert "".join(pieces(with_bytes.detokenizer(), ids)) == with_bytes.decode(ids)


@quick
@given(ids=st.lists(st.integers(0, 265), max_size=100))
def test_bytes_that_are_no_characters_end_nothing(with_bytes: Text, ids: list[int]) -> None:
    # Once shown, a character stays, where decoding at once takes a whole run of bytes back.
    shown = "".join(pieces(with_bytes.detokenizer(), ids))
    assert shown.count("Hello") == with_bytes.decode(ids).count("Hello")


def test_a_character_is_shown_when_it_is_whole(text: Text) -> None:
    ids = asyncio.run(text.encode("🎉é", context_tokens=CONTEXT))
    shown = pieces(text.detokenizer(), ids)
    assert "".join(shown) == "🎉é"
    assert all("\ufffd" not in piece for piece in shown)
    assert "".join(pieces(text.detokenizer(), ids[:1])) == "\ufffd"


def test_what_never_becomes_a_character_is_held_back_in_bounds(text: Text) -> None:
    broken = next(i for i in range(512) if text.decode([i]) == "\ufffd")
    detokenizer = text.detokenizer()
    shown = "".join(detokenizer.feed([broken]) for _ in range(2000))
    assert len(shown) >= 1980
    assert len(detokenizer._window) < 100
    assert shown + detokenizer.finish() == text.decode([broken] * 2000)


@pytest.mark.parametrize("silent", ["padding", "dropped"])
def test_what_shows_nothing_is_held_in_bounds(with_bytes: Text, silent: str) -> None:
    """Ids beyond the vocabulary, which a model with a padded head may choose, and blanks that the
    decoder drops at a text's begin."""
    vocab = byte_fallback_tokenizer().get_vocab()
    nothing = [len(vocab) + 7] * 500
    begin = [vocab["▁"]] if silent == "dropped" else []
    words = [vocab["▁Hello"], vocab["▁world"]]
    for ids in ([*begin, *nothing, *words, *nothing, *words], [*words, *nothing, *begin, *words]):
        detokenizer = with_bytes.detokenizer()
        shown = ""
        for token_id in ids:
            shown += detokenizer.feed([token_id])
            assert len(detokenizer._window) < 100
        assert shown + detokenizer.finish() == with_bytes.decode(ids)


# --- stop strings


def cut(text: str, stops: list[str]) -> str:
    """Where the first stop string is complete, the text ends before it."""
    ends = [(begin + len(s), begin) for s in stops if (begin := text.find(s)) >= 0]
    return text[: min(ends)[1]] if ends else text


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_cut_as_a_search_in_the_whole_text(parts: list[str], stops: list[str]) -> None:
    stopping, shown, whole = StopStrings(stops), "", ""
    for part in parts:
        whole += part
        shown += stopping.feed(part)
        if stopping.matched is not None:
            break
        # Nothing is kept that can't become a stop string any more.
        kept = whole[len(shown) :]
        assert not kept or any(stop.startswith(kept) for stop in stops)
        assert cut(whole, stops) == whole
    shown += stopping.finish()
    assert shown == cut("".join(parts), stops)
    assert (stopping.matched is not None) == any(stop in "".join(parts) for stop in stops)
