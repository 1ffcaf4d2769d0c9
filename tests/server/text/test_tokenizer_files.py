"""The cache of tokenizer folders: built once, complete or absent, clear when it can't be."""

import json
import os
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from server.text.tokenizer_files import (
    CacheNotWritable,
    TokenizerBuildFailed,
    TokenizerMissing,
    default_cache_dir,
    tokenizer_folder,
)
from tests.workers.checkpoint.checkpoint_files import write_gguf


def test_a_gguf_file_is_unpacked_once(
    smollm2_gguf: Path, tokenizer_cache: Path, tokenizer_dir: Path
) -> None:
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        file.name for file in tokenizer_dir.iterdir()
    }
    before = (tokenizer_dir / "tokenizer.json").stat().st_ino
    assert tokenizer_folder(smollm2_gguf, tokenizer_cache) == tokenizer_dir
    assert (tokenizer_dir / "tokenizer.json").stat().st_ino == before
    assert list(tokenizer_dir.parent.glob(f"{smollm2_gguf.stem}-*")) == [tokenizer_dir]


def test_what_only_the_gguf_file_knows_is_kept(tokenizer_dir: Path) -> None:
    special = json.loads((tokenizer_dir / "special_ids.json").read_text())
    assert special == {"format": 3, "end_token_ids": [0, 2, 4]}


def test_a_changed_file_gets_another_folder_and_two_builders_may_race(tmp_path: Path) -> None:
    copy = write_gguf(tmp_path / "model.gguf")
    cache = tmp_path / "cache"
    left = cache / "tokenizers" / ".building-left"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(tokenizer_folder(copy, cache)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert [p.name for p in (cache / "tokenizers").iterdir()] == [folders[0].name]
    os.utime(copy, (1, 1))
    assert tokenizer_folder(copy, cache) != folders[0]


def test_a_file_that_is_no_gguf_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(TokenizerBuildFailed, match=r"broken\.gguf can't be unpacked"):
        tokenizer_folder(broken, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_way_out(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(CacheNotWritable, match="Set ONECOPY_CACHE_DIR"):
        tokenizer_folder(smollm2_gguf, in_the_way)


def test_folders_of_hugging_face_are_taken_as_they_are(tokenizer_dir: Path) -> None:
    assert tokenizer_folder(tokenizer_dir) == tokenizer_dir
    assert tokenizer_folder(tokenizer_dir / "tokenizer_config.json") == tokenizer_dir


def test_a_folder_without_tokenizer_json_names_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissing, match=r"no tokenizer\.json\. Copy"):
        tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerMissing, match=r"has tokenizer\.model but .*save_pretrained"):
        tokenizer_folder(tmp_path)
    with pytest.raises(TokenizerMissing, match="does not exist"):
        tokenizer_folder(tmp_path / "nowhere")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("ONECOPY_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/onecopy")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/onecopy")
    monkeypatch.setenv("ONECOPY_CACHE_DIR", "/own")
    assert default_cache_dir() == Path("/own")


def test_the_tokenizer_of_a_sentencepiece_vocabulary(
    gemma3_gguf: Path, tokenizer_cache: Path
) -> None:
    """262,144 tokens with scores and without merges; the ids are those of google/gemma-3-270m."""
    folder = tokenizer_folder(gemma3_gguf, tokenizer_cache)
    special = json.loads((folder / "special_ids.json").read_text())
    assert special["end_token_ids"] == [1, 106]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 262_144
    for text, token_ids in {
        "Hello world": [2, 9259, 1902],
        "<start_of_turn>user\nhi<end_of_turn>\n": [2, 105, 2364, 107, 2202, 106, 107],
        "def f(x):\n    return x": [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123],
    }.items():
        assert tokenizer.encode(text).ids == token_ids
    for text in ("  two  blanks ", "Ünïcödé 漢字 🙂 𓀀\x00", "tab\tand\nline"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
