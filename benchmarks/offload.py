"""Weights that are read while others are computed with: what is hidden, what it takes.

    overlap     blocks of any module, from disk: how much of reading them is hidden behind computing
                them, of what could be (1 is all, by the critical path), and how long a pass takes
                over the longer of computing and reading
    memory      what the allocator has leased for slots, by its own records, for every depth
    blocks      the same blocks beside diffusers' group offloading
    serving     a model of three times the memory budget, served over REST within a control group
                of the budget and a tenth, that has all of the server's processes
    engines     the same model within the same limit, beside accelerate, AirLLM and llama.cpp

Each is a stage with a time limit; one that fails says why and the others go on. Random weights: a
Llama in the sizes of SmolLM2-1.7B. Control groups need root; where none can be made, what processes
hold is measured and nothing is limited. `--tiny` is for trying the program, not for figures.

    python benchmarks/peers/write_models.py /tmp/offload-models --llama 24,2048,8192,32,32
    python benchmarks/offload.py --models /tmp/offload-models --pictures docs/images \\
        --peer accelerate=PYTHON --peer airllm=PYTHON --peer llamacpp=PYTHON

PYTHON is the interpreter of an environment with accelerate, diffusers and transformers; with
airllm; with xllamacpp. Files go to `--folder`, which must be on the disk that is measured.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _allocator import running_allocator
from _checkpoints import LlamaSize, random_llama
from _machine import describe_machine, steal_ticks
from _processes import deadline, end_on_sigterm
from offloading.blocks import blocks_beside_peers
from offloading.engines import Place, Work, side_by_side
from offloading.overlap import Size, measure_overlap, memory_by_depth, timeline
from offloading.pictures import curves_picture, timeline_picture
from offloading.serving import measure_serving

_MODEL = LlamaSize(24, 2048, 8192, 32, 32)
_TINY_MODEL = LlamaSize(8, 1024, 2816, 16, 16)
_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
_BARS = ("0.5", "1", "2")
_STAGE_S = {"overlap": 600, "memory": 120, "blocks": 240, "serving": 420, "engines": 3000}


def main() -> None:
    """Print one JSON document; exit 1 where a stage failed. `holds` is told, and no more: who else
    runs here has a part in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", action="append", choices=list(_STAGE_S), default=[])
    parser.add_argument("--models", type=Path, help="what peers/write_models.py wrote")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--folder", type=Path, help="for files, on the disk that is measured")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write SVGs there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", default="16+8", metavar="IN+OUT")
    parser.add_argument("--budget", type=int, metavar="BYTES", help="default: a third of the model")
    parser.add_argument(
        "--processes", type=int, default=630 << 20, help="bytes of the budget that are not weights'"
    )
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-", dir=arguments.folder) as folder:
        document = _measured(_Run(arguments, Path(folder)))
    print(json.dumps(document, indent=2))
    sys.exit(bool(document["failed"]))


