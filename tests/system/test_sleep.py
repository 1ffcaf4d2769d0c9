"""A served model goes to sleep and is woken, by its users' own commands."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.system.running_server import TIMEOUT_S, Server
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its context holds a request that lasts."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder, "llama", max_position_embeddings=65536)
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def server(
    make_server: Callable[..., Server], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """With images of its own: others would wake what sleeps here instead of loading."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ONECOPY_IMAGE_DIR", str(tmp_path_factory.mktemp("images")))
        running = make_server(str(tiny), "--instances", "2")
    yield running
    running.remember()
    running.stop()


def text_of(server: Server, max_tokens: int = 24) -> str:
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={
            "model": server.model,
            "prompt": PROMPT,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        },
        timeout=TIMEOUT_S,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def memory_of(server: Server) -> dict:
    shown = server.onecopy("ps", "--memory", "--events", "50", "--json")
    assert shown.status == 0, shown.stderr
    document = json.loads(shown.stdout)
    (device,) = document["devices"]
    return {**device, "events": document["events"]}


@pytest.mark.parametrize(("level", "tier"), [("1", "host"), ("2", "disk")])
def test_it_sleeps_and_wakes_with_the_same_weights(server: Server, level: str, tier: str) -> None:
    before = text_of(server)
    slept = server.onecopy("sleep", "--level", level)
    assert slept.status == 0, slept.stderr
    memory = memory_of(server)
    (weights,) = memory["weight_sets"]
    assert (weights["state"], weights["tier"]) == ("asleep", tier)
    assert memory["used_bytes"] == memory["pool"]["cached_bytes"]  # what was computed stays
    health = httpx.get(f"{server.url}/health", timeout=TIMEOUT_S)
    assert (health.status_code, health.json()["status"]) == (503, "asleep")
    refused = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": server.model, "prompt": PROMPT},
        timeout=TIMEOUT_S,
    )
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "asleep"
    assert int(refused.headers["retry-after"]) > 0
    assert server.status()["instances"] == []

    woken = server.onecopy("wake")
    assert woken.status == 0, woken.stderr
    instances = server.remember()["instances"]
    assert [(one["state"], one["loaded"]) for one in instances] == [("ready", False)] * 2
    assert text_of(server) == before
    verified = server.onecopy("verify", "--digests")
    assert verified.status == 0, verified.stdout
    kinds = [event["kind"] for event in memory_of(server)["events"]]
    assert kinds.count("sealed") == 1, "the checkpoint was read again"


def test_requests_that_run_are_answered_first(server: Server) -> None:
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(text_of, server, 2_000)
        server.wait_instances(
            lambda instances: any(one["num_running"] for one in instances), "a running request"
        )
        assert server.onecopy("sleep").status == 0
        assert len(answer.result(TIMEOUT_S)) > 200
    assert server.onecopy("wake", server.model).status == 0
    server.remember()


def test_the_memory_is_drawn_for_people(server: Server) -> None:
    shown = server.onecopy("ps", "--memory", "--events", "3").stdout
    pids = sorted(one["pid"] for one in server.status()["instances"])
    assert f"{pids[0]}, {pids[1]}: once for all" in shown
    assert re.search(r"^host: \d+\.\d MB of .* used; allocator pid \d+$", shown, re.MULTILINE)
    assert "instance i" in shown


def test_metrics_tell_the_same(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
    figures = dict(re.findall(r"^(onecopy_allocator_\w+)\{device=\"host\"\} (\S+)$", text, re.M))
    memory = memory_of(server)
    assert float(figures["onecopy_allocator_used_bytes"]) == memory["used_bytes"] > 0
    # What the machine has left differs from one moment to the next.
    limits = float(figures["onecopy_allocator_limit_bytes"]), memory["limit_bytes"]
    assert min(limits) > 0.5 * max(limits)
    assert 'onecopy_allocator_weight_sets{device="host",state="sealed"} 1.0' in text
    assert "onecopy_allocator_up 1.0" in text


def test_metrics_tell_what_the_prefix_cache_found(server: Server) -> None:
    prompt = "Once upon a time, in a land far away, there lived " * 8
    body = {"model": server.model, "prompt": prompt, "max_tokens": 2}
    for _ in range(2):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S).raise_for_status()
    text = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
    found = re.findall(r"^onecopy_instance_prefix_cache_hits_total\{.*\} (\S+)$", text, re.M)
    assert sum(float(one) for one in found) >= 64
    held = re.findall(r"^onecopy_instance_kv_bytes\{.*\} (\S+)$", text, re.M)
    assert [float(one) for one in held] == [0.0] * len(held)


def test_pins_and_names(server: Server) -> None:
    assert server.onecopy("pin", server.model).status == 0
    assert memory_of(server)["weight_sets"][0]["pinned"]
    assert server.onecopy("pin", server.model, "--off").status == 0
    unknown = server.onecopy("sleep", "nobody")
    assert unknown.status == 1
    assert unknown.stderr.startswith("onecopy: no weight set is called 'nobody'; there are: ")
    busy = server.onecopy("evict", server.model)
    assert busy.status == 1
    assert "stop its readers first" in busy.stderr


def test_an_image_outlives_everything(
    make_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a GGUF file, whose weights are converted."""
    monkeypatch.setenv("ONECOPY_IMAGE_DIR", str(tmp_path))
    first = make_server("demo", "--instances", "1")
    assert first.onecopy("sleep", "--level", "2").status == 0
    first.stop()
    (image,) = tmp_path.iterdir()
    second = make_server("demo", "--instances", "1")
    assert [one["loaded"] for one in second.remember()["instances"]] == [False]
    assert memory_of(second)["weight_sets"][0]["segment"] == str(image)
    assert second.onecopy("sleep").status == 0
    evicted = second.onecopy("evict", "SmolLM2-135M-Instruct.Q4_1.gguf", "--image")
    assert evicted.status == 0, evicted.stderr
    assert list(tmp_path.iterdir()) == []
    assert second.onecopy("wake").status == 0
    assert [one["loaded"] for one in second.remember()["instances"]] == [True]
    second.stop()
