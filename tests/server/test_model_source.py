"""What a person calls a model: links, parts, files without a suffix, and what is found of them."""

from pathlib import Path

import pytest

from server.models.files import ModelFiles
from server.models.source import ModelNotFound, find_model
from server.text.tokenizer_files import tokenizer_file, tokenizer_folder
from tests.workers.checkpoint.checkpoint_files import write_gguf


def parts(folder: Path, stem: str = "m", count: int = 2) -> list[Path]:
    """Files that are called so; what they hold does not matter here."""
    names = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return [folder / name for name in names]


def hub_cache(home: Path, *names: str) -> list[Path]:
    """Links to blobs, as the hub's library keeps files."""
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(names):
        write_gguf(blobs / f"0123abc{number}")
        (snapshot / name).symlink_to(f"../../blobs/0123abc{number}")
    return [snapshot / name for name in names]


def test_a_link_in_a_hub_cache(tmp_path: Path) -> None:
    [link] = hub_cache(tmp_path, "model-Q8_0.gguf")
    source = find_model(str(link))
    assert (source.name, source.path) == ("model-Q8_0", tmp_path / "blobs" / "0123abc0")
    built = tokenizer_folder(source.path, tmp_path / "cache")
    assert (built / "tokenizer.json").is_file()
    assert tokenizer_file(source.path, tmp_path / "cache") == built / "tokenizer.json"


def test_a_blob_of_ollama(tmp_path: Path) -> None:
    blob = write_gguf(tmp_path / "sha256-0123abcd")
    assert find_model(str(blob)).path == blob
    assert (tokenizer_folder(blob, tmp_path / "cache") / "tokenizer.json").is_file()


def test_parts_in_a_hub_cache_stay_beside_each_other(tmp_path: Path) -> None:
    names = [f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    first, second = hub_cache(tmp_path, *names)
    source = find_model(str(first))
    assert (source.name, source.path) == ("m", first)
    files = ModelFiles.at(source.path, source.given)
    assert files.identities.keys() == set(names)
    assert files.changes() == []
    second.unlink()
    assert files.changes() == [f"{second.name} is gone"]


def test_a_folder_that_holds_the_parts_of_one_model(tmp_path: Path) -> None:
    first, _, _ = parts(tmp_path, count=3)
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    source = find_model(str(tmp_path))
    assert (source.name, source.path) == ("m", first)


def test_a_folder_with_a_part_missing_or_two_models(tmp_path: Path) -> None:
    _, second = parts(tmp_path)
    second.unlink()
    with pytest.raises(ModelNotFound, match=r"nor a single \.gguf file"):
        find_model(str(tmp_path))
    second.write_bytes(b"GGUF")
    parts(tmp_path, "other")
    with pytest.raises(ModelNotFound, match=r"nor a single \.gguf file"):
        find_model(str(tmp_path))


def test_a_part_that_changes_is_a_change(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    files = ModelFiles.at(first)
    second.write_bytes(b"GGUF!")
    assert files.changes() == [f"{second.name} was written or replaced"]


@pytest.mark.parametrize(
    "name",
    [
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ],
)
def test_whatever_changes_what_is_served_is_watched(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = ModelFiles.at(tmp_path)
    changed = tmp_path / name
    changed.parent.mkdir(exist_ok=True)
    changed.write_text("{ }")
    [told] = files.changes()
    assert told.startswith(name)
