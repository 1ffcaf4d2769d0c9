"""Grammars are tried out in cells: whatever they do there, they are judged, and nobody waits."""

import asyncio
import os
import random
import re
import signal
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.openai.cells import Cells, Lane
from server.api.openai.grammar_checks import GrammarChecks, Verdict
from server.errors import Overloaded
from tests.grammar_corpus import CASES
from tests.leaks import Leaks, children
from workers import Grant
from workers.messages import GrammarKind, GrammarSpec

pytestmark = pytest.mark.slow

T = TypeVar("T")

QUICK = GrammarSpec(kind="regex", source="[a-z]+")
ENDLESS = '{"type": "integer", "multipleOf": 9999991}'
SLOW = '{"type": "integer", "multipleOf": 99991}'


class _Counted(Cells):
    """Counts the cells that were asked for."""

    num_runs = 0

    async def run(
        self,
        kind: Any,
        given: bytes | int,
        options: Mapping[str, Any],
        grant: Grant,
        wall_s: float,
        lane: Lane,
    ) -> bytes:
        self.num_runs += 1
        return await super().run(kind, given, options, grant, wall_s, lane)


@pytest.fixture
def less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ones are given up sooner, so that fewer seconds are computed in vain."""
    less = Grant(0.5, 128 << 20, 8 << 20, nice=19)
    monkeypatch.setattr(f"{GrammarChecks.__module__}._SLOW", less)


def with_checks(use: Any) -> Any:
    """The result of `use(checks, cells)`; all processes have ended behind it."""

    async def work() -> Any:
        cells = _Counted()
        try:
            return await use(GrammarChecks(cells), cells)
        finally:
            cells.close()

    return asyncio.run(work())


def named(source: str, number: int) -> str:
    """The same schema, but another grammar."""
    return source.replace("{", f'{{"title": "{number}", ', 1)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    """Of the whole table."""

    async def judge(checks: GrammarChecks, _: Cells) -> dict[str, Verdict]:
        return {
            name: await checks.verdict(GrammarSpec(kind=kind, source=made()))
            for name, (kind, made, _) in CASES.items()
        }

    found: dict[str, Verdict] = with_checks(judge)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_grammar_is_judged(verdicts: dict[str, Verdict], name: str) -> None:
    verdict, expected = verdicts[name], CASES[name][2]
    if expected == "works":
        assert verdict.problem is None
    elif expected == "too complex":
        assert verdict.excessive
    elif expected != "any":
        assert verdict.problem is not None
        too_complex = verdict.excessive and "too complex" in expected
        assert too_complex or re.search(expected, verdict.problem)
    assert len(verdict.problem or "") < 1000


def test_the_bound_is_named(verdicts: dict[str, Verdict]) -> None:
    assert "nested too deeply" in (verdicts["rules in rules, 3000"].problem or "")
    assert "MiB" in (verdicts["a multiple of 9999991"].problem or "")
    assert " s to compile" in (verdicts["patterns of properties"].problem or "")


def test_what_a_grammar_takes_is_not_taken_from_us(verdicts: dict[str, Verdict]) -> None:
    """Two of the table would have taken gigabytes."""
    peak_kb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    assert verdicts
    assert peak_kb < 2_000_000


def test_a_grammar_is_looked_at_once_however_many_ask(no_leaks: Leaks) -> None:
    async def use(checks: GrammarChecks, cells: _Counted) -> None:
        found = await asyncio.gather(*(checks.verdict(QUICK) for _ in range(50)))
        assert found == [Verdict()] * 50
        assert await checks.verdict(QUICK) == Verdict()
        assert cells.num_runs == 1

    with_checks(use)


def test_a_quick_one_passes_slow_ones(no_leaks: Leaks, less_time: None) -> None:
    async def use(checks: GrammarChecks, _: Cells) -> None:
        await checks.verdict(QUICK)
        ended: list[str] = []

        async def judge(name: str, spec: GrammarSpec) -> Verdict:
            verdict = await checks.verdict(spec)
            ended.append(name)
            return verdict

        slow = [
            asyncio.create_task(
                judge("slow", GrammarSpec(kind="json_schema", source=named(ENDLESS, number)))
            )
            for number in range(6)
        ]
        await asyncio.sleep(0)
        quick = [judge("quick", GrammarSpec(kind="regex", source="a" * n)) for n in range(1, 10)]
        assert await asyncio.gather(*quick) == [Verdict()] * 9
        assert ended.count("slow") < 6
        assert all(one.excessive for one in await asyncio.gather(*slow))

    with_checks(use)


def test_too_many_slow_ones_are_turned_away_and_quick_ones_are_not(
    no_leaks: Leaks, less_time: None
) -> None:
    async def use(checks: GrammarChecks, _: Cells) -> None:
        asked = [
            asyncio.create_task(
                checks.verdict(GrammarSpec(kind="json_schema", source=named(ENDLESS, number)))
            )
            for number in range(16)
        ]
        assert await checks.verdict(QUICK) == Verdict()
        found = await asyncio.gather(*asked, return_exceptions=True)
        away = [one for one in found if isinstance(one, Overloaded)]
        assert away
        assert "take long" in str(away[0])
        assert all(one.excessive for one in found if isinstance(one, Verdict))
        # One that was turned away is not forgotten as judged.
        again = GrammarSpec(kind="json_schema", source=named(ENDLESS, 15))
        assert (await checks.verdict(again)).excessive

    with_checks(use)


def test_one_that_took_long_is_said_to(no_leaks: Leaks) -> None:
    async def use(checks: GrammarChecks, _: Cells) -> None:
        verdict = await checks.verdict(GrammarSpec(kind="json_schema", source=SLOW))
        assert verdict == Verdict(slow=True)

    with_checks(use)


def _descendants(others: Container[int]) -> list[int]:
    """Our children but for these, and theirs."""
    found = [pid for pid in children() if pid not in others]
    for pid in list(found):
        listed = Path(f"/proc/{pid}/task/{pid}/children")
        if listed.exists():
            found += map(int, listed.read_text().split())
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_that_end_or_stop_cost_time_only(
    no_leaks: Leaks, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.openai.grammar_checks._WALL_S", 2.0)
    monkeypatch.setattr("server.api.openai.cells._PATIENCE_S", 0.3)
    rng = random.Random(5)
    others = set(children())

    async def use(checks: GrammarChecks, _: Cells) -> None:
        await checks.verdict(QUICK)
        for turn in range(4):
            asked = [
                asyncio.create_task(
                    checks.verdict(GrammarSpec(kind="regex", source=f"[a-z]{{{turn + 1},{n}}}"))
                )
                for n in range(50, 60)
            ]
            await asyncio.sleep(0)
            victims = _descendants(others)
            if victims:
                os.kill(rng.choice(victims), number)
            assert await asyncio.gather(*asked) == [Verdict()] * len(asked)

    with_checks(use)


kinds = st.sampled_from(["json_schema", "regex", "choice", "lark", "json_object"])
snippets = st.lists(
    st.sampled_from(
        [
            *(
                "(",
                ")",
                "[",
                "]",
                "{",
                "}",
                "*",
                "+",
                "?",
                "|",
                "{0,9999}",
                "\\p{L}",
                ".",
                "^",
                "$",
            ),
            *(
                '"a"',
                '"b"',
                "a",
                "b",
                "start: ",
                "x: ",
                "X: ",
                "\n",
                " ",
                "/a+/",
                "~",
                "&",
                "%",
                "\\",
            ),
            *('{"type": "integer"', ', "minimum": 5', '"$ref": "#"', '"anyOf": [', "{}", ",", ":"),
        ]
    ),
    max_size=40,
).map("".join)


def test_grammars_made_at_random_are_judged(no_leaks: Leaks) -> None:
    """No case may end in an error of ours."""
    loop = asyncio.new_event_loop()
    cells = Cells()
    checks = loop.run_until_complete(_made(cells))

    @settings(deadline=None, max_examples=150)
    @given(kinds, snippets)
    def judge(kind: GrammarKind, source: str) -> None:
        verdict = loop.run_until_complete(checks.verdict(GrammarSpec(kind=kind, source=source)))
        assert isinstance(verdict, Verdict)

    try:
        judge()
    finally:
        loop.run_until_complete(_closed(cells))
        loop.close()


async def _made(cells: Cells) -> GrammarChecks:
    return GrammarChecks(cells)


async def _closed(cells: Cells) -> None:
    cells.close()
