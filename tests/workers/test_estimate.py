"""What a model is said to take, against what it then takes: segments, KV caches, shards.

The allocator and the kernel say what is held; nothing here repeats the estimate's own sums.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from allocator import Client
from server.models.source import DEMO, find_model
from tests.daemon_process import ROOT
from tests.workers.checkpoint.checkpoint_files import assemble, entry, folder, tensors_of_every_kind
from tests.workers.tiny_models import CONFIGS, config_of, prompt, write_checkpoint
from workers.checkpoint import attach, open_checkpoint
from workers.engine.generate import GenerationEngine
from workers.errors import (
    CheckpointCorrupt,
    CheckpointMismatch,
    CheckpointNotFound,
    InvalidSetting,
    UnsupportedCheckpoint,
)
from workers.estimate import estimate
from workers.kv.layout import KVLayer, KVLayout
from workers.kv.source import PoolSource
from workers.messages import Estimate, Generate, SamplingParams, decode_estimate
from workers.model.decoder import build_model
from workers.placement.resident import Resident
from workers.settings import checked

pytestmark = pytest.mark.slow


def sealed_bytes(memory: Client, path: Path, dtype: str = "auto") -> int:
    """What the allocator says of the checkpoint's set once it is loaded."""
    weights = attach(memory, open_checkpoint(path, dtype))
    [found] = [one for one in memory.statistics().weight_sets if one.key == weights.reader.key]
    assert found.state == "sealed"
    return found.num_bytes


def estimate_of(path: Path, dtype: str = "auto", **options: Any) -> Estimate:
    return estimate(open_checkpoint(path, dtype), checked({"dtype": dtype, **options}))


# --- weights


@pytest.mark.parametrize("family", CONFIGS)
def test_the_segment_takes_what_was_said(memory: Client, tmp_path: Path, family: str) -> None:
    path = write_checkpoint(tmp_path / family, family)
    assert estimate_of(path).segment_bytes == sealed_bytes(memory, path)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_in_each_dtype(memory: Client, tmp_path: Path, dtype: str) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama", torch.bfloat16)
    found = estimate_of(path, dtype)
    assert found.segment_bytes == sealed_bytes(memory, path, dtype)
    assert found.dtype == ("bfloat16" if dtype == "auto" else dtype)


def test_where_the_config_names_no_dtype(memory: Client, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama", torch.float16)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": None}))
    found = estimate_of(path)
    assert found.dtype == "float16"
    assert found.segment_bytes == sealed_bytes(memory, path)


