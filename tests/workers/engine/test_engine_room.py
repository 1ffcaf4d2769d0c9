"""The engine where room is short, shared or lost: the same tokens as alone, or a clear end.

Room is short by `room_for` so many blocks, or by a real allocator with a small limit.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from allocator import Client
from tests.daemon_process import DaemonProcess
from tests.quick import few_quick
from tests.workers.engine.engines import (
    PROMPTS,
    engine_of,
    expected,
    model_of,
    only,
    request,
    room_for,
    run,
    step,
    tokens,
)
from tests.workers.tiny_models import CONFIGS, config_of, prompt, reference_model, tensors_of
from workers.engine.generate import GenerationEngine
from workers.engine.room_sharing import NO_ROOM_PATIENCE_S
from workers.kv.cache import KVCache
from workers.kv.source import PoolSource
from workers.messages import Output
from workers.model.decoder import build_model
from workers.placement.resident import Resident

StartDaemon = Callable[..., DaemonProcess]
BLOCK_BYTES = 64 << 10
DRAWN: dict[str, Any] = {"temperature": 1.2, "top_k": 40, "seed": 5}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.connect() as client:
        yield client


def shared(
    client: Client, family: str = "llama", prefix_caching: bool = True, **changes: Any
) -> GenerationEngine:
    """An engine whose blocks are the allocator's."""
    layout = model_of(family).geometry.kv_layout
    pool = PoolSource(client, layout)
    kv = KVCache(layout, pool, weights=family, prefix_caching=prefix_caching)
    return engine_of(family, kv=kv, **changes)


def num_leased(client: Client) -> int:
    """Blocks of the whole pool that are leased or pinned, after its own check."""
    client.check_integrity()
    pool = client.statistics().pool
    return (pool.leased_bytes + pool.cached_bytes - pool.evictable_bytes) // BLOCK_BYTES


# --- sequences that give way


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_sequences_that_give_way_are_as_alone(family: str) -> None:
    engine = engine_of(family, kv=room_for(6, family), max_num_batched_tokens=16)
    outputs = run(engine, *(request(str(i), one) for i, one in enumerate(PROMPTS)))
    assert [tokens(outputs[str(i)]) for i in range(len(PROMPTS))] == expected(family)
    assert engine.report(()).num_preempted > 0


def test_what_is_drawn_does_not_change_by_giving_way() -> None:
    alone = [tokens(run(engine_of(), request("a", one, **DRAWN))["a"]) for one in PROMPTS]
    engine = engine_of(kv=room_for(5), max_num_batched_tokens=16)
    outputs = run(engine, *(request(str(i), one, **DRAWN) for i, one in enumerate(PROMPTS)))
    assert [tokens(outputs[str(i)]) for i in range(len(PROMPTS))] == alone
    assert engine.report(()).num_preempted > 0


def test_many_sequences_of_one_prompt_all_end_in_a_small_pool(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", str(6 * BLOCK_BYTES))
    with daemon.connect() as client:
        engine = shared(client, max_num_seqs=8)
        outputs = run(
            engine, *(request(str(n), PROMPTS[4], **(DRAWN | {"seed": n})) for n in range(8))
        )
        for n in range(8):
            alone = tokens(run(engine_of(), request("a", PROMPTS[4], **(DRAWN | {"seed": n})))["a"])
            assert tokens(outputs[str(n)]) == alone
            assert [one.finish_reason for one in outputs[str(n)]][-1] == "length"
        assert num_leased(client) == 0


def test_log_probabilities_of_a_prompt_come_once_however_often_it_gives_way() -> None:
    whole = run(engine_of(), request("a", PROMPTS[4], prompt_logprobs=2, logprobs=1))["a"]
    told = [one for output in whole for one in output.prompt_logprobs]
    assert len(told) == len(PROMPTS[4]) - 1
    engine = engine_of(kv=room_for(5), max_num_batched_tokens=7)
    first = request("first", PROMPTS[3], max_tokens=60)
    outputs = run(engine, first, request("a", PROMPTS[4], prompt_logprobs=2, logprobs=1))["a"]
    assert engine.report(()).num_preempted > 0
    again = [one for output in outputs for one in output.prompt_logprobs]
    assert [one.top_ids for one in again] == [one.top_ids for one in told]
    assert [one.logprob for one in again] == pytest.approx([one.logprob for one in told], abs=1e-4)
    assert tokens(outputs) == tokens(whole) == expected("llama")[4]
    drawn = [one for output in outputs for one in output.logprobs]
    assert len(drawn) == len(tokens(outputs))


def test_the_rows_of_a_prompts_logits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(engine_of(), request("a", PROMPTS[4], prompt_logprobs=0))["a"]
    monkeypatch.setattr("workers.engine.generate._LOGITS_BYTES", 3 * 4 * 320)
    parts = run(engine_of(), request("a", PROMPTS[4], prompt_logprobs=0))["a"]
    sizes = [len(output.prompt_logprobs) for output in parts if output.prompt_logprobs]
    assert sizes == [3] * 13
    told = [
        [one.logprob for output in each for one in output.prompt_logprobs]
        for each in (whole, parts)
    ]
    assert told[1] == pytest.approx(told[0], abs=1e-4)
    assert tokens(parts) == tokens(whole)


# --- guesses


@pytest.mark.parametrize("family", few_quick(CONFIGS))
def test_guessing_changes_no_token(family: str) -> None:
    """Prompts that repeat themselves, so that there is something to guess; greedy and drawn."""
    repeated = [[*one, *one, *one][:60] for one in PROMPTS[1:]]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.3, "seed": 3}]
    requests = [
        request(f"{i} {k}", one, max_tokens=30, **kind)
        for i, one in enumerate(repeated)
        for k, kind in enumerate(kinds)
    ]
    plain = run(engine_of(family), *requests)
    engine = engine_of(family, num_speculative_tokens=4, max_num_batched_tokens=37)
    guessed = run(engine, *requests)
    assert {name: tokens(one) for name, one in guessed.items()} == {
        name: tokens(one) for name, one in plain.items()
    }
    report = engine.report(())
    assert 0 <= report.accepted_tokens <= report.drafted_tokens


