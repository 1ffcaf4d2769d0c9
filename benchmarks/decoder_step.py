"""What a step of the native decoder costs, beside transformers and the memory's speed.

decode   ms a step for some rows, each the next token of its own sequence, at a context. `share` is
         how much of the step the weights and keys and values would take at the bandwidth that as
         many threads read with in the same run: 1.0 is the limit.
prefill  ms for a prompt's rows in one call, of which the last one's logits are wanted.
theirs   the same with transformers on the same weights: sdpa, its own cache, no padding.

The demo model (SmolLM2-135M) in bf16, its weights in shared memory as instances have them. Rounds
take every measurement in turn; medians. Where others use the machine, `chrt -f 20` before it keeps
them out.

  python benchmarks/decoder_step.py [--threads 2] [--rounds 7] [--contexts 256 4096] [--no-theirs]
"""

import argparse
import ctypes
import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from _machine import describe_machine, spread, steal_ticks
from transformers import DynamicCache

from server.models.source import find_model
from workers.checkpoint import open_checkpoint
from workers.kv.layout import KVLayout
from workers.model.decoder import build_model
from workers.model.native.decoder import NativeDecoder, supports
from workers.placement.resident import Resident

_DECODE_ROWS = (1, 2, 4, 8, 16)
_PREFILL_ROWS = (32, 128, 512)
_MAX_ROWS = 512
_STEPS = 8  # one after the other, as in decoding


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contexts", type=int, nargs="*", default=[256, 4096])
    parser.add_argument("--no-theirs", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steal = steal_ticks()
    model = _model()
    module: Any = model.module
    reason = supports(module, torch.bfloat16)
    if reason is not None:
        raise SystemExit(f"no native decoder here: {reason}")
    ours = _Ours(module, model.geometry.kv_layout, max(arguments.contexts), arguments.threads)
    reader = _Reader(arguments.threads)
    measured: dict[str, Callable[[], Any]] = {"read": reader.read}
    for context in arguments.contexts:
        for rows in _DECODE_ROWS:
            measured[f"decode {rows} at {context}"] = ours.decode(rows, context)
    for rows in _PREFILL_ROWS:
        measured[f"prefill {rows}"] = ours.prefill(rows)
    if not arguments.no_theirs:
        theirs = _Theirs(module)
        for rows in (1, 8):
            measured[f"theirs decode {rows} at 256"] = theirs.decode(rows, 256)
        for rows in (128, 512):
            measured[f"theirs prefill {rows}"] = theirs.prefill(rows)
    times_ms: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(arguments.rounds):
        for name, function in measured.items():
            function()  # whoever came before, his threads may still be spinning
            num_steps = _STEPS if "decode" in name else 1
            started = time.perf_counter()
            for _ in range(num_steps):
                function()
            times_ms[name].append((time.perf_counter() - started) * 1e3 / num_steps)
    spreads = {name: spread(values) for name, values in times_ms.items()}
    bytes_per_ms = reader.num_bytes / spreads["read"]["median"]
    weights = model.geometry.weights_bytes
    results: dict[str, Any] = {}
    for name, values in spreads.items():
        results[name] = {"ms": values}
        if name.startswith("decode"):
            _, num_rows, _, context_length = name.split()
            kv = int(num_rows) * int(context_length) * model.geometry.kv_layout.bytes_per_token
            results[name]["tokens_per_s"] = round(int(num_rows) * 1e3 / values["median"], 1)
            results[name]["weights_gb_per_s"] = round(weights / values["median"] / 1e6, 1)
            results[name]["share"] = round((weights + kv) / bytes_per_ms / values["median"], 2)
        elif name.startswith("prefill"):
            results[name]["tokens_per_s"] = round(int(name.split()[1]) * 1e3 / values["median"])
    document = {
        "benchmark": "decoder_step",
        **describe_machine(),
        "threads": arguments.threads,
        "real_time_priority": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "rounds": arguments.rounds,
        "weights_bytes": weights,
        "workspace_bytes": ours.decoder.workspace_bytes,
        "kernels": ours.decoder.kernels.name,
        "read_gb_per_s": round(bytes_per_ms / 1e6, 1),
        "results": results,
        "steal_ticks": steal_ticks() - steal,
    }
    print(json.dumps(document, indent=2))


def _model() -> Any:
    """The demo with its weights in anonymous shared memory."""
    checkpoint = open_checkpoint(find_model("demo").path, "bfloat16")
    tensors = checkpoint.tensors()
    starts = np.cumsum([0, *((tensor.num_bytes + 255) // 256 * 256 for tensor in tensors)])
    memory = torch.frombuffer(mmap.mmap(-1, int(starts[-1])), dtype=torch.uint8)
    placed = {}
    for tensor, start in zip(tensors, starts, strict=False):
        out = memory[start : start + tensor.num_bytes].view(tensor.dtype).view(tensor.shape)
        checkpoint.copy_into(tensor.name, out, lambda _: None)
        placed[tensor.name] = out
    config = json.loads(checkpoint.metadata()["config"])
    return build_model(config, Resident(placed), torch.bfloat16)


class _Ours:
    """The native decoder, with tables of blocks that hold the same tokens for all its rows."""

    def __init__(self, module: Any, layout: KVLayout, context: int, num_threads: int) -> None:
        num_blocks = layout.num_blocks(max(context, _MAX_ROWS) + 1)
        num_bytes = num_blocks * max(_DECODE_ROWS) * layout.block_bytes
        self._memory = mmap.mmap(-1, num_bytes)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        blocks = base + np.arange(num_blocks * max(_DECODE_ROWS)) * layout.block_bytes
        self._tables = np.ascontiguousarray(blocks.reshape(max(_DECODE_ROWS), num_blocks))
        self.decoder = NativeDecoder(module, layout, _MAX_ROWS, context + 1, num_threads)
        self._logits = torch.empty(max(_DECODE_ROWS), self.decoder.vocab_size)
        for table in range(max(_DECODE_ROWS)):
            for start in range(0, context, _MAX_ROWS):
                self._prompt(table, start, min(_MAX_ROWS, context - start))

    def decode(self, num_rows: int, context: int) -> Callable[[], None]:
        token_ids = np.arange(100, 100 + num_rows, dtype=np.int32)
        positions = np.full(num_rows, context, np.int32)
        rows = np.arange(num_rows, dtype=np.int32)

        def step() -> None:
            logits = self._logits[:num_rows]
            self.decoder.forward(token_ids, positions, rows, self._tables, rows, logits)

        return step

    def prefill(self, num_rows: int) -> Callable[[], None]:
        return lambda: self._prompt(0, 0, num_rows)

    def _prompt(self, table: int, start: int, num_rows: int) -> None:
        token_ids = np.arange(100, 100 + num_rows, dtype=np.int32)
        positions = np.arange(start, start + num_rows, dtype=np.int32)
        tables = np.full(num_rows, table, np.int32)
        last = np.array([num_rows - 1], np.int32)
        self.decoder.forward(token_ids, positions, tables, self._tables, last, self._logits[:1])


class _Theirs:
    """transformers' forward with its own dynamic cache and sdpa."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def decode(self, num_rows: int, context: int) -> Callable[[], None]:
        cache = DynamicCache()
        self._forward(torch.arange(100, 100 + context).repeat(num_rows, 1), cache)
        token_ids = torch.arange(100, 100 + num_rows)[:, None]

        def step() -> None:
            self._forward(token_ids, cache)
            cache.crop(-1)

        return step

    def prefill(self, num_rows: int) -> Callable[[], None]:
        return lambda: self._forward(torch.arange(100, 100 + num_rows)[None], DynamicCache())

    def _forward(self, token_ids: torch.Tensor, cache: DynamicCache) -> None:
        before = self._module.config._attn_implementation
        self._module.set_attn_implementation("sdpa")
        with torch.inference_mode():
            self._module(token_ids, past_key_values=cache, logits_to_keep=1)
        self._module.set_attn_implementation(before)


class _Reader:
    """Reads shared memory that no cache holds, each thread its part."""

    def __init__(self, num_threads: int) -> None:
        self.num_bytes = 256 << 20
        memory = np.frombuffer(mmap.mmap(-1, self.num_bytes), dtype=np.int64)
        memory[:] = 1
        self._parts = np.array_split(memory, num_threads)
        self._threads = ThreadPoolExecutor(num_threads)

    def read(self) -> None:
        list(self._threads.map(np.max, self._parts))


if __name__ == "__main__":
    main()
