"""Each criterion of the proof on a GPU, broken by itself."""

from dataclasses import replace
from typing import Any

import pytest

from allocator import DeviceUsage
from server.console.verdict import verdict_lines
from server.machine.device_verify import DeviceVerdict, judge_device

GB = 1_000_000_000
WEIGHTS, POOL, CONTEXT, FOREIGN = 3 * GB, GB // 2, GB // 2, 2 * GB
DEVICE = "cuda:GPU-d0d0d0d0-d0d0-d0d0-d0d0-d0d0d0d0d0d0"
USAGE = DeviceUsage(
    name=DEVICE.removeprefix("cuda:"),
    model="Some GPU",
    driver="580.1",
    total_bytes=80 * GB,
    used_bytes=WEIGHTS + POOL + 2 * CONTEXT + FOREIGN,
    reserved_bytes=GB // 4,
    processes={11: CONTEXT, 12: CONTEXT, 99: FOREIGN},
    compute_mode="default",
    mig=False,
)


def judged(usage: DeviceUsage = USAGE, **changes: Any) -> DeviceVerdict:
    asked: dict[str, Any] = {
        "weights_bytes": WEIGHTS,
        "allocator_bytes": WEIGHTS + POOL,
        "instances": [("i0", 11), ("i1", 12)],
        "readers": {11, 12},
        "clients": {11, 12},
        "allocator_pid": 10,
        **changes,
    }
    return judge_device(DEVICE, usage, **asked)


def test_contexts_alone_hold_and_are_added_up() -> None:
    verdict = judged()
    assert (verdict.holds, verdict.problems) == (True, [])
    assert (verdict.clients_bytes, verdict.others_bytes) == (2 * CONTEXT, FOREIGN)
    assert [one.driver_bytes for one in verdict.instances] == [CONTEXT, CONTEXT]
    assert verdict.total_bytes == WEIGHTS + POOL + 2 * CONTEXT
    assert verdict.unshared_bytes - verdict.total_bytes == WEIGHTS


def test_a_driver_that_counts_imported_memory_as_each_process_s_changes_nothing() -> None:
    counted = replace(USAGE, processes={11: WEIGHTS + CONTEXT, 12: WEIGHTS + CONTEXT, 99: FOREIGN})
    assert judged(counted).holds


def test_a_driver_that_counts_what_the_allocator_owns_as_its_own_changes_nothing() -> None:
    counted = replace(USAGE, processes={**USAGE.processes, 10: WEIGHTS + POOL})
    assert judged(counted).holds
    assert not judged(counted, allocator_pid=None).holds


def test_a_driver_that_tells_of_no_process_leaves_others_to_the_clients() -> None:
    silent = replace(USAGE, processes={})
    assert not judged(silent).holds
    assert judged(replace(silent, used_bytes=USAGE.used_bytes - FOREIGN)).holds


@pytest.mark.parametrize(
    ("usage", "changes", "problem"),
    [
        (USAGE, {"instances": []}, "no instance is ready"),
        (USAGE, {"readers": {11}}, "i1: does not read the weights"),
        (replace(USAGE, used_bytes=USAGE.used_bytes + WEIGHTS), {}, "part of the weights may be"),
        (replace(USAGE, used_bytes=FOREIGN), {}, "but the allocator says that it owns 3.50 GB"),
        (USAGE, {"weights_bytes": GB}, "a copy of the weights (1.00 GB) would not show"),
        (USAGE, {"max_private_bytes": CONTEXT - 1}, "more than 500.0 MB each"),
    ],
)
def test_one_that_breaks_a_criterion_is_named(
    usage: DeviceUsage, changes: dict[str, Any], problem: str
) -> None:
    verdict = judged(usage, **changes)
    assert not verdict.holds
    assert any(problem in one for one in verdict.problems), verdict.problems


def test_a_person_reads_the_figures() -> None:
    lines = verdict_lines(judged())
    assert "3.00 GB of weights on cuda:GPU-d0d0" in lines
    assert "the allocator owns 3.50 GB and other programs have 2.00 GB" in lines
    assert lines.endswith("One copy: holds.")
    assert "DOES NOT HOLD.\n  - i1: does not read" in verdict_lines(judged(readers={11}))
