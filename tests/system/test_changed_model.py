"""A model's files change, or go, while it is served: what is served stays what it was."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from safetensors.torch import load_file, save_file

from allocator import RuntimeDir, connect
from tests.system.running_server import TIMEOUT_S, Server, wait_until
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

    def start(*options: str, num_instances: int = 1) -> Server:
        instances = ("--instances", str(num_instances))
        started.append(make_server(str(folder), *instances, *options))
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
    """Of the same greedy request, so often that each of two instances has answered it."""
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


def replace_all(server: Server, forkserver: int | None = None) -> None:
    """Kill the process that instances are forked from, if it is named, and then every instance;
    others take their place."""
    before = {one["pid"] for one in server.remember()["instances"]}
    if forkserver is not None:
        os.kill(forkserver, signal.SIGKILL)
        wait_until(
            lambda: (
                (status := server.remember())["forkserver_is_up"]
                and status["forkserver_pid"] != forkserver
            ),
            "another forkserver",
        )
    for one in before:
        os.kill(one, signal.SIGKILL)
    server.wait_instances(
        lambda instances: (
            [one["state"] for one in instances] == ["ready"] * len(before)
            and not before & {one["pid"] for one in instances}
        ),
        "as many other instances",
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

    checks = json.loads(server.onecopy("doctor", "--json").stdout)["checks"]
    [check] = [one for one in checks if one["name"] == "served model"]
    assert check["status"] == "warning"
    assert "generation_config.json was written or replaced; model.safetensors was" in check["seen"]

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
    assert server.status()["num_replaced"] >= 4


def test_weights_that_are_gone_are_loaded_again_if_the_files_are_the_same(
    serve: Callable[..., Server], folder: Path
) -> None:
    server = serve()
    [before] = texts(server)
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
    server = serve("--map-files", num_instances=2)
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


# --- loading it anew


class Asking:
    """The same greedy request again and again, in a thread, until it is left."""

    def __init__(self, server: Server):
        self._client = server.client()
        self._leave = threading.Event()
        self.texts: list[str] = []
        self._thread = ThreadPoolExecutor(1)

    def _ask(self) -> None:
        while not self._leave.is_set():
            answer = self._client.completions.create(
                model="tiny",
                prompt=PROMPT,
                max_tokens=12,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            self.texts.append(answer.choices[0].text)

    def __enter__(self) -> "Asking":
        self._asking = self._thread.submit(self._ask)
        return self

    def __exit__(self, *_error: object) -> None:
        self._leave.set()
        self._asking.result()  # raises where a request failed
        self._thread.shutdown()


def long_stream(server: Server, begun: threading.Event) -> str:
    pieces = []
    for chunk in server.client().completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=1200,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        pieces.append(chunk.choices[0].text)
        begun.set()
    return "".join(pieces)


def test_a_reload_serves_what_lies_there_and_turns_nobody_away(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "llama", max_position_embeddings=4096)
    write_tokenizer(folder)
    server = make_server(str(folder), "--instances", "2")
    [old] = texts(server)
    whole = long_stream(server, threading.Event())
    assert whole.startswith(old)
    replace_weights(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 77}')
    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads, Asking(server) as asking:
        streaming = threads.submit(long_stream, server, begun)
        assert begun.wait(TIMEOUT_S)
        outcome = server.onecopy("reload")
        assert outcome.status == 0, outcome.stderr
        assert outcome.stdout == f"tiny is served as it lies at {folder} now\n"
        count = len(asking.texts)
        wait_until(lambda: len(asking.texts) >= count + 6, "answers after the reload")
        # What began before was answered by the weights that it began with.
        assert streaming.result() == whole
    [new] = texts(server)
    assert new != old
    assert set(asking.texts) == {old, new}
    assert asking.texts == sorted(asking.texts, key=lambda text: text == new)
    server.wait_instances(
        lambda instances: [one["state"] for one in instances] == ["ready"] * 2,
        "the instances of before to end",
    )
    assert server.status()["changed_files"] == []
    assert server.onecopy("verify").status == 0
    replace_all(server)
    assert texts(server) == {new}
    server.remember()
    server.stop()


def test_a_reload_that_fails_changes_nothing(serve: Callable[..., Server], folder: Path) -> None:
    server = serve()
    [before] = texts(server)
    pids = {one["pid"] for one in server.remember()["instances"]}
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    sound = weights.read_bytes(), tokenizer.read_bytes()
    for spoil, words in (
        (lambda: weights.write_bytes(sound[0][:-1]), "model.safetensors is truncated"),
        (lambda: tokenizer.write_text("{}"), "tokenizer.json can't be read"),
        (lambda: (folder / "config.json").write_text("{}"), "model_type None"),
        (lambda: shutil.rmtree(folder), "does not exist"),
    ):
        spoil()
        outcome = server.onecopy("reload")
        assert (outcome.status, outcome.stdout) == (1, "")
        assert outcome.stderr.startswith("onecopy: the model is served as before: ")
        assert words in outcome.stderr
        assert texts(server) == {before}
        assert {one["pid"] for one in server.remember()["instances"]} == pids
        if folder.exists():
            weights.write_bytes(sound[0])
            tokenizer.write_bytes(sound[1])
    assert server.onecopy("verify").status == 0
    assert server.status()["start_error"] is None


def test_a_reload_of_the_text_alone(serve: Callable[..., Server], folder: Path) -> None:
    server = serve()
    [before] = texts(server)
    client = server.client()
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    for _ in range(2):
        assert server.onecopy("reload").status == 0
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
        assert (num_sets(server), texts(server)) == (1, {before})
    assert server.onecopy("sleep").status == 0
    refused = server.onecopy("reload")
    assert (refused.status, "`onecopy wake`" in refused.stderr) == (1, True)
    assert server.onecopy("wake").status == 0


def test_a_link_that_leads_elsewhere_is_followed(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    replace_weights(other)
    link = tmp_path / "current"
    link.symlink_to(folder)
    server = make_server(str(link), "--instances", "1", "--served-model-name", "tiny")
    [before] = texts(server)
    (tmp_path / "next").symlink_to(other)
    (tmp_path / "next").rename(link)
    assert f"{link} leads to {other} now" in server.onecopy("ps").stdout
    replace_all(server)
    assert texts(server) == {before}
    assert server.onecopy("reload").status == 0
    [after] = texts(server)
    assert after != before
    server.remember()
    server.stop()
