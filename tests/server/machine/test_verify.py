"""Each criterion of the proof that one copy serves all, broken by itself."""

from dataclasses import replace
from typing import Any

import pytest

from server.console.verdict import verdict_lines
from server.machine.process_memory import ProcessMemory, SegmentMapping
from server.machine.verify import MAX_PRIVATE_BYTES, Verdict, judge

NAME = "/onecopy-abc-w1"
WEIGHTS_BYTES = 100_000_001
MAPPED_BYTES = 100_003_840  # whole pages
MAPPING = SegmentMapping(
    name=NAME,
    inode="00:1a:77",
    mapped_bytes=MAPPED_BYTES,
    resident_bytes=MAPPED_BYTES,
    pss_bytes=MAPPED_BYTES // 2,
    writable=False,
    shared=True,
)
MEMORY = ProcessMemory(
    pid=11,
    segments=(MAPPING,),
    kv_bytes=3_000_000,
    private_parts={"anonymous memory": 39_000_000, "/dev/shm/other": 1_000_000},
    pss_bytes=95_000_000,
)
SOUND = ("i0", MEMORY)


def mapping(**changes: Any) -> ProcessMemory:
    """Of an instance whose one mapping of the weights differs so."""
    return replace(MEMORY, pid=12, segments=(replace(MAPPING, **changes),))


def judged(*others: ProcessMemory | None, **options: int) -> Verdict:
    """Of a sound instance and these."""
    instances = [SOUND, *((f"i{number}", other) for number, other in enumerate(others, 1))]
    return judge(NAME, WEIGHTS_BYTES, instances, **options)


def test_two_that_share_hold_and_are_added_up() -> None:
    verdict = judged(replace(MEMORY, pid=12))
    assert (verdict.holds, verdict.problems) == (True, [])
    assert (verdict.segment, verdict.inode) == (NAME, "00:1a:77")
    assert verdict.weights_pss_bytes == MAPPED_BYTES
    assert verdict.total_bytes == WEIGHTS_BYTES + 2 * 43_000_000
    assert verdict.unshared_bytes == 2 * WEIGHTS_BYTES + 2 * 43_000_000
    assert [(one.name, one.pid) for one in verdict.instances] == [("i0", 11), ("i1", 12)]
    first = verdict.instances[0]
    assert (first.mapped_bytes, first.resident_bytes) == (MAPPED_BYTES, MAPPED_BYTES)
    assert (first.private_bytes, first.kv_bytes) == (40_000_000, 3_000_000)


def test_ranks_are_processes_of_an_instance_that_would_have_one_copy() -> None:
    third = replace(MAPPING, pss_bytes=MAPPED_BYTES // 3)
    memories = [replace(MEMORY, pid=pid, segments=(third,)) for pid in (11, 12, 13)]
    named = list(zip(("i0", "i0 rank 1", "i0 rank 2"), memories, strict=True))
    verdict = judge(NAME, WEIGHTS_BYTES, named, ranks={12: 1, 13: 2})
    assert verdict.holds, verdict.problems
    assert [one.rank for one in verdict.instances] == [0, 1, 2]
    assert verdict.num_instances == 1
    assert verdict.unshared_bytes == verdict.total_bytes == WEIGHTS_BYTES + 3 * 43_000_000
    text = verdict_lines(verdict)
    assert "the ranks' shares of them add up" in text
    assert "The 3 ranks of 1 instance take 229.0 MB." in text
    verdict = judge(NAME, WEIGHTS_BYTES, named, ranks={13: 1})
    assert "The 3 ranks of 2 instances take 229.0 MB; 2 private copies" in verdict_lines(verdict)
    assert "3 instances take 229.0 MB; 3 private" in verdict_lines(
        judge(NAME, WEIGHTS_BYTES, named)
    )


def test_other_segments_are_nobodys_business() -> None:
    other = replace(MAPPING, name="/onecopy-abc-w2", inode="00:1a:78", writable=True)
    assert judged(replace(MEMORY, segments=(other, MAPPING))).holds


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (None, "i1: its process is gone"),
        (replace(MEMORY, segments=()), f"i1: maps 0 segments called {NAME}, not one"),
        (mapping(name="/onecopy-abc-w2"), f"i1: maps 0 segments called {NAME}, not one"),
        (
            replace(MEMORY, segments=(MAPPING, replace(MAPPING, pss_bytes=0))),
            f"i1: maps 2 segments called {NAME}, not one",
        ),
        (mapping(mapped_bytes=WEIGHTS_BYTES - 1), f"i1: maps {WEIGHTS_BYTES - 1} of the"),
        (mapping(writable=True), "i1: its mapping is writable or private"),
        (mapping(shared=False), "i1: its mapping is writable or private"),
        (mapping(inode="00:1a:78"), "the instances map 2 different objects"),
        (
            replace(MEMORY, private_parts={"/memfd:x": MAX_PRIVATE_BYTES, "anonymous memory": 1}),
            "i1: holds 60.0 MB of its own, more than 60.0 MB: part of the weights may be copied "
            "(60.0 MB in /memfd:x, 0.0 MB in anonymous memory)",
        ),
        (mapping(pss_bytes=MAPPED_BYTES), "the weights are counted 1.50 times"),
    ],
)
def test_one_that_breaks_a_criterion_is_named(other: ProcessMemory | None, problem: str) -> None:
    verdict = judged(other)
    assert not verdict.holds
    assert problem in verdict.problems[0] or problem in verdict.problems[-1]


def test_bounds_are_themselves_within() -> None:
    assert judged(mapping(mapped_bytes=WEIGHTS_BYTES)).holds
    assert judged(replace(MEMORY, private_parts={"x": MAX_PRIVATE_BYTES})).holds
    # The kernel rounds each share; one of its pages an instance is left to that.
    assert judged(mapping(pss_bytes=MAPPED_BYTES // 2 + 2 * 4096)).holds
    assert not judged(mapping(pss_bytes=MAPPED_BYTES // 2 + 2 * 4096 + 1)).holds


def test_the_limit_of_private_memory_can_be_chosen() -> None:
    assert judged(MEMORY, max_private_bytes=40_000_000).holds
    assert len(judged(MEMORY, max_private_bytes=39_999_999).problems) == 2


def test_without_instances_nothing_is_proven() -> None:
    verdict = judge(NAME, WEIGHTS_BYTES, [])
    assert (verdict.holds, verdict.problems) == (False, ["no instance is ready"])
    assert not judge(NAME, WEIGHTS_BYTES, [("i0", None)]).holds
