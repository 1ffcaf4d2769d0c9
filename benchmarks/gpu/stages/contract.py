"""The tests that need a GPU: the contract of every backend, tensors over what is mapped, processes
that share it, models that are served from it. One claim a test."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu.stage import Stage, main

ROOT = Path(__file__).parents[3]
_SIMULATED = "tests/allocator/simulated_driver/contract.py"


def run(stage: Stage) -> None:
    results = stage.folder / "results.xml"
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(f"--junitxml={results}", _SIMULATED if stage.small else "tests/gpu"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
    )
    stage.figure("pytest_exit_status", ended.returncode)
    for case in ElementTree.parse(results).iter("testcase"):
        name = case.get("name", "?")
        skipped, failure = case.find("skipped"), case.find("failure")
        failure = case.find("error") if failure is None else failure
        seconds = round(float(case.get("time", 0)), 2)
        if skipped is not None:
            stage.figure(f"skipped {name}", skipped.get("message", ""))
        elif failure is not None:
            said = failure.get("message", "")[:600]
            stage.claim(name, False, seconds=seconds, said=said)
        else:
            stage.claim(name, True, seconds=seconds)


if __name__ == "__main__":
    main(run)
