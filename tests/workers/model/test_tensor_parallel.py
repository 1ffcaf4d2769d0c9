"""A model that several processes compute together answers as it does in one, from one copy."""

import json
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator import Client, RuntimeDir, connect
from tests.references import load, ulps_below_the_best
from tests.workers.model.placed_models import logits_of
from tests.workers.model.tiny_families import FAMILIES, save, tiny_config, tiny_model
from tests.workers.placement.ranks import Ranks, of_one_copy
from tests.workers.tiny_models import CONFIGS
from workers.checkpoint import AttachedWeights, attach, open_checkpoint
from workers.conformance.greedy import generated
from workers.conformance.ties import BF16_TIE_ULPS
from workers.errors import InvalidSetting, UnsupportedCheckpoint
from workers.model.decoder import build_model
from workers.model.geometry import geometry_of
from workers.model.tensor_parallel import narrow
from workers.packed_format import decoded
from workers.placement.all_reduce import AllReduce, form, num_bytes
from workers.placement.resident import Resident
from workers.skeleton.decoder import skeleton

MAX_ROWS = 64
ODD: dict[str, Any] = {"head_dim": 20, "hidden_size": 100, "intermediate_size": 77}
"""No multiple of anything that a register holds."""
# "The capital of France is", "def fibonacci(n):\n"
PROMPTS = [[504, 3575, 282, 4649, 314], [1604, 3987, 46477, 24, 94, 727, 198]]
LESS_THAN_A_COPY = 200_000_000  # of the 269 MB of SmolLM2 in bf16
COMPUTED = [
    *(
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3",
        "gpt_neox",
        "granite",
    ),
    *("helium", "llama", "llama-rope-scaled", "llama-tied", "mistral", "nemotron", "olmo", "phi"),
    *("qwen2", "qwen2-sliding", "qwen3", "seed_oss", "smollm3", "starcoder2"),
]
"""All others are refused."""
OTHERS = sorted({*FAMILIES, *CONFIGS} - set(COMPUTED))


def raw_config(family: str) -> Any:
    """As config.json has it."""
    return json.loads(tiny_config(family).to_json_string(use_diff=False))


def attached(
    memory: Client, family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> AttachedWeights:
    model = tiny_model(family, **changes).to(dtype)
    return attach(memory, open_checkpoint(save(model, folder)))


def computed(
    weights: AttachedWeights, num_threads: int = 0, ranks: AllReduce | None = None
) -> torch.Tensor:
    """All logits, one behind the other: by the native decoder, if it has threads."""
    config = json.loads(weights.metadata["config"])
    dtype = weights.dtype or torch.float32
    packed = decoded(weights.metadata)
    model = build_model(config, Resident(weights.tensors), dtype, ranks=ranks, packed=packed)
    for parameter in model.module.parameters():
        assert any(is_within(parameter, whole) for whole in weights.tensors.values())
    if num_threads:
        assert model.accelerate(MAX_ROWS, MAX_ROWS * 2, num_threads) is None
    return torch.cat([one.flatten().float() for one in logits_of(model)])


def is_within(part: torch.Tensor, whole: torch.Tensor) -> bool:
    last = (part.shape[0] - 1) * part.stride(0) * part.itemsize
    begin = part.data_ptr() - whole.data_ptr()
    return begin >= 0 and begin + last < whole.nbytes


def formed(memory: Client, num_ranks: int, capacity: int) -> torch.Tensor:
    extent = memory.lease(num_bytes(num_ranks, capacity)).tensor()
    form(extent, num_ranks, capacity)
    return extent


def computed_by_ranks(
    num_ranks: int, memory: Client, weights: AttachedWeights, like: torch.Tensor, num_threads: int
) -> torch.Tensor:
    """Each rank's logits, all of which have the same bits."""
    shared = torch.frombuffer(mmap.mmap(-1, num_ranks * like.nbytes), dtype=torch.float32)
    got = shared.view(num_ranks, -1)
    extent = formed(memory, num_ranks, MAX_ROWS * 160)

    def work(rank: int) -> None:
        with AllReduce(extent, rank, num_ranks) as group:
            got[rank] = computed(weights, num_threads, group)

    with Ranks(num_ranks, work) as ranks:
        ranks.results()
    for rank in range(1, num_ranks):
        assert torch.equal(got[rank], got[0])
    return got[0]


def assert_modules_agree(weights: AttachedWeights, num_ranks: int, memory: Client) -> None:
    alone = computed(weights)
    got = computed_by_ranks(num_ranks, memory, weights, alone, 0)
    assert (got - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("family", COMPUTED)
def test_three_ranks_compute_what_one_does(family: str, memory: Client, tmp_path: Path) -> None:
    """4 heads over 2 of keys and values: cut unevenly, and one of the latter on two ranks."""
    assert_modules_agree(attached(memory, family, tmp_path), 3, memory)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "starcoder2"])
def test_other_numbers_of_ranks(
    family: str, num_ranks: int, memory: Client, tmp_path: Path
) -> None:
    weights = attached(memory, family, tmp_path, intermediate_size=77)
    assert_modules_agree(weights, num_ranks, memory)


