"""The report of a GPU, without one: stages rehearsed, ways to fail, the page made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_process import ROOT
from tests.quick import usual_or_long

sys.path.append(str(ROOT / "benchmarks"))

from gpu.document import PAGE, document, stored
from gpu.report import STAGES

pytestmark = pytest.mark.slow

PROGRAM = ROOT / "benchmarks" / "gpu_report.py"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
QUICK = ("machine", "contract backend", "sharing", "attach", "kills", "copies", "tiers")
REHEARSED = usual_or_long(QUICK, (*QUICK, "served random"))
PACKAGE = "tests.benchmarks.failing_stages"


def report(out: Path, *options: str, **variables: str) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), "--out", str(out), *options],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_without_a_gpu_each_stage_says_why_it_did_not_run(tmp_path: Path) -> None:
    content = report(tmp_path / "out.json", CUDA_VISIBLE_DEVICES="")
    assert [one["name"] for one in content["stages"]] == [one.name for one in STAGES]
    for stage in content["stages"]:
        assert stage["status"] == "not run"
        assert "driver" in stage["why"]


def test_it_runs_without_git_and_knows_the_commit_that_it_is_told(tmp_path: Path) -> None:
    variables = {
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": str(tmp_path),
        "ONECOPY_COMMIT": "0123456789ab",
    }
    assert report(tmp_path / "out.json", **variables)["commit"] == "0123456789ab"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("cuda")
    folder = tmp_path_factory.mktemp("rehearsal")
    return report(folder / "out.json", "--rehearse", "--stages", *REHEARSED)


@pytest.mark.parametrize("name", REHEARSED)
def test_a_rehearsed_stage_holds(rehearsal: dict[str, Any], name: str) -> None:
    (stage,) = (one for one in rehearsal["stages"] if one["name"] == name)
    assert stage["status"] == "holds", stage
    assert stage["claims"] or stage["figures"]


def test_a_rehearsal_is_never_stored(rehearsal: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rehearsal.json"
    path.write_text(json.dumps(rehearsal))
    before = PAGE.read_text()
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), "--store", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, PAGE.read_text()) == (1, before)
    assert "says nothing of a GPU" in ended.stderr


RUN = """
import json, os, sys
from pathlib import Path
from gpu.report import Document, StageSpec, run_stages
path, total_s, *specs = json.loads(sys.argv[1])
stages = [StageSpec(name, name, limit_s, tuple(more), package=PACKAGE)
          for name, limit_s, more in specs]
document, same = Document(Path(path), {"report": "gpu"}), {True: os.environ, False: os.environ}
run_stages(stages, document, same, [], {"told": "no GPU"}, total_s)
"""

Spec = tuple[str, float, tuple[str, ...]]


def run_failing(tmp_path: Path, *specs: Spec, total_s: float = 300) -> list[dict[str, Any]]:
    """What is on disk once these have run, in a process of their own: it ends all its orphans."""
    path = tmp_path / "out.json"
    places = [str(ROOT / "benchmarks"), str(ROOT)]
    subprocess.run(
        [
            *(sys.executable, "-c", RUN.replace("PACKAGE", repr(PACKAGE))),
            json.dumps([str(path), total_s, *specs]),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    stages: list[dict[str, Any]] = json.loads(path.read_text())["stages"]
    return stages


def failing(name: str, limit_s: float = 300, *arguments: str) -> Spec:
    return name, limit_s, arguments


def test_a_part_that_fails_fails_alone_and_the_next_stage_runs(tmp_path: Path) -> None:
    first, second = run_failing(tmp_path, failing("raises"), failing("raises again"))
    assert first["status"] == second["status"] == "failed"
    assert first["why"] == "failed: first"
    assert first["claims"][0]["claim"] == "told before the fault"
    assert first["figures"] == {"answer_ms": 42}
    assert [part.get("failed") or part.get("not_run") for part in first["parts"]] == [
        "ValueError: what went wrong",
        "nothing to run it on",
        None,
    ]


def test_what_a_stage_told_before_it_died_is_kept(tmp_path: Path) -> None:
    (stage,) = run_failing(tmp_path, failing("dies"))
    assert (stage["status"], stage["why"]) == ("failed", "its process ended with status -9")
    assert [one["claim"] for one in stage["claims"]] == ["told before the end"]


def test_a_stage_that_hangs_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    (stage,) = run_failing(tmp_path, failing("hangs", 4, str(started)))
    assert (stage["status"], stage["why"]) == ("timed out", "no end within 4 s")
    assert not Path("/proc", started.read_text()).exists()


def test_stages_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    told, late = run_failing(tmp_path, failing("told"), failing("dies"), total_s=1)
    assert (told["status"], told["why"]) == ("not run", "no GPU")
    assert (late["status"], late["why"]) == ("not run", "the 1 s were spent")


def test_the_page_tells_what_was_found(rehearsal: dict[str, Any], tmp_path: Path) -> None:
    failed = run_failing(tmp_path, failing("raises"), failing("told"), failing("dies"))
    page = document([{**rehearsal, "stages": rehearsal["stages"] + failed}])
    assert "## Simulated device 0" in page
    assert "| One copy for several processes | holds, " in page
    assert "- holds: the first client takes one copy (bytes 33,554,432, taken " in page
    assert "- **failed**: first: ValueError: what went wrong" in page
    assert "| told | not run: no GPU |" in page
    assert "| answer ms | 42 |" in page


def test_the_page_in_the_docs_is_made_of_what_is_stored() -> None:
    assert PAGE.read_text() == document(stored(RESULTS))