def test_right_guesses_save_steps() -> None:
    new = expected("llama")[2]
    said = [*PROMPTS[2], *new, *PROMPTS[2]]
    counts = []
    for most in (0, 4):
        engine = engine_of(num_speculative_tokens=most)
        engine.add(request("a", said, max_tokens=40))
        outputs: dict[str, list[Output]] = {}
        steps = 0
        while engine.has_work:
            step(engine, outputs)
            steps += 1
        counts.append((steps, tokens(outputs["a"]), engine.report(()).accepted_tokens))
    (plain_steps, plain, none), (steps, guessed, accepted) = counts
    assert (plain_steps, none) == (40, 0)
    assert guessed == plain
    assert steps == 40 - accepted


def test_guesses_end_where_the_sequence_ends() -> None:
    said = [7, 8, 9] * 10
    for changes in ({"max_tokens": 1}, {"max_tokens": 2}, {"max_tokens": 5}):
        plain = only(engine_of(max_model_len=40), request("a", said, **changes))
        assert (
            only(
                engine_of(max_model_len=40, num_speculative_tokens=8), request("a", said, **changes)
            )
            == plain
        )
    full = only(engine_of(max_model_len=34, num_speculative_tokens=8), request("a", said))
    assert (len(full[0]), full[1]) == (4, "length")


def test_a_stop_token_within_a_guess_ends_the_sequence_there() -> None:
    said = [*PROMPTS[2], *expected("llama")[2], *PROMPTS[2]]
    plain = only(engine_of(), request("a", said, max_tokens=40))[0]
    for stop in sorted(set(plain))[::4]:
        changes = {"max_tokens": 40, "stop_token_ids": (stop,)}
        one = request("a", said, **changes)
        got = only(engine_of(num_speculative_tokens=4), one)
        assert got == (plain[: plain.index(stop) + 1], "stop", "")


def test_guesses_need_no_room_that_others_need() -> None:
    said = [[7, 8, 9] * 10, [4, 5, 6, 4] * 8]
    requests = [request(str(n), one, max_tokens=30) for n, one in enumerate(said)]
    plain = run(engine_of(), *requests)
    engine = engine_of(kv=room_for(5), num_speculative_tokens=6)
    outputs = run(engine, *requests)
    for name, one in plain.items():
        assert tokens(outputs[name]) == tokens(one)


# --- what was computed before


def test_a_prompt_that_is_known_gives_the_same_tokens(daemon: DaemonProcess) -> None:
    """On the same instance and on another, in whole and in part."""
    long = prompt(70, seed=1)
    with daemon.connect() as one, daemon.connect() as other:
        first, second = shared(one), shared(other, max_num_batched_tokens=5)
        alone = only(engine_of(), request("a", long))
        assert only(first, request("a", long)) == alone
        for engine in (first, second):
            outputs = run(engine, request("a", long))["a"]
            assert tokens(outputs) == alone[0]
            assert outputs[0].num_cached == 64
        # Its answer was kept as well, and goes on as a conversation does.
        said = [*long, *alone[0], *prompt(9, seed=2)]
        outputs = run(second, request("b", said))["b"]
        assert outputs[0].num_cached == 80
        assert tokens(outputs) == only(engine_of(), request("b", said))[0]
        report = second.report(())
        assert (report.prompt_tokens, report.cached_tokens) == (70 + 95, 64 + 80)
        assert num_leased(one) == 0


