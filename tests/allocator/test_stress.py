"""A short run of the stress benchmark: random work, random kills, and everything adds up."""

import json
import subprocess
import sys

import pytest

from tests.daemon_process import ROOT

pytestmark = pytest.mark.slow


def test_nothing_is_lost_when_clients_and_daemons_are_killed() -> None:
    program = [sys.executable, "benchmarks/allocator_stress.py", "--operations", "4000"]
    ended = subprocess.run(
        [*program, "--clients", "4", "--daemon-kills", "6", "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    document = json.loads(ended.stdout)
    assert document["problems"] == []
    assert (document["leaks"], document["wrong_bytes"]) == (0, 0)
    assert document["conservation"] is True
    assert document["operations"] >= 4000
    assert document["refused"] < document["operations"] / 2
    assert document["daemon_kills"] == 6
    assert document["client_kills"] > 0
    # Sessions with all that they held went on from one daemon to the next.
    assert document["adopted"]["sessions"] > 6
    assert document["adopted"]["leases"] > 0
    assert document["adopted"]["weight_sets"] > 0
