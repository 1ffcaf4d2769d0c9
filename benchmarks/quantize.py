"""Quantizing to 4 bits beside copying: how fast, in how much memory, to the same bytes as torch?

A checkpoint of `--layers` linears of 201 MB each, bfloat16, on the disk of `--folder`. In turns, in
one run, medians: `cat` of it to the same disk; `cat` and fsync, which is what lasts; `onecopy
quantize --scheme w4a16`, with its own fsync and all of it read back, and of that the part until all
was written, which is what `cat` does; the same written with torch, a tensor at a time (fewer
rounds). The source is in the page cache for all of them.

memory   the most private memory above that of the imports, looked at every 2 ms, for one linear and
         for all; and whether it works in a control group smaller than the largest tensor.
at_102_gb   what the measured speed means for a checkpoint of that size.

    python benchmarks/quantize.py [--layers 10] [--rounds 5] [--folder .]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _control_group import memory_group
from _machine import describe_machine, spread, steal_ticks

from workers.config.safetensors_file import StoredTensor, read_tensors

_ROWS, _COLUMNS = 24576, 4096
_TENSOR_BYTES = _ROWS * _COLUMNS * 2
_GROUP_BYTES = 160 << 20
_LARGE_BYTES = 102e9
_CHUNK_BYTES = 8 << 20


def main() -> None:
    """Print one JSON document; exit 1 where torch has other bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    steal = steal_ticks()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-", dir=arguments.folder) as folder:
        one, many = Path(folder) / "one", Path(folder) / "many"
        _write_checkpoint(one, 1)
        num_bytes = _write_checkpoint(many, arguments.layers)
        speed = _speeds(Path(folder), many, arguments.rounds)
        same = _same(Path(folder))
        document: dict[str, Any] = {
            "benchmark": "quantize",
            **describe_machine(),
            "rounds": arguments.rounds,
            "source_bytes": num_bytes,
            "largest_tensor_bytes": _TENSOR_BYTES,
            "chunk_bytes": _CHUNK_BYTES,
            "speed": speed,
            "same_bytes_as_torch": same,
            "memory": _memory(Path(folder), one, many),
            "at_102_gb": _extrapolated(num_bytes, speed),
            "steal_ticks": steal_ticks() - steal,
        }
    print(json.dumps(document, indent=2))
    sys.exit(0 if same else 1)


