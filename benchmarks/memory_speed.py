"""How fast bytes move: a checkpoint into a segment, and a weight set between tiers.

load   a safetensors checkpoint into a sealed segment, beside `cat FILE > /dev/shm/x`; the file is
       in the page cache for both. Also the private memory that the loading process gained.
wake   a weight set from host memory back to the device, beside memcpy of as many bytes: into memory
       that was written before (warm), and into memory that was not (fresh). Where the device is
       host memory nothing is copied, and the rate says how long a copy would have had. And from
       an image on disk, in the page cache, which is digested and then mapped instead of copied.
Each pair is measured in turns in one run; medians.

  python benchmarks/memory_speed.py [--gb 2] [--rounds 7]
"""

import argparse
import ctypes
import json
import mmap
import os
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _allocator import running_allocator
from _machine import describe_machine, spread, steal_ticks

from allocator import Client, connect
from workers.checkpoint import attach, open_checkpoint

_LAYER_BYTES = 64 << 20


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    steal = steal_ticks()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        model = Path(folder) / "model"
        num_bytes = _write_checkpoint(model, int(arguments.gb * 1e9))
        runtime_dir = Path(folder) / "run"
        images = ("--image-dir", str(Path(folder) / "images"))
        with running_allocator(runtime_dir, *images), connect(runtime_dir) as memory:
            document: dict[str, Any] = {
                "benchmark": "memory_speed",
                **describe_machine(),
                "gb": num_bytes / 1e9,
                "rounds": arguments.rounds,
                "load": _loads(memory, model, arguments.rounds),
                "wake": _wakes(memory, model, arguments.rounds),
            }
    print(json.dumps({**document, "steal_ticks": steal_ticks() - steal}, indent=2))


def _loads(memory: Client, model: Path, rounds: int) -> dict[str, Any]:
    file = model / "model.safetensors"
    times: dict[str, list[float]] = {"onecopy": [], "cat": []}
    gained: list[float] = []
    for _ in range(rounds + 1):
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="onecopy-bench-cat-") as copy:
            started = time.perf_counter()
            subprocess.run(f"cat {file} > {copy.name}", shell=True, check=True)
            times["cat"].append(time.perf_counter() - started)
        checkpoint = open_checkpoint(model)
        with _PrivateMemory() as private:
            started = time.perf_counter()
            weights = attach(memory, checkpoint)
            times["onecopy"].append(time.perf_counter() - started)
        assert weights.loaded
        gained.append(private.gained_bytes / 1e6)
        key = weights.reader.key
        reader = weights.reader
        del weights
        reader.release()
        memory.evict(key)
    num_bytes = file.stat().st_size
    rates = {name: spread([num_bytes / 1e9 / s for s in some[1:]]) for name, some in times.items()}
    return {
        "gb_per_s": rates,
        "share_of_cat": round(rates["onecopy"]["median"] / rates["cat"]["median"], 3),
        "peak_private_mb_over_base": spread(gained),
    }


def _wakes(memory: Client, model: Path, rounds: int) -> dict[str, Any]:
    weights = attach(memory, open_checkpoint(model))
    key, num_bytes = weights.reader.key, weights.num_bytes
    reader = weights.reader
    del weights
    reader.release()
    times: dict[str, list[float]] = {
        name: [] for name in ("wake_host", "memcpy_warm", "memcpy_fresh", "wake_disk")
    }
    warm = _anonymous(num_bytes)
    source = _anonymous(num_bytes)
    for one in (warm, source):
        ctypes.memset(_address(one), 1, num_bytes)
    for _ in range(rounds + 1):
        memory.sleep(key, level=1)
        times["wake_host"].append(_timed(lambda: memory.wake(key)))
        times["memcpy_warm"].append(_timed(lambda: _memcpy(warm, source, num_bytes)))
        fresh = _anonymous(num_bytes)
        times["memcpy_fresh"].append(_timed(lambda fresh=fresh: _memcpy(fresh, source, num_bytes)))
        fresh.close()
    assert not _damaged(memory, key)
    for _ in range(rounds + 1):
        memory.sleep(key, level=2)
        times["wake_disk"].append(_timed(lambda: memory.wake(key)))
    assert not _damaged(memory, key)
    memory.evict(key, image=True)
    rates = {name: spread([num_bytes / 1e9 / s for s in some[1:]]) for name, some in times.items()}
    wake = rates["wake_host"]["median"]
    return {
        "gb_per_s": rates,
        "wake_host_ms": spread([1000 * s for s in times["wake_host"][1:]]),
        "wake_disk_ms": spread([1000 * s for s in times["wake_disk"][1:]]),
        "share_of_memcpy_warm": round(wake / rates["memcpy_warm"]["median"], 3),
        "share_of_memcpy_fresh": round(wake / rates["memcpy_fresh"]["median"], 3),
    }


def _damaged(memory: Client, key: str) -> list[str]:
    statistics = memory.statistics()
    assert any(one.key == key and one.tier == "device" for one in statistics.weight_sets)
    return memory.damaged(key)


class _PrivateMemory:
    """The most anonymous memory that this process had more than at first (proc(5), RssAnon)."""

    def __enter__(self) -> "_PrivateMemory":
        self._base = self._most = _anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._most = max(self._most, _anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def gained_bytes(self) -> int:
        return self._most - self._base


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell RssAnon")


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _anonymous(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, mmap.MAP_SHARED)


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def _memcpy(target: mmap.mmap, source: mmap.mmap, num_bytes: int) -> None:
    ctypes.memmove(_address(target), _address(source), num_bytes)


def _write_checkpoint(folder: Path, num_bytes: int) -> int:
    """Layers of 64 MB of bfloat16, all bytes different from page to page; then read once."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    num_layers = max(1, num_bytes // _LAYER_BYTES)
    header = {
        f"model.layers.{i}.weight": {
            "dtype": "BF16",
            "shape": [_LAYER_BYTES // 2 // 4096, 4096],
            "data_offsets": [i * _LAYER_BYTES, (i + 1) * _LAYER_BYTES],
        }
        for i in range(num_layers)
    }
    text = json.dumps(header).encode()
    block = os.urandom(_LAYER_BYTES)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(num_layers):
            file.write(block)
    subprocess.run(["cat", folder / "model.safetensors"], stdout=subprocess.DEVNULL, check=True)
    return num_layers * _LAYER_BYTES


if __name__ == "__main__":
    main()
