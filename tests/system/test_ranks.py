"""Instances of several ranks over REST: their answers, their memory, and what becomes of a rank
that is killed or stopped."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.quick import long_run
from tests.references import load, ulps_below_the_best
from tests.system.running_server import TIMEOUT_S, Server, onecopy, wait_until
from tests.workers.tiny_models import write_checkpoint, write_tokenizer
from workers.conformance.ties import BF16_TIE_ULPS
from workers.process.first_rank import patience_s

NUM_TOKENS = 24
LEASE_BYTES = 64 << 10
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "The three most important things to remember when you write a letter are these:\n1.",
)
STORY = "Once upon a time, in a small village by the sea,"


def ask(server: Server, prompt: Any, max_tokens: int = NUM_TOKENS, **more: Any) -> dict[str, Any]:
    """A greedy completion."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, **more}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(server: Server, prompt: Any, max_tokens: int = NUM_TOKENS) -> list[int]:
    return ask(server, prompt, max_tokens)["choices"][0]["token_ids"]


def the_instance(server: Server) -> dict[str, Any]:
    [instance] = server.remember()["instances"]
    return instance


def replaced(server: Server, before: dict[str, Any]) -> Callable[[list[dict]], bool]:
    """Whether the only instance is another one, which is ready."""
    return lambda found: (
        [one["state"] for one in found] == ["ready"]
        and all(one["pid"] != before["pid"] for one in found)
    )


class Stream:
    """One greedy stream in a thread of its own."""

    def __init__(self, server: Server, max_tokens: int) -> None:
        self.begun = threading.Event()
        self._server = server
        self._max_tokens = max_tokens

    def run(self) -> list[int]:
        """Its tokens, when it has ended as it should."""
        body = {"model": self._server.model, "prompt": STORY, "max_tokens": self._max_tokens}
        body |= {"temperature": 0, "stream": True, "ignore_eos": True, "return_token_ids": True}
        url, found, ended = f"{self._server.url}/v1/completions", [], False
        with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    continue
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                found += choice.get("token_ids") or []
                self.begun.set()
        assert ended
        return found


@pytest.fixture(scope="module")
def server(make_server: Callable[..., Server]) -> Iterator[Server]:
    """The demo model in bf16, by the native kernels, on two ranks."""
    served = make_server(
        *("demo", "--instances", "1", "--tensor-parallel-size", "2", "--max-num-seqs", "8")
    )
    yield served
    served.remember()
    served.stop()


