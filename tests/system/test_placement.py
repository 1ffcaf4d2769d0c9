"""`onecopy serve --placement auto`: what it serves, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.quick import long_run
from tests.system.running_server import TIMEOUT_S, Server, onecopy
from tests.system.test_errors import assert_refused
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

SETTINGS = ("--instances", "2", "--max-model-len", "64")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deep"
    made = write_checkpoint(folder, "llama", num_hidden_layers=6, intermediate_size=8192)
    return write_tokenizer(made)


def text_of(server: Server) -> str:
    body = {"model": server.model, "prompt": "The capital", "max_tokens": 30, "temperature": 0}
    url = f"{server.url}/v1/completions"
    answer = httpx.post(url, json={**body, "ignore_eos": True}, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def shown(server: Server) -> dict:
    """What `onecopy ps` says of the model."""
    [model] = json.loads(server.onecopy("ps", "--json").stdout)["models"]
    return model


def test_layers_are_placed_as_planned_and_the_texts_are_the_same(
    make_server: Callable[..., Server], deep: Path
) -> None:
    whole = make_server(str(deep), *SETTINGS)
    expected = text_of(whole)
    assert shown(whole)["placement"] is None
    limit = shown(whole)["weights_bytes"] * 3 // 4
    whole.stop()

    server = make_server(str(deep), *SETTINGS, "--placement", "auto", "--memory-limit", str(limit))
    planned = onecopy("plan", str(deep), *SETTINGS, "--memory-limit", str(limit), "--json")
    document = json.loads(planned.stdout)
    placement = shown(server)["placement"]
    assert placement == document["placement"]
    log = server.log.read_text()
    assert f"placement: {placement['options'][0]}. {placement['reasons'][0]}" in log
    num_offloaded = document["proposed"]["offload"]["num_offloaded"]
    assert 0 < num_offloaded <= 6
    assert f"{num_offloaded} of 6 layers are offloaded" in log
    assert text_of(server) == expected
    server.stop()


@long_run
def test_where_all_fits_nothing_is_offloaded(
    make_server: Callable[..., Server], deep: Path
) -> None:
    server = make_server(str(deep), *SETTINGS, "--placement", "auto")
    placement = shown(server)["placement"]
    assert (placement["options"], placement["fits"]) == ([], True)
    assert "placement: nothing but the defaults. All layers stay" in server.log.read_text()
    server.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--map-files",), ("--map-files", "--placement auto", "leave out one")),
        (("--device", "cuda:0"), ("--device is cuda:0", "leave out --placement")),
        (
            ("--memory-limit", "20MB", "--offload", "none"),
            ("--placement auto finds none", "--offload is none: leave it to auto"),
        ),
        (
            ("--memory-limit", "20MB", "--tensor-parallel-size", "2"),
            ("--placement auto finds none", "leave out --device-memory or --tensor-parallel-size"),
        ),
        (("--placement", "best"), ("--placement", "'given' or 'auto'")),
    ],
)
def test_what_leaves_no_choice_is_refused_by_name(
    deep: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    arguments = ("--placement", "auto", "--port", "0", "--runtime-dir", str(tmp_path / "r"))
    assert_refused(onecopy("serve", str(deep), *SETTINGS, *arguments, *options), *words)
