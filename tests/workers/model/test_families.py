"""Family after family: saved by transformers, loaded through an allocator, the same greedy tokens.

Weights are random and large, so that the best token is clearly the best: the smallest gap between
it and the second is asserted, too. docs/models.md lists the families.
"""

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from allocator import Client, RuntimeDir
from tests.daemon_process import DaemonProcess
from tests.workers.checkpoint.test_checkpoint_sharing import loaded_in_a_process
from tests.workers.model.tiny_families import (
    FAMILIES,
    LONGROPE,
    REFUSED,
    REFUSED_BY_NAME,
    save,
    tiny_model,
)
from tests.workers.tiny_models import CONFIGS, generate, prompt, smallest_gap, tensors_of
from workers.checkpoint import attach, open_checkpoint
from workers.conformance.greedy import generated
from workers.errors import CheckpointMismatch, UnsupportedCheckpoint
from workers.model.decoder import Model, build_model, preload
from workers.placement.resident import Resident

NUM_NEW = 10
PROMPTS = [prompt(length, seed=length) for length in (1, 13, 40)]
SMALLEST_GAP = 5e-5

MOE = ["qwen3_moe", "mixtral", "glm4_moe"]  # the hub's two layouts, and a bias that stays fp32

tiny = cache(tiny_model)


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[DaemonProcess]:
    path = Path(tempfile.mkdtemp(prefix="onecopy-", dir="/tmp"))
    daemon = DaemonProcess(RuntimeDir.open(path))
    yield daemon
    assert daemon.stop() == 0
    path.rmdir()


@pytest.fixture(scope="module")
def memory(shared_daemon: DaemonProcess) -> Iterator[Client]:
    with shared_daemon.connect() as client:
        yield client


def load(memory: Client, folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """By the way that an instance takes."""
    weights = attach(memory, open_checkpoint(folder, str(dtype).removeprefix("torch.")))
    model = build_model(json.loads(weights.metadata["config"]), Resident(weights.tensors), dtype)
    model.warm_up()
    return model


@cache
def expected(family: str) -> list[list[int]]:
    return [generate(tiny(family), one, NUM_NEW) for one in PROMPTS]


# --- the same tokens


@pytest.mark.parametrize("family", [*CONFIGS, *FAMILIES])
def test_greedy_tokens_are_those_of_transformers(
    family: str, memory: Client, tmp_path: Path
) -> None:
    new = expected(family)
    for token_ids, its_new in zip(PROMPTS, new, strict=True):
        with torch.inference_mode():
            logits = tiny(family)(torch.tensor([token_ids + its_new])).logits
        assert smallest_gap(logits[0, len(token_ids) - 1 : -1]) > SMALLEST_GAP
    assert max(len(set(one)) for one in new) > 3
    model = load(memory, save(tiny(family), tmp_path))
    assert generated(model, PROMPTS, NUM_NEW) == new
    assert generated(model, PROMPTS, NUM_NEW, max_num_batched_tokens=9) == new


def test_longrope_up_to_its_original_length(memory: Client, tmp_path: Path) -> None:
    reference = tiny_model("phi3", **LONGROPE)
    new = [generate(reference, one, NUM_NEW) for one in PROMPTS]
    model = load(memory, save(reference, tmp_path))
    assert model.geometry.max_model_len == 64
    assert generated(model, PROMPTS, NUM_NEW) == new != expected("phi3")


# --- experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", MOE)
def test_experts_of_the_hub_become_the_tensors_of_transformers(
    family: str, dtype: torch.dtype, memory: Client, tmp_path: Path
) -> None:
    """One tensor an expert, in several files, one of them cut between the experts of a layer."""
    save(tiny(family), tmp_path, max_shard_size="90KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert any(".experts.3." in name for name in names)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    ours = load(memory, tmp_path, dtype).module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    if family == "glm4_moe":
        [bias] = [one for name, one in ours.items() if "layers.1" in name and "_bias" in name]
        assert bias.dtype == torch.float32


def test_fused_experts_are_taken_as_they_are(memory: Client, tmp_path: Path) -> None:
    save(tiny("qwen3_moe"), tmp_path)
    save_file(tensors_of(tiny("qwen3_moe")), tmp_path / "model.safetensors", {"format": "pt"})
    assert generated(load(memory, tmp_path), PROMPTS, NUM_NEW) == expected("qwen3_moe")


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    file = save(tiny("mixtral"), tmp_path) / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    gone = next(name for name in tensors if "layers.1" in name and ".experts.2.w3." in name)
    save_file({name: one for name, one in tensors.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"layers\.1\..*gate_up_proj do not fit together"):
        open_checkpoint(tmp_path).tensors()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_are_fused_in_little_private_memory(
    dtype: str, shared_daemon: DaemonProcess, tmp_path: Path
) -> None:
    """32 experts of 2 MB each, cast to bf16 or copied as they are stored."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32}
    save(tiny_model("qwen3_moe", **sizes, num_hidden_layers=1), tmp_path)
    load = loaded_in_a_process(shared_daemon.runtime_dir, tmp_path, dtype)
    assert load["largest"] == 32 * 1024 * 512 * getattr(torch, dtype).itemsize
    assert load["grown"] < load["largest"] / 2


# --- what is refused


@pytest.mark.parametrize("family", REFUSED)
def test_what_would_compute_something_else_is_refused(
    family: str, memory: Client, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=REFUSED[family][1]):
        load(memory, save(tiny_model(family), tmp_path))


@pytest.mark.parametrize(("model_type", "reason"), REFUSED_BY_NAME)
def test_refused_by_name_before_anything_is_loaded(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        preload({"model_type": model_type})