def test_the_plan_counts_what_ranks_lease_for_their_sums(
    server: Server, make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """Before anybody has asked them anything, nothing else is leased."""
    options = ("--instances", "1", "--tensor-parallel-size", "2", "--max-num-seqs", "8")
    assert planned_sums("demo", *options) == leased_bytes(server)
    tiny = str(write_tokenizer(write_checkpoint(tmp_path / "tiny", "llama")))
    options = ("--instances", "2", "--data-parallel-size", "3")
    divided = make_server(tiny, *options)
    assert planned_sums(tiny, *options) == leased_bytes(divided)
    divided.stop()


def planned_sums(model: str, *options: str) -> int:
    """In whole units of what a lease is made of."""
    outcome = onecopy("plan", model, *options, "--json")
    assert outcome.status == 0, outcome.stderr
    device = json.loads(outcome.stdout)["device"]
    assert device["sums_bytes"] > 0
    start = device["weights_bytes"] + device["sums_bytes"] + device["private_bytes_at_start"]
    assert device["total_bytes_at_start"] == start
    num_instances: int = json.loads(outcome.stdout)["load"]["num_instances"]
    each: int = device["sums_bytes"] // num_instances
    return num_instances * -(-each // LEASE_BYTES) * LEASE_BYTES


def leased_bytes(server: Server) -> int:
    shown = server.onecopy("ps", "--memory", "--json")
    leased: int = json.loads(shown.stdout)["devices"][0]["pool"]["leased_bytes"]
    return leased


def test_tokens_are_those_of_transformers_up_to_ties(
    server: Server, smollm2_by_transformers: Path
) -> None:
    """All prompts at once: each as it would be alone."""
    reference = load(smollm2_by_transformers, torch.float32)
    together = ask(server, list(PROMPTS))["choices"]
    for prompt, choice in zip(PROMPTS, together, strict=True):
        new, prompt_ids = choice["token_ids"], choice["prompt_token_ids"]
        assert len(new) == NUM_TOKENS
        assert max(ulps_below_the_best(reference, prompt_ids, new)) <= BF16_TIE_ULPS
        assert tokens(server, prompt) == new


def test_a_stream_has_the_same_tokens_and_what_was_computed_is_found_again(server: Server) -> None:
    prompt = STORY * 4
    first = ask(server, prompt)
    again = ask(server, prompt)
    assert again["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    assert Stream(server, NUM_TOKENS).run() == tokens(server, STORY)


def test_ranks_are_shown_and_have_one_copy(server: Server) -> None:
    [rank_pid] = the_instance(server)["rank_pids"]
    shown = server.onecopy("ps", "--json")
    [instance] = json.loads(shown.stdout)["instances"]
    [rank] = instance["ranks"]
    assert (rank["rank"], rank["pid"]) == (1, rank_pid)
    assert min(rank["shared_bytes"], rank["kv_resident_bytes"]) > 0
    table = server.onecopy("ps").stdout.splitlines()
    assert any(line.split()[:3] == ["rank", "1", str(rank_pid)] for line in table)

    proven = server.onecopy("verify", "--json", "--digests")
    assert proven.status == 0, proven.stdout
    verdict = json.loads(proven.stdout)
    assert [one["name"] for one in verdict["instances"]] == [
        instance["name"],
        f"{instance['name']} rank 1",
    ]
    assert [one["rank"] for one in verdict["instances"]] == [0, 1]
    assert verdict["weights_bytes"] < 100_000_000  # packed, of 269 MB in bf16
    assert verdict["weights_pss_bytes"] <= verdict["weights_bytes"] + 8192
    assert "The 2 ranks of 1 instance take" in server.onecopy("verify").stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_in_mid_stream_costs_no_request(
    server: Server, number: signal.Signals
) -> None:
    before = the_instance(server)
    expected = tokens(server, STORY, 120)
    with ThreadPoolExecutor(1) as pool:
        stream = Stream(server, 120)
        running = pool.submit(stream.run)
        assert stream.begun.wait(TIMEOUT_S)
        os.kill(before["rank_pids"][0], number)
        got = running.result(timeout=TIMEOUT_S)
    # It goes on by another instance from the tokens that it had; see test_survival.py.
    assert len(got) == 120
    assert got[:8] == expected[:8]
    [after] = server.wait_instances(replaced(server, before), "another instance")
    assert not set(after["rank_pids"]) & set(before["rank_pids"])
    assert tokens(server, PROMPTS[0]) == ask(server, [PROMPTS[0]])["choices"][0]["token_ids"]


def test_an_idle_rank_that_is_killed_is_noticed(server: Server) -> None:
    before = the_instance(server)
    os.kill(before["rank_pids"][0], signal.SIGKILL)
    server.wait_instances(replaced(server, before), "another instance")
    assert f"instance {before['name']} ends, and its requests go on elsewhere: rank 1 of 2" in (
        server.log.read_text()
    )


@long_run
def test_for_a_debugger_a_stopped_rank_is_waited_for(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """For longer than ranks wait for each other otherwise."""
    folder = write_tokenizer(write_checkpoint(tmp_path / "tiny", "llama"))
    options = ("--instances", "1", "--tensor-parallel-size", "2", "--hang-timeout", "0")
    server = make_server(str(folder), *options)
    before = the_instance(server)
    expected = tokens(server, STORY, 60)
    with ThreadPoolExecutor(1) as pool:
        stream = Stream(server, 60)
        os.kill(before["rank_pids"][0], signal.SIGSTOP)
        running = pool.submit(stream.run)
        stopped_at = time.monotonic()
        wait_until(lambda: time.monotonic() - stopped_at > patience_s(3.0) + 5, "some time")
        assert not running.done()
        os.kill(before["rank_pids"][0], signal.SIGCONT)
        assert running.result(timeout=TIMEOUT_S) == expected
    after = the_instance(server)
    assert (after["pid"], after["rank_pids"]) == (before["pid"], before["rank_pids"])
    server.stop()


def test_ranks_go_on_without_an_allocator(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """In fp32, by transformers' modules, on three ranks with guesses: as one rank would."""
    folder = write_tokenizer(write_checkpoint(tmp_path / "tiny", "llama"))
    prompt = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7] * 3
    expected = by_transformers(folder, prompt, 40)
    server = make_server(
        str(folder),
        *("--instances", "2", "--tensor-parallel-size", "3", "--num-speculative-tokens", "3"),
        "--map-files",
    )
    assert [len(one["rank_pids"]) for one in server.remember()["instances"]] == [2, 2]
    assert tokens(server, prompt, 40) == expected
    proven = server.onecopy("verify", "--json")
    assert proven.status == 0, proven.stdout
    allocator = server.status()["allocator"]["pid"]
    os.kill(allocator, signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(tokens, server, [9, *prompt], 40) for _ in range(4)]
        got = [one.result(timeout=TIMEOUT_S) for one in asked]
    assert got == [by_transformers(folder, [9, *prompt], 40)] * 4
    wait_until(lambda: server.remember()["allocator"]["pid"] != allocator, "another allocator")
    assert tokens(server, prompt, 40) == expected
    killed = server.status()["instances"][0]["pid"]
    os.kill(killed, signal.SIGKILL)  # its ranks end with it: `stop` sees that
    server.wait_instances(
        lambda found: (
            [one["state"] for one in found] == ["ready"] * 2
            and killed not in [one["pid"] for one in found]
        ),
        "another instance",
    )
    assert tokens(server, prompt, 40) == expected
    server.stop()


def by_transformers(folder: Path, prompt: list[int], num_new: int) -> list[int]:
    model = load(folder, torch.float32)
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        eos_token_id=None,
    )
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


def test_more_ranks_than_heads_are_refused_by_name(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    folder = write_tokenizer(write_checkpoint(tmp_path / "tiny", "llama"))
    server = make_server(str(folder), "--tensor-parallel-size", "5", wait=False)
    assert server.process.wait(TIMEOUT_S) != 0
    log = server.log.read_text()
    assert "--tensor-parallel-size is 5, but the model has 4 attention heads" in log
    assert "Traceback" not in log
