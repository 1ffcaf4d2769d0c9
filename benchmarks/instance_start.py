"""How long until one more instance answers, and what it costs: cold, and beside running ones.

Starts a server with one instance (cold: the weights are loaded), then adds instances one at a time.
Times are the instances' own reports: CLOCK_MONOTONIC, from the moment somebody wanted the instance
to its readiness; a cold one includes a first forward pass. Memory is from /proc/PID/smaps. The
peer, in the same run and interleaved: a fresh process that loads the same weights with transformers
from safetensors, which is what a further instance costs without sharing.

    python benchmarks/instance_start.py [--model demo | --random-layers 40] [--instances 6]

With `--random-layers N` the model is a Llama of that many layers, 2,048 wide, with random weights
(100 MB a layer), to show what depends on the weights' size and what does not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _checkpoints import LlamaSize, random_llama, save_served_weights
from _machine import Machine, describe_machine, spread, steal_ticks
from _server import onecopy, running_server, server_status, wait_ready

from server.machine import process_memory

_PEER = """
import sys, time
started = time.monotonic()
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.inference_mode():
    model(torch.tensor([[0]]))
print((time.monotonic() - started) * 1000, flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--random-layers", type=int, help="use a random Llama of so many layers")
    parser.add_argument("--instances", type=int, default=6, help="instances at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        print(json.dumps(_measure(arguments, Path(folder)), indent=2))


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    machine: Machine = describe_machine()
    runtime_dir = folder / "run"
    checkpoint = folder / "checkpoint"
    model = arguments.model
    if arguments.random_layers:
        model = str(random_llama(folder / "random-llama", LlamaSize(arguments.random_layers)))
    steal = steal_ticks()
    with running_server(model, runtime_dir, num_instances=1) as ready_line_ms:
        status = server_status(runtime_dir)
        cold = status["instances"][0]
        if arguments.random_layers:
            checkpoint = Path(model)
        else:
            save_served_weights(status["path"], runtime_dir, checkpoint)
        peer_ms: list[float] = []
        peer_private: list[int] = []
        for count in range(2, arguments.instances + 1):
            peer_time, peer_bytes = _run_peer(checkpoint)
            peer_ms.append(peer_time)
            peer_private.append(peer_bytes)
            onecopy(runtime_dir, "scale", str(count))
            status = wait_ready(runtime_dir, count)
        further = status["instances"][1:]
        return {
            "benchmark": "instance_start",
            **machine,
            "steal_ticks": steal_ticks() - steal,
            "model": status["model"],
            "weights_bytes": status["weights_bytes"],
            "cold": {
                "process_start_to_ready_line_ms": round(ready_line_ms),
                "instance_ms": round(cold["ready_ms"]),
                "phases_ms": _rounded(cold["startup_ms"]),
                "private_bytes": cold["private_bytes"],
            },
            "further_instance": {
                "ready_ms": spread([one["ready_ms"] for one in further]),
                "phases_ms": {
                    phase: round(statistics.median(one["startup_ms"][phase] for one in further), 1)
                    for phase in further[0]["startup_ms"]
                },
                "private_bytes": spread([one["private_bytes"] for one in further]),
            },
            "peer_transformers_process": {
                "ready_ms": spread(peer_ms),
                "private_bytes": spread(peer_private),
            },
        }


def _run_peer(checkpoint: Path) -> tuple[float, int]:
    peer = subprocess.Popen(
        [sys.executable, "-P", "-c", _PEER, str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert peer.stdout is not None
    line = peer.stdout.readline()
    memory = process_memory.read(peer.pid)
    peer.communicate()
    assert memory is not None
    # Pages of the file are the page cache's, once for all who map it.
    in_file = memory.private_parts.get(str((checkpoint / "model.safetensors").resolve()), 0)
    return float(line), memory.private_bytes - in_file


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


if __name__ == "__main__":
    main()
