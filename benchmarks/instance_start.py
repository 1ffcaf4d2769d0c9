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
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _machine import Machine, describe_machine, spread, steal_ticks
from _server import onecopy, running_server, server_status, wait_ready

from server import process_memory

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
        model = str(_random_llama(folder / "random-llama", arguments.random_layers))
    steal = steal_ticks()
    with running_server(model, runtime_dir, num_instances=1) as ready_line_ms:
        status = server_status(runtime_dir)
        cold = status["instances"][0]
        if arguments.random_layers:
            checkpoint = Path(model)
        else:
            _save_for_peer(status["path"], runtime_dir, checkpoint)
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


def _random_llama(folder: Path, num_layers: int) -> Path:
    """A Llama in bfloat16 with the demo model's tokenizer. The tensors are written one by one."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from server.model_source import DEMO, find_model
    from server.tokenizer_files import tokenizer_folder

    shutil.copytree(tokenizer_folder(find_model(DEMO).path), folder)
    hidden, inner, vocab = 2048, 5632, 49152
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocab,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (512, hidden),
                "self_attn.v_proj": (512, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _save_for_peer(source: str, runtime_dir: Path, checkpoint: Path) -> None:
    """The very weights that are served, as a Hugging Face folder."""
    script = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from allocator import connect
from workers.checkpoint import attach, open_checkpoint
with connect(sys.argv[1]) as memory:
    weights = attach(memory, open_checkpoint(sys.argv[2]))
    folder = Path(sys.argv[3])
    folder.mkdir()
    (folder / "config.json").write_text(weights.metadata["config"])
    save_file(weights.tensors, folder / "model.safetensors", metadata={"format": "pt"})
"""
    subprocess.run(
        [sys.executable, "-P", "-c", script, str(runtime_dir), source, str(checkpoint)], check=True
    )


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
