"""Real models, for as long as a small text: what they generate is transformers' own choice.

In fp32 every token; in bf16 every token up to a tie (`ties.py` says what one is). Given all tokens
before it, each is compared on its own, so that a tie hides nothing that comes after it.
"""

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator import RuntimeDir
from tests.daemon_process import DaemonProcess
from tests.quick import usual_or_long
from tests.references import load, transformers_reads, ulps_below_the_best
from tests.workers.tiny_models import generate
from workers.checkpoint import attach, open_checkpoint
from workers.conformance.greedy import generated, read_whole
from workers.conformance.ties import BF16_TIE_ULPS
from workers.model.decoder import Model, build_model
from workers.placement.resident import Resident

# "The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,"
SMOLLM2_PROMPTS = [
    [504, 3575, 282, 4649, 314],
    [1604, 3987, 46477, 24, 94, 727, 198],
    [6403, 1980, 253, 655, 28, 281, 253, 6560, 411, 260, 3426, 28],
]
GEMMA_PROMPTS = [
    [2, 818, 5279, 529, 7001, 563],
    [2, 2063, 10779, 78113, 236769, 236749, 1473, 107],
    [2, 14946, 3324, 496, 990, 236764, 528, 496, 9744, 684, 506, 5442, 236764],
]


def in_bf16(model: Any) -> Any:
    """As from_pretrained gives it: buffers keep the dtype that they were computed in."""
    cast = copy.deepcopy(model)
    for parameter in cast.parameters():
        parameter.data = parameter.data.bfloat16()
    return cast


def loaded(path: Path, dtype: str) -> Model:
    checkpoint = open_checkpoint(path, dtype)
    config = json.loads(checkpoint.metadata()["config"])
    return build_model(config, Resident(read_whole(checkpoint)), getattr(torch, dtype))


def assert_same_weights(model: Model, reference: Any) -> None:
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, theirs[name]), name


def assert_up_to_ties(model: Model, reference: Any, prompts: list[list[int]], num_new: int) -> None:
    """By transformers' modules, and by the native decoder where this machine has it."""
    longest = max(map(len, prompts)) + num_new
    for by_native in (False, True):
        if by_native and model.accelerate(256, longest, torch.get_num_threads()) is not None:
            return
        for prompt, new in zip(prompts, generated(model, prompts, num_new), strict=True):
            assert max(ulps_below_the_best(reference, prompt, new)) <= BF16_TIE_ULPS


# --- SmolLM2 135M, a Llama


@pytest.fixture(scope="module")
def smollm2(smollm2_by_transformers: Path) -> Any:
    return load(smollm2_by_transformers, torch.float32)


def test_smollm2_in_fp32(smollm2: Any, smollm2_gguf: Path) -> None:
    model = loaded(smollm2_gguf, "float32")
    assert_same_weights(model, smollm2)
    new = generated(model, SMOLLM2_PROMPTS, usual_or_long(40, 128))
    for prompt, its_new in zip(SMOLLM2_PROMPTS, new, strict=True):
        assert max(ulps_below_the_best(smollm2, prompt, its_new)) == 0
    assert new[0][:16] == generate(smollm2, SMOLLM2_PROMPTS[0], 16)


def test_smollm2_in_bf16(smollm2: Any, smollm2_gguf: Path) -> None:
    reference = in_bf16(smollm2)
    model = loaded(smollm2_gguf, "bfloat16")
    assert_same_weights(model, reference)
    assert_up_to_ties(model, reference, SMOLLM2_PROMPTS, usual_or_long(24, 64))


# --- Gemma 3 270M: K-quants, norms stored with 1 added, two bases of rotation, windows


@pytest.fixture(scope="module")
def gemma3(gemma3_gguf: Path) -> Any:
    return transformers_reads(gemma3_gguf)


def test_gemma3_in_fp32(gemma3: Any, gemma3_gguf: Path) -> None:
    model = loaded(gemma3_gguf, "float32")
    assert_same_weights(model, gemma3)
    new = generated(model, GEMMA_PROMPTS, usual_or_long(12, 64))
    for prompt, its_new in zip(GEMMA_PROMPTS, new, strict=True):
        assert max(ulps_below_the_best(gemma3, prompt, its_new)) == 0
    assert new[0][:8] == generate(gemma3, GEMMA_PROMPTS[0], 8)


@pytest.fixture
def daemon_of_its_own() -> Iterator[DaemonProcess]:
    path = Path(tempfile.mkdtemp(prefix="onecopy-", dir="/tmp"))
    daemon = DaemonProcess(RuntimeDir.open(path))
    yield daemon
    assert daemon.stop() == 0
    path.rmdir()


def test_gemma3_in_bf16_through_an_allocator(
    gemma3: Any, gemma3_gguf: Path, daemon_of_its_own: DaemonProcess
) -> None:
    reference = in_bf16(gemma3)
    with daemon_of_its_own.connect() as memory:
        weights = attach(memory, open_checkpoint(gemma3_gguf, "bfloat16"))
        config = json.loads(weights.metadata["config"])
        model = build_model(config, Resident(weights.tensors), torch.bfloat16)
        assert_same_weights(model, reference)
        assert model.geometry.sliding_windows.count(512) == 15
        assert_up_to_ties(model, reference, GEMMA_PROMPTS, usual_or_long(12, 64))
