"""Instances that compute take equal parts of the cores, and nobody counts who is gone."""

import os
import subprocess
import sys
from pathlib import Path

from tests.daemon_process import ROOT
from workers.process.cores import SharedCores

_HOLD = """
import sys
from pathlib import Path
from workers.process.cores import SharedCores
cores = SharedCores(Path(sys.argv[1]), 7)
cores.begin()
print("computes", flush=True)
sys.stdin.read()
"""


def test_those_that_compute_share_equally(tmp_path: Path) -> None:
    instances = [SharedCores(tmp_path / "cores", number, num_cores=6) for number in range(4)]
    first, second, third, fourth = instances
    assert first.fair_part() == 6
    first.begin()
    first.begin()
    assert first.fair_part() == 6
    assert second.fair_part() == 3  # as if it began now
    second.begin()
    third.begin()
    assert [one.fair_part() for one in instances] == [2, 2, 2, 1]
    second.end()
    second.end()
    assert first.fair_part() == 3
    third.close()
    assert first.fair_part() == 6
    fourth.begin()
    assert first.fair_part() == fourth.fair_part() == 3


def test_more_instances_than_cores_still_compute(tmp_path: Path) -> None:
    instances = [SharedCores(tmp_path / "cores", number, num_cores=2) for number in range(5)]
    for one in instances:
        one.begin()
    assert [one.fair_part() for one in instances] == [1] * 5


def test_a_killed_instance_is_not_counted(tmp_path: Path) -> None:
    own = SharedCores(tmp_path / "cores", 0, num_cores=2)
    own.begin()
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "cores")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"computes\n"
        assert own.fair_part() == 1
        other.kill()
        other.wait()
        assert own.fair_part() == 2