def test_another_salt_finds_nothing(client: Client) -> None:
    long = prompt(70, seed=1)
    engine = shared(client)
    found = {}
    for salt in ("", "a", "b", "a"):
        outputs = run(engine, request("x", long, cache_salt=salt))["x"]
        found.setdefault(salt, []).append(outputs[0].num_cached)
        assert tokens(outputs) == tokens(run(engine_of(), request("x", long))["x"])
    assert found == {"": [0], "a": [0, 64], "b": [0]}


def test_prompt_logprobs_are_computed_even_of_what_is_known(client: Client) -> None:
    engine = shared(client)
    run(engine, request("a", PROMPTS[4]))
    outputs = run(engine, request("b", PROMPTS[4], prompt_logprobs=0))["b"]
    assert sum(len(output.prompt_logprobs) for output in outputs) == len(PROMPTS[4]) - 1
    assert tokens(outputs) == expected("llama")[4]


def test_what_went_wrong_is_nobody_elses(client: Client) -> None:
    """Keys and values that are no numbers are not for others to find."""
    model = build_model(
        config_of("llama"), Resident(tensors_of(reference_model("llama"))), torch.float32
    )
    layout = model.geometry.kv_layout
    engine = GenerationEngine(
        model, 128, kv=KVCache(layout, PoolSource(client, layout), weights="w")
    )
    wrong = [True]

    def disturb(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if wrong.pop() else output

    handle = model.module.get_input_embeddings().register_forward_hook(disturb)  # type: ignore[operator]
    (output,) = run(engine, request("a", PROMPTS[4]))["a"]
    assert output.finish_reason == "error"
    handle.remove()
    assert tokens(run(engine, request("a", PROMPTS[4]))["a"]) == expected("llama")[4]


# --- urgency


def test_the_urgent_goes_first_and_the_others_lose_nothing() -> None:
    engine = engine_of(max_num_seqs=1)
    outputs: dict[str, list[Output]] = {}
    engine.add(request("slow", PROMPTS[4], priority=5))
    for _ in range(3):
        step(engine, outputs)
    engine.add(request("equal", PROMPTS[3], priority=5))
    engine.add(request("urgent", PROMPTS[2]))
    order = []
    while engine.has_work:
        step(engine, outputs)
        order += [n for n, all_ in outputs.items() if all_[-1].finish_reason and n not in order]
    assert order == ["urgent", "slow", "equal"]
    got = [tokens(outputs[name]) for name in ("urgent", "equal", "slow")]
    assert got == expected("llama")[2:]


def test_a_deadline_ends_who_runs_and_who_waits() -> None:
    clock = Clock()
    engine = engine_of(max_num_seqs=2, clock=clock)
    outputs: dict[str, list[Output]] = {}
    for name, deadline_s in (("runs", 2.0), ("goes on", None), ("waits", 1.0), ("in time", 60.0)):
        engine.add(request(name, PROMPTS[2], deadline_s=deadline_s))
    step(engine, outputs)
    clock.now += 1.0
    step(engine, outputs)
    assert outputs["waits"][-1].error == "the request's deadline has passed"
    clock.now += 1.0
    step(engine, outputs)
    assert outputs["runs"][-1].finish_reason == "error"
    assert tokens(outputs["runs"]) == expected("llama")[2][:2]
    for name, rest in run(engine).items():
        outputs[name] += rest
    for name in ("goes on", "in time"):
        assert tokens(outputs[name]) == expected("llama")[2]


# --- no room at all


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "num_new"), [(40, 4, 0), (80, 4, 0), (20, 60, 12)]
)
@pytest.mark.parametrize("max_num_batched_tokens", [8, 256])
def test_what_never_fits_ends_after_a_while_with_the_reason(
    num_tokens: int, max_tokens: int, num_new: int, max_num_batched_tokens: int
) -> None:
    """A prompt that is too long, and one that grows too long; two blocks hold 32 tokens."""
    clock = Clock()
    engine = engine_of(kv=room_for(2), clock=clock, max_num_batched_tokens=max_num_batched_tokens)
    engine.add(request("a", prompt(num_tokens), max_tokens=max_tokens))
    outputs: dict[str, list[Output]] = {}
    stalled = 0
    for _ in range(400):
        step(engine, outputs)
        if not engine.has_work:
            break
        stalled += engine.is_stalled
        clock.now += 0.1
    last = outputs["a"][-1]
    assert last.finish_reason == "error"
    assert re.search("no room for its keys and values: .* KV blocks .* at most 2", last.error)
    assert len(tokens(outputs["a"])) == num_new + (num_new > 0)
    assert stalled > 10
    assert NO_ROOM_PATIENCE_S <= clock.now - 100.0 < NO_ROOM_PATIENCE_S + 10
    assert tokens(run(engine, request("b", PROMPTS[2]))["b"]) == expected("llama")[2]


