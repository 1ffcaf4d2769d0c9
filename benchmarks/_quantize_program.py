"""Quantizes in a process of its own: SRC DST SCHEME and how: `onecopy`, or `pytorch`, which is what
one would write with torch, a tensor at a time, to the same bytes. Prints a JSON document."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def own_bytes() -> int:
    """Anonymous memory: what cannot be given up."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


class PeakMemory:
    """The most that was in use, looked at every 2 ms."""

    def __init__(self) -> None:
        self.base = self.peak = own_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, own_bytes())

    def end(self) -> None:
        """Stops looking."""
        self._ended.set()
        self._thread.join()


def by_onecopy(source: Path, destination: Path, scheme: str) -> dict[str, Any]:
    from workers.quantize.quantize import quantize
    from workers.quantize.request import Request

    memory = PeakMemory()
    began, before = time.perf_counter(), time.process_time()
    made = quantize(Request(source, destination, scheme), lambda _progress: None)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - before
    memory.end()
    return {
        "seconds": seconds,
        "rounded_seconds": made.rounded_seconds,
        "cpu_seconds": cpu_seconds,
        "base_bytes": memory.base,
        "peak_bytes_over_base": memory.peak - memory.base,
        "rounding": made.rounding,
        "bits_per_weight": made.bits_per_weight,
        "source_bytes": made.source_bytes,
        "output_bytes": made.output_bytes,
    }


def by_pytorch(source: Path, destination: Path) -> dict[str, Any]:
    """W4A16 in groups of 128: whole tensors, and all results until the file is written."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory = PeakMemory()
    began = time.perf_counter()
    results: dict[str, Any] = {}
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            weight = file.get_tensor(name)
            if weight.dim() < 2:
                results[name] = weight
                continue
            module = name.removesuffix(".weight")
            groups = weight.float().view(len(weight), -1, 128)
            scales = (groups.abs().amax(-1) / 7.5).to(weight.dtype)
            levels = (groups / scales.float()[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
            words = (levels.view(len(weight), -1, 8) << shifts).sum(-1, dtype=torch.int32)
            results[f"{module}.weight_packed"] = words
            results[f"{module}.weight_scale"] = scales
            results[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    destination.mkdir()
    save_file(results, destination / "model.safetensors", metadata={"format": "pt"})
    descriptor = os.open(destination / "model.safetensors", os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - began
    memory.end()
    return {
        "seconds": seconds,
        "base_bytes": memory.base,
        "peak_bytes_over_base": memory.peak - memory.base,
    }


def main() -> None:
    source, destination, scheme, how = sys.argv[1:]
    if how == "onecopy":
        found = by_onecopy(Path(source), Path(destination), scheme)
    else:
        found = by_pytorch(Path(source), Path(destination))
    print(json.dumps(found))


main()
