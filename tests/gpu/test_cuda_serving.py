"""Models whose weights are shared on a GPU: the same tokens as transformers, from one copy."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
import torch

from tests.daemon_process import ROOT, DaemonProcess
from tests.gpu.conftest import DEVICE
from tests.workers.engine.test_engine import PROMPTS, request, run, tokens
from tests.workers.tiny_models import (
    config_of,
    generate,
    reference_model,
    tensors_of,
    write_checkpoint,
    write_tokenizer,
)
from workers.checkpoint import attach, open_checkpoint
from workers.engine.generate import GenerationEngine
from workers.model.decoder import build_model
from workers.placement.resident import Resident

_READY = re.compile(r"is ready: .* on (\S+)$")


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(
    family: str, daemon: DaemonProcess, tmp_path: Path
) -> None:
    """Both compute in fp32 on the CPU and on the GPU: the tiny models leave no doubt about the best
    token, so the reference may be the CPU's."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / family, family))
    with daemon.connect() as memory:
        weights = attach(memory, checkpoint)
        assert all(tensor.is_cuda for tensor in weights.tensors.values())
        model = build_model(config_of(family), Resident(weights.tensors), torch.float32)
        engine = GenerationEngine(model, 128)
        outputs = run(engine, *(request(str(i), one) for i, one in enumerate(PROMPTS)))
        reference = reference_model(family, torch.float32)
        for i, one in enumerate(PROMPTS):
            expected = generate(reference, one, len(tokens(outputs[str(i)])))
            assert tokens(outputs[str(i)]) == expected


def test_weights_are_converted_on_their_way(daemon: DaemonProcess, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "llama", "llama", torch.float32)
    with daemon.connect() as memory:
        weights = attach(memory, open_checkpoint(folder, "bfloat16"))
        for name, expected in tensors_of(reference_model("llama")).items():
            assert torch.equal(weights.tensors[name].cpu(), expected.to(torch.bfloat16)), name


def test_two_instances_serve_one_copy(tmp_path: Path) -> None:
    checkpoint = write_tokenizer(write_checkpoint(tmp_path / "llama", "llama"))
    with tempfile.TemporaryDirectory(prefix="onecopy-g-") as runtime_dir:
        own = ["--runtime-dir", runtime_dir]
        command = [sys.executable, "-m", "server.cli"]
        process = subprocess.Popen(
            [*command, "serve", str(checkpoint), "--port", "0", "--device", DEVICE, *own],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert process.stdout is not None
        try:
            ready = next(filter(None, map(_READY.search, process.stdout)), None)
            assert ready is not None, "it did not become ready; why is on stderr"
            body = {"model": checkpoint.name, "prompt": "to and fro", "temperature": 0}
            answers = {
                httpx.post(f"{ready[1]}/v1/completions", json=body, timeout=600).text
                for _ in range(4)
            }
            texts = {json.loads(answer)["choices"][0]["text"] for answer in answers}
            assert len(texts) == 1
            shown = subprocess.run(
                [*command, "ps", "--memory", "--json", *own],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            (device,) = json.loads(shown.stdout)["devices"]
            (weights,) = device["weight_sets"]
            assert device["device"].startswith("cuda:GPU-")
            assert len(set(weights["reader_pids"])) == 2
        finally:
            process.terminate()
            assert process.wait(60) == 0
            process.stdout.close()
