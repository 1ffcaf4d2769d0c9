"""Grammars are followed in cells: what happens to these, and what they do, costs a sequence time,
or ends it, and no other."""

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.grammar_corpus import CASES
from tests.leaks import Leaks, children, wait_until
from tests.workers.engine.engines import engine_of, model_of, request, step
from tests.workers.grammar.babbling_follower import FIRST, NONSENSE
from tests.workers.grammar.byte_tokenizer import byte_tokenizer
from workers.grammar.follower import (
    MAX_FOLLOWED,
    MAX_FRAME_BYTES,
    Compile,
    Failed,
    Follow,
    Leave,
    Position,
    decode_from_cell,
)
from workers.grammar.grammar import Grammar
from workers.messages import GrammarKind, GrammarSpec, Output, SamplingParams
from workers.process import warden
from workers.sampling import GrammarCompiler

pytestmark = pytest.mark.slow

SIZE = 300
"""Of the vocabulary; the tokenizer has some fewer."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return byte_tokenizer(path), path


@pytest.fixture
def compiler(
    tokenizer: tuple[Tokenizer, Path], no_leaks: Leaks, others: set[int]
) -> Iterator[GrammarCompiler]:
    made, path = tokenizer
    compiler = GrammarCompiler(path, SIZE, (made.token_to_id("<end>"),))
    yield compiler
    compiler.close()


def begun(
    compiler: GrammarCompiler, kind: GrammarKind, source: str, tokens: Sequence[int] = ()
) -> Grammar:
    params = SamplingParams(max_tokens=99, grammar=GrammarSpec(kind=kind, source=source))
    grammar = compiler.grammar(params)
    assert grammar is not None
    grammar.begin(tokens, ())
    return grammar


def arrived(compiler: GrammarCompiler, *grammars: Grammar) -> None:
    def look() -> bool:
        compiler.receive(0.01, late_too=True)
        return all(one.arrived for one in grammars)

    wait_until(look, "grammars to know what may come next")


def allowed(grammar: Grammar) -> list[int]:
    bits = np.zeros(-(-SIZE // 8), np.uint8)
    grammar.fill_mask(bits, np.zeros(0, np.int64))
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()


@pytest.fixture
def descendants(others: set[int]) -> Callable[[], list[int]]:
    """The warden of this test, and its cells."""
    return lambda: _descendants(others)


@pytest.fixture
def others() -> set[int]:
    """Children that were there before."""
    return set(children())


def _descendants(others: set[int]) -> list[int]:
    found = [pid for pid in children() if pid not in others]
    for pid in list(found):
        listed = Path(f"/proc/{pid}/task/{pid}/children")
        if listed.exists():
            found += map(int, listed.read_text().split())
    return found


@pytest.mark.parametrize(
    "name", [name for name, (_, _, expected) in CASES.items() if expected in ("works", "any")]
)
def test_what_passes_can_be_followed_or_says_why_not(compiler: GrammarCompiler, name: str) -> None:
    kind, made, _ = CASES[name]
    rng = random.Random(1)
    grammar, other = begun(compiler, kind, made()), begun(compiler, "regex", "[a-z]*")
    for _ in range(20):
        arrived(compiler, grammar, other)
        other.accept(allowed(other)[0], ends=False)
        if grammar.problem is not None:
            assert grammar.is_invalid
            assert "error of ours" not in grammar.problem
            break
        choices = allowed(grammar)
        if not choices:
            break  # only the end may follow
        grammar.accept(rng.choice(choices), ends=False)
    arrived(compiler, other)
    assert other.problem is None


def test_a_sequence_that_takes_too_long_ends(compiler: GrammarCompiler) -> None:
    kind, made, _ = CASES["ambiguous"]
    grammar = begun(compiler, kind, made())
    tokens = 0
    while grammar.problem is None and tokens < 1000:
        arrived(compiler, grammar)
        if grammar.problem is None:
            grammar.accept(97 - 33, ends=False)  # "a": the vocabulary begins at "!"
            tokens += 1
    assert grammar.is_invalid
    assert grammar.problem is not None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_that_end_or_stop_cost_time_only(
    compiler: GrammarCompiler,
    descendants: Callable[[], list[int]],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("_SILENCE_S", 0.5), ("_FIRST_SILENCE_S", 3.0), ("_PATIENCE_S", 0.3)):
        monkeypatch.setattr(f"workers.grammar.cells.{name}", value)
    monkeypatch.setattr("workers.grammar.cells._MOST_LOSSES", 100)
    rng = random.Random(3)
    sources = ["([a-c]{3}-)+", "([a-c]{3}-)+", "[a-z]*", "(ab|cd)+"]
    disturbed = [begun(compiler, "regex", source) for source in sources]
    quiet = [begun(compiler, "regex", source) for source in sources]
    for turn in range(12):
        arrived(compiler, *disturbed, *quiet)
        for one, twin in zip(disturbed, quiet, strict=True):
            assert allowed(one) == allowed(twin)
            choice = rng.choice(allowed(one))
            one.accept(choice, ends=False)
            twin.accept(choice, ends=False)
        if turn % 3 == 2:
            victims = descendants()
            os.kill(rng.choice(victims), number)
    arrived(compiler, *disturbed, *quiet)
    assert all(one.problem is None for one in (*disturbed, *quiet))
    assert any(one.num_losses for one in (*disturbed, *quiet))


def test_more_grammars_than_cells_take_turns(
    compiler: GrammarCompiler, descendants: Callable[[], list[int]]
) -> None:
    grammars = [begun(compiler, "regex", f"[a-z]{{{number}}}") for number in range(1, 101)]
    for number, grammar in enumerate(grammars):
        arrived(compiler, grammar)
        assert allowed(grammar), number
        grammar.leave()
    assert len(descendants()) < 70


def test_a_cell_is_shared_by_those_of_one_grammar_and_closed_when_unused(
    compiler: GrammarCompiler, descendants: Callable[[], list[int]]
) -> None:
    same = [begun(compiler, "regex", "[ab]+") for _ in range(20)]
    arrived(compiler, *same)
    assert len(descendants()) == 2  # the warden and one cell
    for index, one in enumerate(same):
        one.accept(allowed(one)[index % 2], ends=False)
    arrived(compiler, *same)
    for one in same:
        one.leave()
    for number in range(12):
        grammar = begun(compiler, "regex", f"c{{{number + 1}}}")
        arrived(compiler, grammar)
        grammar.leave()
    wait_until(lambda: len(descendants()) <= 1 + 8, "cells that nobody uses to end")


def test_one_that_shares_a_cell_is_not_ended_by_anothers_text(compiler: GrammarCompiler) -> None:
    """The library counts what it remembers of a grammar, whoever's text made it."""
    source = "(.|\n)*a(.|\n){500}"
    victim, culprit = begun(compiler, "regex", source), begun(compiler, "regex", source)
    arrived(compiler, victim, culprit)
    rng = random.Random(1)
    while culprit.problem is None:
        culprit.accept(rng.choice(allowed(culprit)), ends=False)
        arrived(compiler, culprit)
    assert "states" in culprit.problem
    assert culprit.alone  # it had been given a second try
    for _ in range(3):
        arrived(compiler, victim)
        assert victim.problem is None
        victim.accept(allowed(victim)[5], ends=False)
    arrived(compiler, victim)
    assert victim.problem is None


