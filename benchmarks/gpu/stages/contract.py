"""The tests that need a GPU: the contract of every backend, tensors over what is mapped, processes
that share it, models that are served from it. One claim a test, told as soon as it has ended.
"""

import argparse
import os
from pathlib import Path

import pytest
from gpu.stage import Stage, main

ROOT = Path(__file__).parents[3]
_FOLDER = ROOT / "tests" / "gpu"
_SIMULATED = ROOT / "tests" / "allocator" / "backends" / "simulated_driver" / "contract.py"
_LIMIT_S = 45
"""Of one test: those behind it are to be heard, too."""
_MOST_SAID = 600


class Teller:
    """A plugin of pytest that tells the stage how each test ended."""

    def __init__(self, stage: Stage):
        self._stage = stage

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._stage.claim(f"{report.nodeid} can be collected", False, said=_said(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        seconds = round(report.duration, 2)
        if report.skipped:
            self._stage.figure(f"skipped {name}", _said(report))
        elif report.failed:
            when = "" if report.when == "call" else f" ({report.when})"
            self._stage.claim(f"{name}{when}", False, seconds=seconds, said=_said(report))
        elif report.when == "call":
            self._stage.claim(name, True, seconds=seconds)


def run(stage: Stage) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tests", nargs="+", default=[])
    files = [str(_FOLDER / one) for one in parser.parse_known_args()[0].tests]
    if stage.small and files == [str(_FOLDER / "test_cuda_backend.py")]:
        files = [str(_SIMULATED)]  # the same contract; the others say that they were skipped
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), f"--timeout={_LIMIT_S}"]
    status = pytest.main([*options, *files], plugins=[Teller(stage)])
    stage.figure("pytest_exit_status", int(status))


def _said(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The line that says what went wrong, or why it was skipped."""
    if isinstance(report.longrepr, tuple):  # where, in which line, why
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longreprtext))[:_MOST_SAID]


if __name__ == "__main__":
    main(run)