class _Run:
    """The stages, and what they have in common."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.rounds: int = arguments.rounds
        tiny = arguments.tiny
        self.size = Size(6, 2048, 2) if tiny else Size(8, 3072, 3)
        self.memory_size = Size(8, 512, 2) if tiny else Size(12, 2048, 2)
        self.pythons = {
            name: Path(python).absolute()
            for name, _, python in (one.partition("=") for one in arguments.peer)
        }

    def model(self) -> Path:
        """A folder that transformers reads."""
        if self.arguments.models:
            return Path(self.arguments.models) / "hf"
        folder = self.folder / "model"
        if not folder.exists():
            random_llama(folder, _TINY_MODEL if self.arguments.tiny else _MODEL)
        return folder

    def budget_bytes(self) -> int:
        """For all that a server takes."""
        weights = sum(file.stat().st_size for file in self.model().glob("*.safetensors"))
        return int(self.arguments.budget or weights // 3)

    def overlap(self) -> dict[str, Any]:
        """See the module."""
        depths = (1, 2, 3)
        ratios = measure_overlap(self.size, _RATIOS, depths, self.rounds, self.folder)
        if self.arguments.pictures:
            self._picture_overlap(ratios, depths)
        return {"blocks": self.size.num_blocks, "block_bytes": self.size.block_bytes} | {
            "passes": self.size.passes,
            "ratios": ratios,
        }

    def _picture_overlap(self, ratios: dict[str, Any], depths: tuple[int, ...]) -> None:
        curves = {
            f"{depth} read ahead": [
                (float(ratio), found["depths"][str(depth)]["overlap"]["median"])
                for ratio, found in ratios.items()
            ]
            for depth in depths
        }
        self._draw(
            "offload-overlap.svg",
            curves_picture(
                curves,
                "Share of what could be hidden that was hidden",
                "time to compute a block / time to read it",
                top=1.2,
                levels={"all": 1.0},
            ),
        )
        lines = timeline(self.size, ratios["1"]["outputs"], 2, self.folder)
        mib = self.size.block_bytes >> 20
        title = f"One pass over {self.size.num_blocks} blocks of {mib} MiB, 2 read ahead"
        self._draw("offload-timeline.svg", timeline_picture(lines, title))

    def memory(self) -> dict[str, Any]:
        """See the module."""
        depths = range(1, 9 if not self.arguments.tiny else 4)
        runtime_dir = self.folder / "memory-run"
        with running_allocator(runtime_dir):
            found = memory_by_depth(self.memory_size, depths, runtime_dir, self.folder)
        if self.arguments.pictures:
            mib = self.memory_size.block_bytes / (1 << 20)
            curves = {
                name: [(float(depth), one[key] / (1 << 20)) for depth, one in found.items()]
                for name, key in (("leased", "leased_bytes"), ("resident", "resident_bytes"))
            }
            everything = mib * self.memory_size.num_blocks
            self._draw(
                "offload-memory.svg",
                curves_picture(
                    curves,
                    f"MiB of memory for {self.memory_size.num_blocks} blocks of {mib:g} MiB",
                    "blocks read ahead",
                    top=everything * 1.1,
                    levels={"all blocks": everything},
                ),
            )
        return {"block_bytes": self.memory_size.block_bytes, "depths": found}

    def blocks(self) -> dict[str, Any]:
        """See the module."""
        return blocks_beside_peers(
            self.size, self.pythons.get("accelerate"), self.rounds, self.folder
        )

    def serving(self) -> dict[str, Any]:
        """See the module."""
        num_in, num_out = (int(one) for one in self.arguments.tokens.split("+"))
        return measure_serving(
            self.model(),
            self.folder / "serving-run",
            budget_bytes=self.budget_bytes(),
            processes_bytes=self.arguments.processes,
            tokens=(num_in, num_out),
            rounds=min(self.rounds, 3),
            options=self.arguments.serve,
        )

    def engines(self) -> dict[str, Any]:
        """See the module."""
        num_in, num_out = (int(one) for one in self.arguments.tokens.split("+"))
        budget = self.budget_bytes()
        place = Place(
            models=self.arguments.models or self.folder,
            model=self.model(),
            folder=self.folder,
            pythons=self.pythons,
            limit_bytes=budget + budget // 10,
            device_memory=budget - self.arguments.processes,
        )
        return side_by_side(
            place, Work(num_in, num_out, 400), min(self.rounds, 3), self.arguments.serve
        )

    def _draw(self, name: str, text: str) -> None:
        self.arguments.pictures.mkdir(parents=True, exist_ok=True)
        (self.arguments.pictures / name).write_text(text)


def _measured(run: _Run) -> dict[str, Any]:
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        name: getattr(run, name) for name in _STAGE_S
    }
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in run.arguments.stage or stages:
        print(f"stage {name}", file=sys.stderr, flush=True)
        steal, begun = steal_ticks(), time.monotonic()
        try:
            with deadline(_STAGE_S[name]):
                found[name] = stages[name]()
        except Exception as error:  # noqa: BLE001 - the other stages go on
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        found[name] |= {
            "steal_ticks": steal_ticks() - steal,
            "wall_s": round(time.monotonic() - begun, 1),
        }
    return {
        "benchmark": "offload",
        **describe_machine(),
        "tiny": run.arguments.tiny,
        "rounds": run.rounds,
        "serve_options": run.arguments.serve,
        **found,
        "holds": _holds(found),
        "failed": failed,
    }


def _holds(found: dict[str, Any]) -> dict[str, bool]:
    """Whether what was measured is as good as it has to be: medians."""
    holds: dict[str, bool] = {}
    if "overlap" in found:
        for ratio in _BARS:
            depths = found["overlap"]["ratios"][ratio]["depths"]
            depth = max(depths, key=lambda one: depths[one]["overlap"]["median"])
            what = f"at {ratio}, {depth} read ahead"
            best = depths[depth]
            holds[f"{what}: overlap of 0.9"] = best["overlap"]["median"] >= 0.9
            holds[f"{what}: 1.1 of the longer"] = best["over_longer"]["median"] <= 1.1
    if "memory" in found:
        holds["no more blocks than depth + 1"] = all(
            one["blocks"] <= one["limit_blocks"] for one in found["memory"]["depths"].values()
        )
    if "blocks" in found:
        for name, one in found["blocks"]["peers"].items():
            holds[f"blocks: faster than {name}"] = one["ours_over"]["median"] > 1
    if "serving" in found:
        holds["served within the limit"] = found["serving"]["within_limit"]
    if "engines" in found:
        engines = found["engines"]["engines"]
        for name, one in engines.items():
            if name == "onecopy":
                continue
            holds[f"faster than {name}"] = one["ours_over"]["median"] > 1
            ours, theirs = (which["most_charged_bytes"] for which in (engines["onecopy"], one))
            if ours is not None:
                holds[f"no more memory than {name}"] = ours <= theirs * 1.01
        if "disk_offload" in engines:
            faster = engines["disk_offload"]["ours_over"]["median"]
            holds["3 times as fast as disk_offload"] = faster >= 3
    return holds


if __name__ == "__main__":
    main()