def test_tensors_that_the_architecture_does_not_use_count_too(
    memory: Client, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    before = estimate_of(path)
    tensors = load_file(path / "model.safetensors")
    extra = {f"extra.{name}": one for name, one in tensors_of_every_kind().items()}
    save_file({**tensors, **extra}, path / "model.safetensors", metadata={"format": "pt"})
    found = estimate_of(path)
    assert found.segment_bytes == sealed_bytes(memory, path)
    assert found.segment_bytes > before.segment_bytes
    assert found.num_parameters == before.num_parameters
    assert found.num_tensors == len(tensors) + len(extra)


def test_the_demo_takes_what_was_said(memory: Client) -> None:
    path = find_model(DEMO).path
    found = estimate_of(path)
    assert found.segment_bytes == sealed_bytes(memory, path)
    assert found.num_parameters == 134_515_008  # as its authors give it


def test_a_model_larger_than_any_machine_is_read_in_no_time(tmp_path: Path) -> None:
    """Terabytes of weights, none of which is on the disk: only the header may be read."""
    config = config_of(
        "llama-tied",
        vocab_size=1 << 17,
        hidden_size=1 << 20,
        intermediate_size=1 << 17,
        num_hidden_layers=1,
        num_attention_heads=1 << 13,
        num_key_value_heads=8,
        head_dim=128,
    )
    path = folder(tmp_path / "huge", **{**config, "dtype": "bfloat16"})
    hidden, inner, layer = 1 << 20, 1 << 17, "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": [1 << 17, hidden],
        f"{layer}self_attn.q_proj.weight": [hidden, hidden],
        f"{layer}self_attn.k_proj.weight": [1024, hidden],
        f"{layer}self_attn.v_proj.weight": [1024, hidden],
        f"{layer}self_attn.o_proj.weight": [hidden, hidden],
        f"{layer}mlp.gate_proj.weight": [inner, hidden],
        f"{layer}mlp.up_proj.weight": [inner, hidden],
        f"{layer}mlp.down_proj.weight": [hidden, inner],
        f"{layer}input_layernorm.weight": [hidden],
        f"{layer}post_attention_layernorm.weight": [hidden],
        "model.norm.weight": [hidden],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = entry(shape, begin, end, "BF16")
    file = path / "model.safetensors"
    file.write_bytes(assemble(header))
    with file.open("r+b") as stream:
        try:
            stream.truncate(file.stat().st_size + end)
        except OSError as error:
            pytest.skip(f"this file system holds no sparse file of {end} bytes: {error}")
    read = bytes_read()
    found = estimate_of(path)
    assert bytes_read() - read < 8_000_000
    assert end > 5_000_000_000_000
    assert 0 < found.segment_bytes - end < 100_000


def bytes_read() -> int:
    """All that this process has read by system calls so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


# --- KV cache


def most_kv_bytes(path: Path, dtype: torch.dtype, max_model_len: int, num_seqs: int) -> int:
    """What `num_seqs` sequences hold together just before they end, as the engine says."""
    checkpoint = open_checkpoint(path)
    tensors = load_file(path / "model.safetensors")
    model = build_model(json.loads(checkpoint.metadata()["config"]), Resident(tensors), dtype)
    engine = GenerationEngine(model, max_model_len, num_seqs)
    for index in range(num_seqs):
        sampling = SamplingParams(max_tokens=max_model_len, temperature=0.0, ignore_eos=True)
        engine.add(
            Generate(
                request_id=str(index),
                token_ids=tuple(prompt(max_model_len - 9, seed=index)),
                sampling=sampling,
            )
        )
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.kv_bytes)
    return most


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("mistral", torch.float32),  # sliding windows: what is out of sight is kept all the same
        ("qwen2-sliding", torch.float32),
        ("gemma2", torch.float32),
        ("gemma3", torch.bfloat16),
        ("phi3", torch.float32),
    ],
)
def test_full_sequences_hold_what_was_said(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path = write_checkpoint(tmp_path / family, family, dtype)
    # The last token of a sequence is never in its cache; of 128, its block holds others as well.
    found = estimate_of(path, max_model_len=128)
    assert found.max_model_len == 128
    assert most_kv_bytes(path, dtype, 128, 3) == 3 * found.kv_bytes_per_sequence


def test_a_length_between_two_blocks_is_rounded_up(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    found = {length: estimate_of(path, max_model_len=length) for length in (96, 97, 100, 112)}
    each = {length: one.kv_bytes_per_sequence for length, one in found.items()}
    assert most_kv_bytes(path, torch.float32, 100, 2) == 2 * each[100]
    assert each[97] == each[100] == each[112] == each[96] * 7 // 6


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gemma2", "float32")])
def test_the_allocator_leases_what_was_said(
    memory: Client, tmp_path: Path, family: str, dtype: str
) -> None:
    path = write_checkpoint(tmp_path / family, family)
    found = estimate_of(path, dtype, max_model_len=40)
    assert found.kv_bytes_per_token == 3 * 2 * 2 * 16 * (2 if dtype == "bfloat16" else 4)
    layout = KVLayout((KVLayer(2, 16),) * 3, getattr(torch, dtype))
    blocks = PoolSource(memory, layout).lease(3)
    assert len({block.address for block in blocks}) == 3
    assert memory.statistics().pool.leased_bytes == found.kv_bytes_per_sequence


def test_without_a_length_it_is_the_models_own(tmp_path: Path) -> None:
    assert estimate_of(write_checkpoint(tmp_path / "llama", "llama")).max_model_len == 256


# --- what a step keeps


def test_a_step_is_said_to_take_more_the_more_it_computes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    found = [
        estimate_of(path, max_num_batched_tokens=budget, max_model_len=length).prefill_bytes
        for budget, length in ((8, 64), (64, 64), (64, 256))
    ]
    assert 0 < found[0] < found[1] < found[2]
    # No step has more prompt tokens than one sequence where only one can be so long.
    beyond = estimate_of(path, max_num_batched_tokens=1000).prefill_bytes
    assert beyond == estimate_of(path, max_num_batched_tokens=256).prefill_bytes


# --- tensor parallelism

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj")
ROWS = ("o_proj", "down_proj")


def shard(name: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Rank 0's part: what leads into attention and MLP is cut by columns (its outputs), what leads
    out of them by rows (its inputs); a bias goes with its outputs."""
    module = name.split(".")[-2]
    if module in COLUMNS:
        return tensor.chunk(size, 0)[0].contiguous()
    if module in ROWS and tensor.ndim == 2:
        return tensor.chunk(size, 1)[0].contiguous()
    return tensor


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "gemma3"])
def test_a_ranks_segment_takes_what_was_said(memory: Client, tmp_path: Path, family: str) -> None:
    path = write_checkpoint(tmp_path / family, family)
    found = estimate_of(path, tensor_parallel_size=2)
    assert found.rank is not None
    whole = load_file(path / "model.safetensors")
    parts = {name: shard(name, one, 2) for name, one in whole.items()}
    save_file(parts, path / "model.safetensors", metadata={"format": "pt"})
    assert found.rank.segment_bytes == sealed_bytes(memory, path)
    assert found.rank.segment_bytes < found.segment_bytes


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma2", "gemma3"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_add_up_to_the_whole(tmp_path: Path, family: str, size: int) -> None:
    path = write_checkpoint(tmp_path / family, family, num_key_value_heads=4)
    found = estimate_of(path, tensor_parallel_size=size)
    rank = found.rank
    assert rank is not None
    whole = load_file(path / "model.safetensors")
    split = size * (rank.column_bytes + rank.row_bytes)
    assert split + rank.replicated_bytes == sum(one.nbytes for one in whole.values())
    assert min(rank.column_bytes, rank.row_bytes, rank.replicated_bytes) > 0
    replicated = [name for name, one in whole.items() if shard(name, one, size) is one]
    assert rank.replicated_bytes == sum(whole[name].nbytes for name in replicated)
    assert all(re.search("norm|embed|lm_head|o_proj.bias", name) for name in replicated)
    assert size * rank.kv_bytes_per_token == found.kv_bytes_per_token
    assert size * rank.kv_bytes_per_sequence >= found.kv_bytes_per_sequence  # in whole blocks each


