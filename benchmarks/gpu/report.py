"""One run over all stages on a machine with a GPU: what holds, what does not, what did not run.

Owns the order, the limits and the document. Invariants: each stage is a process of its own that
ends, with all that it started, at its limit; what a stage told before it failed is kept; the
document on disk is whole after every line, so that whatever ends the run loses only what would have
come. Imports nothing but the standard library, so that it also runs where a package is missing, and
says so.
"""

import contextlib
import ctypes
import datetime
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
TOTAL_S: Final = 400.0
"""From the program's start, so that with the end of the last stage it is within seven minutes."""
_LEAST_S: Final = 5.0
_GRACE_S: Final = 10.0
_PR_SET_CHILD_SUBREAPER: Final = 36  # prctl(2)


@dataclass(frozen=True)
class StageSpec:
    """A stage as the run knows it."""

    name: str
    title: str
    limit_s: float
    arguments: tuple[str, ...] = ()
    simulated: bool = True
    """Whether a rehearsal runs it on the simulated driver; else on host memory."""
    package: str = "gpu.stages"

    @property
    def module(self) -> str:
        """The program."""
        return f"{self.package}.{self.name.partition(' ')[0]}"


STAGES: Final = (
    StageSpec("machine", "What the machine is", 75),
    StageSpec(
        "contract backend",
        "The tests that need a GPU: the backend, in one process",
        60,
        ("--tests", "test_cuda_backend.py"),
    ),
    StageSpec("sharing", "One copy for several processes", 60),
    StageSpec(
        "served random",
        "A served model of 1.2 billion random parameters",
        130,
        ("--model", "random"),
        False,
    ),
    StageSpec("kills", "SIGKILL of a reader, a writer, the daemon", 45),
    StageSpec("attach", "Attaching to weights", 40),
    StageSpec(
        "contract processes",
        "The tests that need a GPU: several processes, models",
        110,
        ("--tests", "test_cuda_sharing.py", "test_cuda_serving.py"),
    ),
    StageSpec("tiers", "Sleep and wake", 40),
    StageSpec("copies", "Copies between host and device", 30),
    StageSpec("served demo", "SmolLM2-135M, served", 75, ("--model", "demo"), False),
)
"""What is most telling comes first, since whatever takes too long takes it from those behind."""

Why = Mapping[str, str]
"""Stage → why it can't run here."""


class Document:
    """What was found, on disk at all times."""

    def __init__(self, path: Path | None, head: Mapping[str, Any]):
        self._path = path
        self.content: dict[str, Any] = {**head, "stages": []}

    def begin(self, spec: StageSpec) -> dict[str, Any]:
        """A stage's part."""
        stage: dict[str, Any] = {
            "name": spec.name,
            "title": spec.title,
            "status": "running",
            "claims": [],
            "figures": {},
            "parts": [],
        }
        self.content["stages"].append(stage)
        self.save()
        return stage

    def save(self) -> None:
        """Whole, or as it was before."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=2) + "\n")
        new.replace(self._path)


def run_stages(
    stages: Iterable[StageSpec],
    document: Document,
    environments: Mapping[bool, Mapping[str, str]],
    options: Sequence[str],
    why_not: Why,
    total_s: float = TOTAL_S,
    started: float | None = None,
) -> None:
    """All of them, one after the other, for `total_s` from `started` on (a time of the monotonic
    clock; now). `environments`: of a stage's process, by `simulated`. In a rehearsal, which tells
    nothing of time, stages may take as long as they want."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    deadline = (time.monotonic() if started is None else started) + total_s
    for spec in stages:
        stage = document.begin(spec)
        left_s = deadline - time.monotonic()
        if why := why_not.get(spec.name):
            stage["status"], stage["why"] = "not run", why
        elif left_s < _LEAST_S:
            stage["status"], stage["why"] = "not run", f"the {total_s:.0f} s were spent"
        else:
            device = "cuda:0" if spec.simulated or "--small" not in options else "host"
            command = [sys.executable, "-P", "-m", spec.module, "--device", device]
            _run(
                [*command, *spec.arguments, *options],
                environments[spec.simulated],
                stage,
                document,
                left_s if "--small" in options else min(spec.limit_s, left_s),
            )
        _say(stage)
        document.save()


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    stage: dict[str, Any],
    document: Document,
    limit_s: float,
) -> None:
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=dict(environment), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    timed_out = not _listen(process, stage, document, started + limit_s)
    if timed_out:
        _end_descendants(process)
    status = process.wait()
    _end_descendants()
    stage["seconds"] = round(time.monotonic() - started, 1)
    failed = [one["part"] for one in stage["parts"] if "failed" in one]
    if timed_out:
        stage["status"], stage["why"] = "timed out", f"no end within {limit_s:.0f} s"
    elif status:
        stage["status"], stage["why"] = "failed", f"its process ended with status {status}"
    elif failed:
        stage["status"], stage["why"] = "failed", f"failed: {', '.join(failed)}"
    else:
        broken = [one["claim"] for one in stage["claims"] if not one["holds"]]
        stage["status"] = "does not hold" if broken else "holds"


def _listen(
    process: "subprocess.Popen[bytes]", stage: dict[str, Any], document: Document, deadline: float
) -> bool:
    """Take what the stage tells until it ends; False where the deadline passed first."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            if not selector.select(left_s):
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                return True
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _take(json.loads(line), stage)
            document.save()
    return False


def _take(told: dict[str, Any], stage: dict[str, Any]) -> None:
    if "claim" in told:
        stage["claims"].append(told)
        mark = "holds" if told["holds"] else "DOES NOT HOLD"
        print(f"    {mark}: {told['claim']} {told['figures'] or ''}", flush=True)
    elif "figure" in told:
        stage["figures"][told["figure"]] = told["value"]
        print(f"    {told['figure']}: {json.dumps(told['value'])[:300]}", flush=True)
    else:
        stage["parts"].append(told)
        if "failed" in told or "not_run" in told:
            print(f"    {told['part']}: {told.get('failed') or told.get('not_run')}", flush=True)


def _say(stage: Mapping[str, Any]) -> None:
    why = f": {stage['why']}" if "why" in stage else ""
    print(f"{stage['name']}: {stage['status']}{why}", flush=True)


def _end_descendants(stage: "subprocess.Popen[bytes] | None" = None) -> None:
    """What a stage left, and the stage itself where it still runs: asked first, so that a server
    gives back what it holds, and after a while made to. Sessions of their own hide nobody, since
    orphans become our children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + (_GRACE_S if number == signal.SIGTERM else _LEAST_S)
        asked: set[int] = set()
        while children := _children():
            for pid in children - asked:
                _signal(pid, number)
            asked |= children
            for pid in children:
                if stage is None or pid != stage.pid:
                    os.waitpid(pid, os.WNOHANG)
                else:
                    stage.poll()
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children() -> set[int]:
    """Ours, those included that have ended and were not waited for."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid():
            found.add(int(folder.name))
    return found


def head(commit: str) -> dict[str, Any]:
    """What a document begins with."""
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"report": "gpu", "date": today, "commit": commit}
