"""A model whose layers are read from its files while it answers, served as any other."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.system.running_server import TIMEOUT_S, Server
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

PROMPTS = ("The capital of France is", "1, 2, 3,", "x")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = write_checkpoint(
        tmp_path / "tiny", "llama", num_hidden_layers=6, intermediate_size=2048
    )
    return write_tokenizer(folder)


def texts_of(server: Server) -> list[str]:
    """Greedy, of several prompts at once."""
    answer = ask(server)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def ask(server: Server) -> httpx.Response:
    body = {
        "model": server.model,
        "prompt": list(PROMPTS),
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
    }
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)


def device(server: Server) -> dict:
    shown = server.onecopy("ps", "--memory", "--json")
    assert shown.status == 0, shown.stderr
    return json.loads(shown.stdout)["devices"][0]


def leased_bytes(server: Server) -> int:
    return device(server)["pool"]["leased_bytes"]


def shared_bytes(server: Server) -> int:
    """Of the weights."""
    return device(server)["weight_sets"][0]["num_bytes"]


def test_the_texts_are_those_of_a_model_in_memory_through_everything(
    make_server: Callable[..., Server], tiny: Path
) -> None:
    whole = make_server(str(tiny), "--instances", "1")
    expected = texts_of(whole)
    set_bytes = shared_bytes(whole)
    whole.stop()

    server = make_server(str(tiny), "--instances", "2", "--offload", "all", "--no-prefix-caching")
    assert "6 of 6 layers are offloaded" in server.log.read_text()
    assert texts_of(server) == expected
    instances = server.remember()["instances"]
    assert shared_bytes(server) < set_bytes
    layer_bytes = (set_bytes - shared_bytes(server)) / 6
    assert 4 * layer_bytes <= leased_bytes(server) < 5 * layer_bytes  # two slots of each instance
    assert server.onecopy("verify", "--digests").status == 0

    os.kill(instances[0]["pid"], signal.SIGKILL)
    server.wait_instances(
        lambda found: (
            len(found) == 2
            and all(one["state"] == "ready" for one in found)
            and instances[0]["pid"] not in [one["pid"] for one in found]
        ),
        "a new instance",
    )
    assert texts_of(server) == expected

    for level in ("1", "2"):
        slept = server.onecopy("sleep", "--level", level)
        assert slept.status == 0, slept.stderr
        assert leased_bytes(server) == 0
        woken = server.onecopy("wake")
        assert woken.status == 0, woken.stderr
        server.remember()
        assert texts_of(server) == expected
    server.stop()


def test_a_file_that_changes_fails_requests_and_ends_nothing(
    make_server: Callable[..., Server], tiny: Path
) -> None:
    server = make_server(str(tiny), "--instances", "1", "--offload", "4", "--no-prefix-caching")
    expected = texts_of(server)
    before = server.remember()["instances"]
    weights = tiny / "model.safetensors"
    content = weights.read_bytes()
    with weights.open("r+b") as file:
        file.truncate(len(content) // 3)
        assert ask(server).status_code == 500
        assert "is not the file any more" in server.log.read_text()
        file.write(content)
    assert ask(server).status_code == 500
    assert [one["pid"] for one in server.remember()["instances"]] == [one["pid"] for one in before]
    reloaded = server.onecopy("reload")
    assert reloaded.status == 0, reloaded.stderr
    server.remember()
    assert texts_of(server) == expected
    server.onecopy("stop")
    server.process.wait(TIMEOUT_S)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--offload", "7"), "--offload is 7, but there are 6 layers that can be"),
        (("--offload", "some"), "it is auto, none, all or a number of layers"),
    ],
)
def test_what_can_not_be_is_said_in_a_line(
    make_server: Callable[..., Server], tiny: Path, arguments: tuple[str, ...], says: str
) -> None:
    """What else an instance refuses, `tests/workers/placement/test_choice.py` has."""
    server = make_server(str(tiny), "--instances", "1", *arguments, wait=False)
    assert server.process.wait(TIMEOUT_S) != 0
    assert says in server.log.read_text()