def _write_checkpoint(folder: Path, layers: int) -> int:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for layer in range(layers):
        begin = layer * _TENSOR_BYTES
        header[f"model.layers.{layer}.mlp.up_proj.weight"] = {
            "dtype": "BF16",
            "shape": [_ROWS, _COLUMNS],
            "data_offsets": [begin, begin + _TENSOR_BYTES],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    normal = np.random.default_rng(0).standard_normal(16 << 20, dtype=np.float32) * 0.02
    block = (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = layers * _TENSOR_BYTES
        while left:
            left -= file.write(block[: min(len(block), left)])
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _speeds(folder: Path, model: Path, rounds: int) -> dict[str, Any]:
    file, copy = model / "model.safetensors", folder / "copy"
    ways = {
        "cat": f"cat {file} > {copy}",
        "cat_and_fsync": f"cat {file} > {copy} && sync {copy}",
    }
    names = (*ways, "onecopy", "onecopy_until_written", "pytorch")
    times: dict[str, list[float]] = {name: [] for name in names}
    told: dict[str, Any] = {}
    cpu: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, command in ways.items():
            began, before = time.perf_counter(), os.times()
            subprocess.run(command, shell=True, check=True)
            times[name].append(time.perf_counter() - began)
            after = os.times()
            cpu[name] = after.children_user - before.children_user
            cpu[name] += after.children_system - before.children_system
            copy.unlink()
        for name in ("onecopy", "pytorch"):
            if name == "pytorch" and number not in (0, 1, rounds):
                continue
            shutil.rmtree(folder / name, ignore_errors=True)
            told[name] = _program(model, folder / name, name)
            times[name].append(told[name]["seconds"])
        times["onecopy_until_written"].append(told["onecopy"]["rounded_seconds"])
        os.sync()  # what one has left is nobody else's to write
    size = file.stat().st_size
    found: dict[str, Any] = {
        name: {"seconds": spread(one[1:], 3), "mb_s": size / statistics.median(one[1:]) / 1e6}
        for name, one in times.items()
    }
    mine = found["onecopy"]["mb_s"]
    return {
        **found,
        "of_cat": mine / found["cat"]["mb_s"],
        "of_cat_until_written": found["onecopy_until_written"]["mb_s"] / found["cat"]["mb_s"],
        "of_cat_and_fsync": mine / found["cat_and_fsync"]["mb_s"],
        "times_pytorch": mine / found["pytorch"]["mb_s"],
        "onecopy_cpu_seconds": round(told["onecopy"]["cpu_seconds"], 2),
        "cat_cpu_seconds": round(cpu["cat"], 2),
        "rounding": told["onecopy"]["rounding"],
        "bits_per_weight": told["onecopy"]["bits_per_weight"],
        "pytorch_peak_bytes_over_base": told["pytorch"]["peak_bytes_over_base"],
    }


def _program(model: Path, destination: Path, how: str, enter: tuple[str, ...] = ()) -> Any:
    program = Path(__file__).with_name("_quantize_program.py")
    command = [*enter, sys.executable, "-P", str(program), str(model), str(destination)]
    run = subprocess.run(
        [*command, "w4a16", how],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(run.stdout)


def _same(folder: Path) -> bool:
    """Whether both wrote the same tensors, whatever the order in their files."""
    mine, theirs = (
        read_tensors(folder / name / "model.safetensors") for name in ("onecopy", "pytorch")
    )
    return mine.keys() == theirs.keys() and all(
        _bytes(mine[name]) == _bytes(theirs[name]) for name in mine
    )


def _bytes(stored: StoredTensor) -> bytes:
    with stored.file.open("rb") as file:
        file.seek(stored.begin)
        return file.read(stored.end - stored.begin)


def _memory(folder: Path, one: Path, many: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, model in (("one_linear", one), ("all_linears", many)):
        told = _program(model, folder / f"memory-{name}", "onecopy")
        shutil.rmtree(folder / f"memory-{name}")
        found[name] = {
            "source_bytes": told["source_bytes"],
            "peak_bytes_over_base": told["peak_bytes_over_base"],
            "base_bytes": told["base_bytes"],
            "chunks": told["peak_bytes_over_base"] / _CHUNK_BYTES,
        }
    try:
        with memory_group(_GROUP_BYTES) as group:
            told = _program(one, folder / "grouped", "onecopy", group.enter)
            found["control_group"] = {
                "limit_bytes": _GROUP_BYTES,
                "largest_tensor_bytes": _TENSOR_BYTES,
                "seconds": told["seconds"],
                "oom_kills": group.num_oom_kills,
            }
    except OSError as error:
        found["control_group"] = {"not_measured": f"no control group can be made: {error}"}
    return found


def _extrapolated(num_bytes: int, speed: dict[str, Any]) -> dict[str, Any]:
    rate, bits = speed["onecopy"]["mb_s"], speed["bits_per_weight"]
    seconds = _LARGE_BYTES / rate / 1e6
    return {
        "seconds": seconds,
        "arithmetic": (
            f"102 GB / {rate:,.0f} MB/s (median of {num_bytes / 1e9:.2f} GB) = {seconds:,.0f} s, "
            "if the disk gives the source as fast as the page cache does here; at 500 MB/s from "
            f"the disk {_LARGE_BYTES / 500e6:,.0f} s. Written: 102 GB * {bits:.3f} / 16 = "
            f"{102 * bits / 16:.1f} GB"
        ),
    }


if __name__ == "__main__":
    main()