def test_one_rank_is_not_split(tmp_path: Path) -> None:
    assert estimate_of(write_checkpoint(tmp_path / "llama", "llama")).rank is None


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (3, {}),
        (4, {}),
        (4, {"num_key_value_heads": 4, "intermediate_size": 98}),
        (2, {"num_key_value_heads": 1}),
    ],
)
def test_ranks_on_one_host_need_not_hold_equal_parts(
    tmp_path: Path, size: int, changes: dict[str, int]
) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama", **changes)
    found, alone = estimate_of(path, tensor_parallel_size=size), estimate_of(path)
    assert found.rank is None
    assert found.segment_bytes == alone.segment_bytes
    num_kv_heads = changes.get("num_key_value_heads", 2)
    # A head of keys and values that several ranks share is on each of them.
    assert found.kv_bytes_per_token * num_kv_heads == alone.kv_bytes_per_token * max(
        size, num_kv_heads
    )


def test_more_ranks_than_heads_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    with pytest.raises(InvalidSetting, match="--tensor-parallel-size is 5, but the model has 4"):
        estimate_of(path, tensor_parallel_size=5)


def test_what_is_not_served_by_ranks_is_not_planned(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "phi3", "phi3")
    with pytest.raises(UnsupportedCheckpoint, match="only --tensor-parallel-size 1 is possible"):
        estimate_of(path, tensor_parallel_size=2)


@pytest.fixture
def unplanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that can be served, of an architecture for which transformers has no plan."""
    monkeypatch.setitem(CONFIGS, "persimmon", {"model_type": "persimmon"})
    return write_checkpoint(tmp_path / "persimmon", "persimmon")


def test_an_architecture_without_a_plan_is_refused_by_name(unplanned: Path) -> None:
    assert not CONFIG_MAPPING["persimmon"].base_model_tp_plan
    assert estimate_of(unplanned).segment_bytes > 0
    with pytest.raises(UnsupportedCheckpoint, match=r"PersimmonConfig \(persimmon\) has no base_"):
        estimate_of(unplanned, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            {"layers.*.mlp.up_proj": "sideways"},
            r"splits layers.\*.mlp.up_proj.weight by 'sideways'",
        ),
        ({"blocks.*.up": "colwise"}, "names none of the model's tensors"),
    ],
)
def test_a_plan_that_is_not_understood_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: dict[str, str], words: str
) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    monkeypatch.setattr(CONFIG_MAPPING["llama"], "base_model_tp_plan", plan)
    with pytest.raises(UnsupportedCheckpoint, match=words):
        estimate_of(path, tensor_parallel_size=2)


# --- slots


def test_a_slot_takes_what_was_said(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama", num_hidden_layers=4)
    offloaded = estimate_of(path, offload="all").offload
    assert offloaded is not None
    assert estimate_of(path).slot_bytes * 2 == offloaded.slots_bytes  # one, and one read ahead
    stays = estimate_of(path, tensor_parallel_size=2)
    assert stays.slot_bytes == 0
    assert "by one rank" in stays.stays_because
    assert estimate_of(path, offload="none").stays_because == "--offload is none: leave it to auto"


# --- what can't be estimated


def missing_tensor(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))


def truncated(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (missing_tensor, CheckpointMismatch),
        (truncated, CheckpointCorrupt),
        (lambda path: (path / "model.safetensors").unlink(), CheckpointNotFound),
    ],
)
def test_what_could_not_be_loaded_is_not_estimated(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception]
) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    damage(path)
    with pytest.raises(error):
        estimate_of(path)


def test_a_length_beyond_the_models_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    assert estimate_of(path, max_model_len=256).max_model_len == 256
    with pytest.raises(InvalidSetting, match=r"--max-model-len is 257, .* 256 tokens"):
        estimate_of(path, max_model_len=257)


# --- as a program


def program(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "workers.estimate", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_program_prints_the_same_as_one_document(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llama", "llama")
    settings = {"dtype": "bfloat16", "max_model_len": 64, "tensor_parallel_size": 2}
    ended = program(path, "--settings", json.dumps(settings))
    assert ended.returncode == 0, ended.stderr
    expected = estimate_of(path, "bfloat16", max_model_len=64, tensor_parallel_size=2)
    assert decode_estimate(ended.stdout.encode()) == expected


def test_the_program_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    ended = program(
        write_checkpoint(tmp_path / "llama", "llama"), "--settings", '{"dtype": "int3"}'
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == ("--dtype is 'int3': it is one of auto, bfloat16, float16, float32\n")