@pytest.mark.parametrize(
    ("family", "num_ranks", "num_threads", "changes"),
    [
        ("llama", 2, 1, ODD),
        ("llama", 4, 1, {"num_hidden_layers": 2}),
        ("gemma3", 3, 2, {"head_dim": 32}),
        ("gpt_neox", 2, 2, {}),
        ("phi", 3, 1, {}),
        ("starcoder2", 2, 3, {"hidden_size": 160, "use_bias": True}),
        ("cohere", 4, 2, {}),
    ],
)
def test_ranks_compute_natively(
    family: str,
    num_ranks: int,
    num_threads: int,
    changes: dict[str, Any],
    memory: Client,
    tmp_path: Path,
) -> None:
    """As far as two ways of computing may differ where all between layers is rounded to bf16: the
    logits of one rank alone are off by some hundredths from those in fp32."""
    weights = attached(memory, family, tmp_path, torch.bfloat16, **changes)
    with Ranks(1, lambda _: computed(weights, num_threads).tolist()) as alone:
        expected = torch.tensor(alone.result(0))
    got = computed_by_ranks(num_ranks, memory, weights, expected, num_threads)
    assert (got - expected).abs().max() <= 0.02 * expected.abs().max()


def test_ranks_keep_the_keys_and_values_of_their_own_heads() -> None:
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144}
    config = {**raw_config("llama"), **heads}
    kept = []
    for rank in range(2):
        module = skeleton(config, torch.float32)
        narrow(module, rank, 2)
        layout = geometry_of(module, torch.float32, torch.device("cpu"), ()).kv_layout
        kept.append([layer.num_heads for layer in layout.layers])
    assert kept == [[1, 1, 1], [2, 2, 2]]


def test_a_rank_that_is_killed_ends_a_pass_of_the_others(memory: Client, tmp_path: Path) -> None:
    """By modules and natively; no table has changed, so that what was computed can be gone over."""
    for num_threads, dtype in ((0, torch.float32), (1, torch.bfloat16), (3, torch.bfloat16)):
        weights = attached(memory, "llama", tmp_path / str(num_threads), dtype)
        extent = formed(memory, 2, MAX_ROWS * 64)

        def work(
            rank: int,
            num_threads: int = num_threads,
            weights: AttachedWeights = weights,
            extent: torch.Tensor = extent,
        ) -> None:
            with AllReduce(extent, rank, 2, timeout_s=3000.0) as group:
                computed(weights, num_threads, group)
                if rank:
                    os.kill(os.getpid(), signal.SIGKILL)
                computed(weights, num_threads, group)

        with Ranks(2, work) as ranks:
            assert ranks.result(0)[:2] == ["RankEnded", 1]


def test_too_small_a_group_is_not_native(memory: Client, tmp_path: Path) -> None:
    weights = attached(memory, "llama", tmp_path, torch.bfloat16)
    extent = formed(memory, 1, 1000)
    config = json.loads(weights.metadata["config"])
    with AllReduce(extent, 0, 1) as group:
        model = build_model(config, Resident(weights.tensors), torch.bfloat16, ranks=group)
        why = model.accelerate(MAX_ROWS, 128, 1)
    assert why == "sums of 1000 numbers at a time: 4096 are needed"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_smollm2_on_ranks_with_sessions_of_their_own(
    num_ranks: int,
    memory: Client,
    runtime_dir: RuntimeDir,
    smollm2_gguf: Path,
    smollm2_by_transformers: Path,
) -> None:
    """9 heads over 3 of keys and values. One copy of the weights serves all ranks, by the kernel's
    figures, no rank grows by as much, and their tokens are transformers' choice up to ties."""
    num_new, num_rows = 12, 64
    extent = formed(memory, num_ranks, num_rows * 576)

    def work(rank: int, look: Callable[[], None]) -> list[list[int]]:
        checkpoint = open_checkpoint(smollm2_gguf, "bfloat16")
        with connect(runtime_dir) as own, AllReduce(extent, rank, num_ranks) as group:
            weights = attach(own, checkpoint)
            config = json.loads(weights.metadata["config"])
            placement = Resident(weights.tensors)
            model = build_model(config, placement, torch.bfloat16, ranks=group)
            assert model.accelerate(num_rows, 128, 1) is None
            new = generated(model, PROMPTS, num_new, max_num_batched_tokens=num_rows)
            look()
            return new

    results = of_one_copy(num_ranks, runtime_dir, LESS_THAN_A_COPY, work)
    assert results == [results[0]] * num_ranks
    reference = load(smollm2_by_transformers, torch.float32)
    for prompt, new in zip(PROMPTS, results[0], strict=True):
        assert len(new) == num_new
        assert max(ulps_below_the_best(reference, prompt, new)) <= BF16_TIE_ULPS


@pytest.mark.parametrize("family", OTHERS)
def test_what_can_not_be_cut_is_refused_by_name(family: str) -> None:
    module = skeleton(raw_config(family), torch.float32)
    with pytest.raises(UnsupportedCheckpoint, match="only --tensor-parallel-size 1 is possible"):
        narrow(module, 0, 2)


def test_more_ranks_than_heads_are_refused() -> None:
    module = skeleton(raw_config("llama"), torch.float32)
    with pytest.raises(InvalidSetting, match="at most 4 is possible"):
        narrow(module, 0, 5)
