"""Host to device and back: `benchmarks/cuda_copies.py`, its ways and figures."""

import json
import subprocess
import sys
from pathlib import Path

from gpu.stage import GB, Stage, main

_PROGRAM = Path(__file__).parents[2] / "cuda_copies.py"


def run(stage: Stage) -> None:
    size = ("0.03", "1") if stage.small else (f"{stage.fitting(GB) / GB:.3f}", "3")
    stage.figure("gb", float(size[0]))
    with stage.part("copies"):
        ended = subprocess.run(
            [sys.executable, "-P", str(_PROGRAM), "--gb", size[0], "--rounds", size[1]],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        document = json.loads(ended.stdout)
        if "skipped" in document:
            raise RuntimeError(document["skipped"])
        for way, figures in document["gb_per_s"].items():
            stage.figure(f"{way}_gb_per_s", figures["median"])


if __name__ == "__main__":
    main(run)
