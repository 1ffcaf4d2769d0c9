"""A model's files change, or go, while it is served: what is served stays what it was."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator import RuntimeDir, connect
from tests.system.running_server import Server
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

PROMPT = "once upon a time"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama."""
    folder = write_checkpoint(tmp_path / "tiny", "llama")
    return write_tokenizer(folder)


@pytest.fixture
def serve(make_server: Callable[..., Server], folder: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*options: str) -> Server:
        started.append(make_server(str(folder), "--instances", "2", *options))
        return started[-1]

    yield start
    for server in started:
        server.remember()
        server.stop()


def replace_weights(folder: Path) -> None:
    """As a download does: under another name first."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" not in name:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.25
    save_file(tensors, folder / "new", metadata={"format": "pt"})
    (folder / "new").rename(folder / "model.safetensors")


def texts(server: Server, count: int = 4) -> set[str]:
    """Of the same greedy request, so often that every instance has answered it."""
    client = server.client()
    answers = [
        client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True, "cache_salt": str(number)},
        )
        for number in range(count)
    ]
    return {answer.choices[0].text for answer in answers}


def replace_all(server: Server, pid: int | None = None) -> None:
    """Kill every instance, or the process that they were forked from; others take their place."""
    before = {one["pid"] for one in server.remember()["instances"]}
    for one in before if pid is None else [pid]:
        os.kill(one, signal.SIGKILL)
    server.wait_instances(
        lambda instances: (
            [one["state"] for one in instances] == ["ready"] * 2
            and not before & {one["pid"] for one in instances}
        ),
        "two other instances",
    )


def num_sets(server: Server) -> int:
    with connect(RuntimeDir.open(server.runtime_dir)) as memory:
        return len(memory.statistics().weight_sets)


def test_what_is_served_stays_what_it_was(serve: Callable[..., Server], folder: Path) -> None:
    server = serve()
    [before] = texts(server)
    assert "has changed" not in server.onecopy("ps").stdout

    (folder / "model.safetensors").touch()  # nothing but its time
    replace_all(server)
    assert num_sets(server) == 1
    assert texts(server) == {before}
    assert "model.safetensors was written or replaced" in server.onecopy("ps").stdout

    replace_weights(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 77}')
    replace_all(server)
    assert (num_sets(server), texts(server)) == (1, {before})

    doctor = server.onecopy("doctor").stdout
    assert "generation_config.json was written or replaced; model.safetensors was" in doctor

    shutil.rmtree(folder)
    replace_all(server)
    assert texts(server) == {before}
    forkserver = server.status()["forkserver_pid"]
    replace_all(server, forkserver)  # and so has the one from which instances are forked
    assert (num_sets(server), texts(server)) == (1, {before})
    # What a grammar needs of the tokenizer is kept, too.
    answer = server.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=2, extra_body={"guided_choice": ["ab"]}
    )
    assert answer.choices[0].text == "ab"
    shown = server.onecopy("ps")
    assert f"{folder} is gone. `onecopy reload` serves" in shown.stdout
    assert server.onecopy("verify").status == 0
    assert server.status()["num_replaced"] >= 8


def test_weights_that_are_gone_are_loaded_again_if_the_files_are_the_same(
    serve: Callable[..., Server], folder: Path
) -> None:
    server = serve()
    [before] = texts(server)
    for _ in range(2):
        assert server.onecopy("sleep").status == 0
        assert server.onecopy("evict", "tiny").status == 0
        assert server.onecopy("wake").status == 0
        assert texts(server) == {before}
    replace_weights(folder)
    assert server.onecopy("sleep").status == 0
    assert server.onecopy("wake").status == 0  # the set still sleeps, and wakes
    assert texts(server) == {before}
    assert server.onecopy("sleep").status == 0
    assert server.onecopy("evict", "tiny").status == 0
    refused = server.onecopy("wake")
    assert refused.status == 1
    assert "no longer in the allocator's memory" in refused.stderr
    assert "`onecopy reload`" in refused.stderr
    assert "Traceback" not in server.log.read_text()


def test_mapped_files_that_are_replaced(serve: Callable[..., Server], folder: Path) -> None:
    """Instances go on with the file that they map; others can't begin, which is told."""
    server = serve("--map-files")
    [before] = texts(server)
    first, second = server.remember()["instances"]
    replace_weights(folder)
    os.kill(first["pid"], signal.SIGKILL)
    server.wait_instances(
        lambda _: server.status()["start_error"] is not None, "an instance that can't start"
    )
    assert texts(server) == {before}
    shown = server.onecopy("ps").stdout
    assert "instances can't start: the file" in shown
    assert "has changed since its weight set was made" in shown
    assert server.status()["instances"][0]["pid"] == second["pid"]
