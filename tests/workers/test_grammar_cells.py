"""Grammars are followed in cells: what happens to these, and what they do, costs a sequence time,
or ends it, and no other."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.grammar_corpus import CASES
from tests.leaks import Leaks, children, wait_until
from tests.workers.byte_tokenizer import byte_tokenizer
from tests.workers.engines import engine_of, model_of, request, step
from workers.messages import GrammarKind, GrammarSpec, Output, SamplingParams
from workers.sampling import GrammarCompiler
from workers.sampling.grammar import Grammar

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
        monkeypatch.setattr(f"workers.sampling.grammar_cells.{name}", value)
    monkeypatch.setattr("workers.sampling.grammar_cells._MOST_LOSSES", 100)
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


def test_waiting_is_bounded(compiler: GrammarCompiler) -> None:
    grammar = begun(compiler, "json_schema", '{"type": "integer", "multipleOf": 99991}')
    begun_at = time.monotonic()
    compiler.receive(0.005)
    assert not grammar.arrived
    for _ in range(1000):  # it has been waited for once
        compiler.receive(0.005)
    assert time.monotonic() - begun_at < 1000 * 0.005
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