def test_patience_begins_anew_for_everybody() -> None:
    clock = Clock()
    engine = engine_of(kv=room_for(2), clock=clock)
    engine.add(request("a", prompt(40)))
    outputs: dict[str, list[Output]] = {}
    step(engine, outputs)
    engine.abort("a")
    clock.now += 10 * NO_ROOM_PATIENCE_S
    engine.add(request("b", prompt(40)))
    step(engine, outputs)
    assert outputs == {}
    assert engine.is_stalled
    clock.now += NO_ROOM_PATIENCE_S
    step(engine, outputs)
    assert outputs["b"][-1].finish_reason == "error"
    assert not engine.has_work


def test_who_comes_behind_one_that_never_fits_is_served() -> None:
    clock = Clock()
    engine = engine_of(kv=room_for(3), clock=clock)
    for name, one in (("large", prompt(60)), ("small", PROMPTS[2]), ("other", PROMPTS[3])):
        engine.add(request(name, one))
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        step(engine, outputs)
        clock.now += 0.5
        assert clock.now < 300
    assert outputs["large"][-1].finish_reason == "error"
    assert [tokens(outputs[name]) for name in ("small", "other")] == expected("llama")[2:4]


def test_all_that_lack_room_wait_at_the_same_time() -> None:
    clock = Clock()
    engine = engine_of(kv=room_for(2), clock=clock)
    outputs: dict[str, list[Output]] = {}
    for name in "abc":
        engine.add(request(name, prompt(60)))
    step(engine, outputs)
    clock.now += NO_ROOM_PATIENCE_S / 2
    engine.add(request("late", prompt(60)))
    step(engine, outputs)
    assert outputs == {}
    clock.now += NO_ROOM_PATIENCE_S / 2
    for _ in range(4):
        step(engine, outputs)
    assert outputs.keys() == set("abc")
    assert engine.is_stalled
    clock.now += NO_ROOM_PATIENCE_S / 2
    step(engine, outputs)
    assert [outputs[name][-1].problem for name in ("a", "b", "c", "late")] == ["no_room"] * 4
    assert not engine.has_work


def test_what_never_fits_ends_also_where_others_come_and_go() -> None:
    clock = Clock()
    engine = engine_of(kv=room_for(3), clock=clock, max_num_seqs=2, max_num_batched_tokens=16)
    outputs: dict[str, list[Output]] = {}
    engine.add(request("large", prompt(60)))
    for n in range(400):
        if engine.num_waiting < 2:
            engine.add(request(f"small {n}", PROMPTS[2], max_tokens=3))
        step(engine, outputs)
        clock.now += 0.5
        if "large" in outputs:
            break
    assert outputs["large"][-1].finish_reason == "error"
    assert clock.now - 100.0 < 10 * NO_ROOM_PATIENCE_S
    assert len(outputs) > 3


# --- two instances and their allocator


def test_models_trade_memory(start_daemon: StartDaemon) -> None:
    """The one that came first holds all of it, and gives half back when the other one comes."""
    daemon = start_daemon("--memory-limit", str(24 * BLOCK_BYTES))
    with daemon.connect(model="llama") as one, daemon.connect(model="gemma2") as other:
        clock = Clock()
        first = shared(one, max_num_seqs=8, clock=clock)
        second = shared(other, "gemma2", max_num_seqs=8, clock=clock)
        outputs: dict[str, list[Output]] = {}
        for n in range(8):
            first.add(request(f"llama {n}", PROMPTS[4], max_tokens=40))
        for _ in range(3):
            step(first, outputs)
        for n in range(8):
            second.add(request(f"gemma2 {n}", PROMPTS[4], max_tokens=40))
        both = 0
        while first.has_work or second.has_work:
            for engine in (first, second):
                if engine.has_work:
                    step(engine, outputs)
            both += bool(first.num_running and second.num_running)
            clock.now += 0.11
            assert clock.now < 300
        assert both > 20
        for family in ("llama", "gemma2"):
            alone = only(engine_of(family), request("a", PROMPTS[4], max_tokens=40))[0]
            for n in range(8):
                assert tokens(outputs[f"{family} {n}"]) == alone
        assert num_leased(one) == 0