def token(letter: str) -> int:
    return ord(letter) - FIRST


def test_a_sequence_goes_on_from_where_it_is_while_another_cell_takes_over(
    compiler: GrammarCompiler,
    descendants: Callable[[], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its next token may be chosen before the new cell has said where that begins."""
    monkeypatch.setattr("workers.grammar.cells._MOST_LOSSES", 100)
    text = "A1B2C3D4E5"
    grammars = [begun(compiler, "regex", text) for _ in range(3)]
    for number, letter in enumerate(text):
        arrived(compiler, *grammars)
        (cell,) = set(descendants()) - set(children())
        os.kill(cell, signal.SIGKILL)

        def lost(expected: int = number + 1) -> bool:
            compiler.receive(0)
            return all(one.num_losses == expected for one in grammars)

        wait_until(lost, "the end of the cell to be known")
        for one in grammars:
            assert one.arrived
            assert allowed(one) == [token(letter)]
            one.accept(token(letter), ends=False)
    arrived(compiler, *grammars)
    assert all(one.problem is None and allowed(one) == [] for one in grammars)


def test_streams_that_all_begin_anew_at_once_are_told_as_the_cell_reads(
    compiler: GrammarCompiler, descendants: Callable[[], list[int]]
) -> None:
    """As after the end of an instance, whose streams another one takes over."""
    first = begun(compiler, "regex", "[a-z]+")
    arrived(compiler, first)
    (host,) = set(descendants()) & set(children())
    os.kill(host, signal.SIGSTOP)  # no cell is forked before all have begun
    text = "abc-" * 4100
    try:
        sizes = [3 * MAX_FOLLOWED + number for number in range(-2, 3)]
        sizes += range(4000, 4023)
        sizes += [16_000 + number for number in range(4)]
        streams = [
            begun(compiler, "regex", "([a-c]{3}-)+", [token(letter) for letter in text[:size]])
            for size in sizes
        ]
        late = begun(compiler, "regex", "([a-c]{3}-)+")
        for _ in range(20):
            compiler.receive(0.005)
        streams[0].leave()
    finally:
        os.kill(host, signal.SIGCONT)
    arrived(compiler, *streams[1:], late, first)
    for size, one in [(0, late), *zip(sizes[1:], streams[1:], strict=True)]:
        assert one.problem is None
        assert one.num_losses == 0
        assert (allowed(one) == [token("-")]) == (size % 4 == 3)
        assert token("a" if size % 4 < 3 else "-") in allowed(one)
        one.accept(token(text[size]), ends=False)
    arrived(compiler, *streams[1:])
    assert all(one.problem is None for one in streams)


@pytest.mark.parametrize("letter", sorted(NONSENSE))
def test_a_cell_that_answers_nonsense_costs_others_time_only(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    launch = warden.launch
    monkeypatch.setattr(
        warden, "launch", lambda _, setup: launch("tests.workers.grammar.babbling_follower", setup)
    )
    victim, culprit = (begun(compiler, "regex", "[A-Z]+") for _ in range(2))
    arrived(compiler, victim, culprit)
    expected = allowed(victim)
    culprit.accept(token(letter), ends=False)
    for _ in range(5):
        arrived(compiler, victim)
        assert victim.problem is None
        assert allowed(victim) == expected
        victim.accept(token("A"), ends=False)
    arrived(compiler, victim, culprit)
    assert culprit.problem is not None
    assert not culprit.is_invalid
    assert "again and again" in culprit.problem


def test_a_cell_is_not_ended_by_what_is_on_its_way_for_one_that_has_failed(
    tokenizer: tuple[Tokenizer, Path], no_leaks: Leaks
) -> None:
    setup = {"tokenizer": str(tokenizer[1]), "vocab_size": SIZE, "eos_token_ids": []}
    process, control = warden.launch("workers.grammar.follower", setup)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with process, control, ours:
        with theirs:
            grant = warden.Grant(6.0, 256 << 20, 64 << 20)
            warden.send(control, warden.Task(1, "follow", {}, grant), theirs.fileno())
        ours.send(msgspec.msgpack.encode(Compile("regex", "ab+")))

        def answered(message: Follow) -> Position | Failed:
            ours.send(msgspec.msgpack.encode(message))
            return decode_from_cell(ours.recv(MAX_FRAME_BYTES))

        letters = [token(letter) for letter in "abx"]
        assert isinstance(answered(Follow(7, 0, letters[:1], [False])), Position)
        failed = answered(Follow(8, 0, letters, [False] * 3))
        assert isinstance(failed, Failed)
        assert failed.sequence == 8
        assert answered(Follow(8, 3, letters[:1], [False])) == Failed(
            8, "its grammar was not followed so far"
        )
        ours.send(msgspec.msgpack.encode(Leave(8)))
        goes_on = answered(Follow(7, 1, letters[1:2], [False]))
        assert isinstance(goes_on, Position)
        assert (goes_on.num_tokens, goes_on.accepting) == (2, True)
        control.close()
        process.wait()


def test_what_does_not_come_is_waited_for_once(
    compiler: GrammarCompiler, descendants: Callable[[], list[int]]
) -> None:
    grammar = begun(compiler, "json_schema", '{"type": "integer", "multipleOf": 99991}')
    (host,) = set(descendants()) & set(children())
    os.kill(host, signal.SIGSTOP)  # then it starts no cell
    held = descendants()
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        compiler.receive(0.005)
        assert not grammar.arrived
        begun_at = time.monotonic()
        for _ in range(1000):
            compiler.receive(600.0)
        assert time.monotonic() - begun_at < 600.0
    finally:
        for pid in held:
            os.kill(pid, signal.SIGCONT)
    arrived(compiler, grammar)


# --- in the engine


def test_others_go_on_while_a_grammar_is_compiled(
    tokenizer: tuple[Tokenizer, Path], no_leaks: Leaks
) -> None:
    engine = engine_of(tokenizer=tokenizer[1])
    outputs: dict[str, list[Output]] = {}
    slow = GrammarSpec(kind="json_schema", source='{"type": "integer", "multipleOf": 99991}')
    end = tokenizer[0].token_to_id("<end>")
    engine.add(request("slow", [5, 6, 7], max_tokens=3, grammar=slow, stop_token_ids=(end,)))
    num_done = 0
    while "slow" not in outputs:
        name = f"plain {num_done}"
        engine.add(request(name, [1, 2, 3], max_tokens=4))
        while not any(one.finish_reason for one in outputs.get(name, ())):
            step(engine, outputs)
        num_done += 1
    assert num_done > 3
    while engine.has_work:
        step(engine, outputs)
    engine.close()


def test_a_grammar_that_fails_on_its_way_ends_its_own_sequence_alone(
    tokenizer: tuple[Tokenizer, Path], no_leaks: Leaks
) -> None:
    engine = engine_of(tokenizer=tokenizer[1])
    outputs: dict[str, list[Output]] = {}
    end = tokenizer[0].token_to_id("<end>")
    kind, made, _ = CASES["15,000 optional parts"]
    bad = GrammarSpec(kind=kind, source=made())
    engine.add(request("bad", [5, 6, 7], grammar=bad, stop_token_ids=(end,)))
    engine.add(request("good", [5, 6, 7], max_tokens=40))
    while engine.has_work:
        step(engine, outputs)
    assert outputs["bad"][-1].finish_reason == "error"
    assert outputs["bad"][-1].invalid
    assert "max is" in outputs["bad"][-1].error
    assert outputs["good"][-1].finish_reason == "length"
    engine.close()


def test_sequences_that_wait_for_their_grammar_can_be_aborted_and_expire(
    tokenizer: tuple[Tokenizer, Path], no_leaks: Leaks
) -> None:
    now = 0.0
    engine = engine_of(tokenizer=tokenizer[1], clock=lambda: now)
    outputs: dict[str, list[Output]] = {}
    slow = GrammarSpec(kind="json_schema", source='{"type": "integer", "multipleOf": 99991}')
    for name in ("aborted", "late"):
        engine.add(request(name, [5, 6], grammar=slow, stop_token_ids=(1,), deadline_s=5.0))
    step(engine, outputs)
    engine.abort("aborted")
    now = 6.0
    step(engine, outputs)
    assert [one.problem for one in outputs["late"]] == ["deadline"]
    assert "aborted" not in outputs
    assert not engine.has_work
    engine.close()


def test_more_sequences_with_grammars_than_places_are_all_answered(
    tokenizer: tuple[Tokenizer, Path], no_leaks: Leaks
) -> None:
    engine = engine_of(tokenizer=tokenizer[1], max_num_seqs=4, num_speculative_tokens=3)
    outputs: dict[str, list[Output]] = {}
    end = tokenizer[0].token_to_id("<end>")
    vocab_size = model_of("llama").geometry.vocab_size
    assert end < vocab_size
    for number in range(24):
        grammar = GrammarSpec(kind="regex", source=f"(ab|cd){{{1 + number % 6}}}")
        changes = {"grammar": grammar, "stop_token_ids": (end,), "ignore_eos": False}
        engine.add(request(str(number), [5, 6, 7], max_tokens=40, **changes))
        engine.add(request(f"plain {number}", [5, 6, 7]))
    while engine.has_work:
        step(engine, outputs)
    assert len(outputs) == 48
    for number in range(24):
        assert outputs[str(number)][-1].finish_reason == "stop"
        ids = [token for one in outputs[str(number)] for token in one.token_ids]
        text = tokenizer[0].decode(ids)
        assert len(text) == 2 * (1 + number % 6)
        assert {text[n : n + 2] for n in range(0, len(text), 2)} <= {"ab", "cd"}
    engine.close()