def test_what_another_instance_lacks_is_given_back_at_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", str(12 * BLOCK_BYTES))
    with daemon.connect() as one, daemon.connect() as other:
        clock = Clock()
        rich, poor = (
            shared(client, prefix_caching=False, clock=clock, max_num_seqs=8)
            for client in (one, other)
        )
        outputs: dict[str, list[Output]] = {}
        for n in range(4):
            rich.add(request(str(n), PROMPTS[4]))
        step(rich, outputs)
        assert num_leased(one) == 12
        poor.add(request("poor", prompt(90)))
        step(poor, outputs)
        assert poor.is_stalled
        clock.now += 0.11
        step(rich, outputs)
        step(poor, outputs)
        assert (rich.num_running, poor.num_running) == (2, 1)
        for engine in (rich, poor):
            for name, rest in run(engine).items():
                outputs.setdefault(name, []).extend(rest)
        assert [tokens(outputs[str(n)]) for n in range(4)] == [expected("llama")[4]] * 4


def test_an_allocator_that_ends_and_comes_back_changes_no_token(
    daemon: DaemonProcess, start_daemon: StartDaemon
) -> None:
    with daemon.connect() as client:
        engine = shared(client, max_num_batched_tokens=16, max_num_seqs=3)
        outputs: dict[str, list[Output]] = {}
        for n, one in enumerate(PROMPTS):
            engine.add(request(str(n), one))
        for _ in range(4):
            step(engine, outputs)
        daemon.kill()
        for _ in range(6):
            step(engine, outputs)
        start_daemon()
        for name, rest in run(engine).items():
            outputs.setdefault(name, []).extend(rest)
        assert [tokens(outputs[str(n)]) for n in range(5)] == expected("llama")
        assert num_leased(client) == 0


# --- everything at random


class Requests(RuleBasedStateMachine):
    """Requests come, are aborted at any moment, and give way, in a pool that two engines share."""

    CLIENTS: list[Client]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.engines = [
            shared(
                client,
                max_num_seqs=3,
                max_num_batched_tokens=11,
                num_speculative_tokens=3 * index,
                clock=self.clock,
            )
            for index, client in enumerate(self.CLIENTS)
        ]
        self.alive: dict[str, tuple[GenerationEngine, int]] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.count = 0

    @rule(
        which=st.integers(0, 1),
        index=st.integers(0, len(PROMPTS) - 1),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "s"]),
        logprobs=st.none() | st.just(1),
    )
    def add(self, which: int, index: int, priority: int, salt: str, logprobs: int | None) -> None:
        name = str(self.count)
        self.count += 1
        changes = {"cache_salt": salt, "priority": priority, "prompt_logprobs": logprobs}
        self.engines[which].add(request(name, PROMPTS[index], **changes))
        self.alive[name] = (self.engines[which], index)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        engine, _ = self.alive.pop(name)
        engine.abort(name)
        engine.check()
        assert num_leased(self.CLIENTS[0]) <= 12

    @rule(which=st.integers(0, 1), count=st.integers(1, 4))
    def steps(self, which: int, count: int) -> None:
        for _ in range(count):
            step(self.engines[which], self.outputs)
            self.clock.now += 0.03
        for name in [name for name, one in self.outputs.items() if one[-1].finish_reason]:
            outputs = self.outputs.pop(name)
            _, index = self.alive.pop(name)
            assert tokens(outputs) == expected("llama")[index]
            assert outputs[-1].finish_reason == "length"
            told = sum(len(one.prompt_logprobs) for one in outputs)
            assert told in (0, len(PROMPTS[index]) - 1)

    def teardown(self) -> None:
        for _ in range(1000):
            if not self.alive:
                break
            self.steps(0, 1)
            self.steps(1, 1)
        assert not self.alive
        assert all(engine.kv_bytes == 0 and not engine.has_work for engine in self.engines)
        assert num_leased(self.CLIENTS[0]) == 0


def test_at_random(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", str(12 * BLOCK_BYTES))
    with daemon.connect() as one, daemon.connect() as other:
        Requests.CLIENTS = [one, other]
        Requests.TestCase.settings = settings(
            max_examples=10,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        Requests.TestCase("runTest").runTest()
