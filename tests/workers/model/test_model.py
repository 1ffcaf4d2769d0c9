"""Binding tensors to architectures: nothing copied, nothing written, nothing missing."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.tiny_models import (
    CONFIGS,
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    config_of,
    prompt,
    reference_model,
    tensors_of,
)
from workers.errors import CheckpointError, CheckpointMismatch, UnsupportedCheckpoint
from workers.kv.layout import KVLayer
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.decoder import Model, build_model, preload
from workers.placement.resident import Resident

reference = cache(reference_model)


def built(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    tensors = tensors_of(reference(family, dtype, **changes))
    return build_model(config_of(family, **changes), Resident(tensors), dtype)


def table_of(model: Model, num_tokens: int) -> BlockTable:
    """Room for so many tokens of one sequence."""
    layout = model.geometry.kv_layout
    return BlockTable(layout, PrivateSource(layout).lease(layout.num_blocks(num_tokens)))


def logits_of(model: Model, table: BlockTable, token_ids: list[int]) -> torch.Tensor:
    """Those of the last of the next tokens: [1, vocab_size]."""
    return model.forward(Batch.of([Part(table, token_ids, 1)]))


def logits_in_chunks(model: Model, token_ids: list[int], sizes: Iterator[int]) -> torch.Tensor:
    """Logits of every token that ends a chunk: [num_chunks, vocab_size]."""
    own = table_of(model, len(token_ids))
    rows, start = [], 0
    while start < len(token_ids):
        stop = start + next(sizes)
        rows.append(logits_of(model, own, token_ids[start:stop]))
        start = stop
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_a_prompt_are_those_of_transformers(family: str, dtype: torch.dtype) -> None:
    token_ids = prompt(20)
    model = built(family, dtype)
    with torch.inference_mode():
        theirs = reference(family, dtype)(torch.tensor([token_ids]), logits_to_keep=1).logits[0]
    ours = logits_in_chunks(model, token_ids, iter([20]))
    if "attn_logit_softcapping" in CONFIGS[family]:  # computed eagerly there, and in bf16
        near = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(ours, theirs, atol=near, rtol=near)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", CONFIGS)
def test_chunked_prefill_gives_the_logits_of_the_whole(family: str) -> None:
    token_ids = prompt(24)
    model = built(family)
    whole = logits_in_chunks(model, token_ids, iter([24]))[-1]
    for sizes in ([1] * 24, [5] * 4 + [4], [23, 1], [1, 23], [9, 9, 6]):
        chunked = logits_in_chunks(model, token_ids, iter(sizes))[-1]
        # fp32 rounding goes with the size of the largest numbers, not with each logit's own.
        assert float((chunked - whole).abs().max()) <= 1e-5 * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_alias_the_given_tensors_and_nothing_is_left_on_meta(family: str) -> None:
    tensors = tensors_of(reference(family))
    module = build_model(config_of(family), Resident(tensors), torch.float32).module
    owned = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors.values()]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        start, stop = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
        assert any(low <= start and stop <= high for low, high in owned), name
        assert not parameter.requires_grad
    assert not any(one.is_meta for one in (*module.parameters(), *module.buffers()))
    assert not module.training


@pytest.mark.parametrize("family", CONFIGS)
def test_derived_buffers_are_those_of_transformers(family: str) -> None:
    expected = dict(reference(family).named_buffers())
    got = dict(built(family).module.named_buffers())
    assert expected.keys() == got.keys()
    assert expected
    for name, buffer in expected.items():
        assert torch.equal(buffer, got[name]), name


def test_read_only_memory_is_enough() -> None:
    """Every byte of the weights lies in PROT_READ memory: a write would end this process."""
    tensors = tensors_of(reference("gemma3"))
    memory = mmap.mmap(-1, sum(-(-one.nbytes // 64) * 64 for one in tensors.values()))
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    views, offset = {}, 0
    for name, tensor in tensors.items():
        view = whole[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        views[name] = view
        offset += -(-tensor.nbytes // 64) * 64
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(len(memory))
    assert libc.mprotect(address, length, mmap.PROT_READ) == 0, os.strerror(ctypes.get_errno())
    model = build_model(config_of("gemma3"), Resident(views), torch.float32)
    private = built("gemma3")
    token_ids = prompt(12)
    assert torch.equal(
        logits_in_chunks(model, token_ids, iter([8, 4])),
        logits_in_chunks(private, token_ids, iter([8, 4])),
    )
    del model


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_parameters_take_whichever_is_there(kept: str) -> None:
    tensors = tensors_of(reference("llama-tied"))
    embedding = next(tensors.pop(name) for name in list(tensors) if "embed_tokens" in name)
    names = ["lm_head.weight", "model.embed_tokens.weight"] if kept == "both" else [kept]
    tensors |= dict.fromkeys(names, embedding)
    model = build_model(config_of("llama-tied"), Resident(tensors), torch.float32)
    module: Any = model.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.lm_head.weight.data_ptr() == embedding.data_ptr()
    assert model.geometry.weights_bytes == sum(
        {one.data_ptr(): one.nbytes for one in tensors.values()}.values()
    )


def test_missing_tensors_are_listed() -> None:
    tensors = tensors_of(reference("llama"))
    gone = [name for name in tensors if ".layers.1." in name]
    for name in gone:
        del tensors[name]
    with pytest.raises(CheckpointMismatch) as caught:
        build_model(config_of("llama"), Resident(tensors), torch.float32)
    assert f"{len(gone)} missing (" in str(caught.value)
    assert "model.layers.1.self_attn.q_proj.weight" in str(caught.value)


def test_wrong_shapes_and_dtypes_are_listed() -> None:
    tensors = tensors_of(reference("llama"))
    tensors["model.norm.weight"] = torch.ones(65)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.bfloat16)
    with pytest.raises(CheckpointMismatch) as caught:
        build_model(config_of("llama"), Resident(tensors), torch.float32)
    assert "model.norm.weight is [65] float32, the config says [64] float32" in str(caught.value)
    assert "up_proj.weight is [96, 64] bfloat16" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"]
)
def test_a_tensor_that_would_matter_is_not_left_out(name: str) -> None:
    tensors = tensors_of(reference("llama")) | {name: torch.ones(64)}
    with pytest.raises(CheckpointMismatch, match="no place for"):
        build_model(config_of("llama"), Resident(tensors), torch.float32)


def test_harmless_tensors_are_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    surplus = ["model.rotary_emb.inv_freq", "side_head.weight"]
    tensors = tensors_of(reference("llama")) | dict.fromkeys(surplus, torch.ones(8))
    build_model(config_of("llama"), Resident(tensors), torch.float32)
    assert "2 tensors are not used: model.rotary_emb.inv_freq, side_head.weight" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type None"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "never run here"),
        ({"model_type": "t5"}, "not a decoder"),
        ({"model_type": "mamba"}, "mamba|Mamba"),
        ({"model_type": "gemma3"}, "more than text"),
        (
            {**config_of("qwen3"), "layer_types": ["full_attention", "chunked_attention"] * 2}
            | {"num_hidden_layers": 4},
            "chunked_attention",
        ),
        ({**config_of("gemma3"), "use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_can_not_be_computed_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        preload(config)


def test_geometry_tells_what_a_server_needs() -> None:
    geometry = built("mistral").geometry
    assert geometry.architecture == "MistralForCausalLM"
    assert geometry.kv_layout.layers == (KVLayer(2, 16),) * 3
    assert geometry.sliding_windows == (8, 8, 8)
    assert geometry.num_layers == 3
    assert geometry.eos_token_ids == (2,)
    parameters = tensors_of(reference("mistral")).values()
    assert geometry.num_parameters == sum(one.numel() for one in parameters)
    facts = geometry.facts(100)
    assert (facts.dtype, facts.vocab_size, facts.max_model_len) == ("float32", VOCAB_SIZE, 100)
    assert facts.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert built("gemma3").geometry.sliding_windows == (8, None, 8)


def test_others_than_the_config_may_name_the_ends() -> None:
    tensors = tensors_of(reference("llama"))
    assert built("llama").geometry.eos_token_ids == (EOS_TOKEN_ID,)
    model = build_model(config_of("llama"), Resident(tensors), torch.float32, (5, 6))
    assert model.geometry.eos_token_ids == (5, 6)
    without = build_model(config_of("llama", eos_token_id=None), Resident(tensors), torch.float32)
    assert without.geometry.eos_token_ids == ()
    with pytest.raises(CheckpointError, match="eos_token_id' with value 'x'"):
        build_model(config_of("llama", eos_token_id="x"), Resident(tensors), torch.float32)


def test_lengths_stop_where_rotations_would_depend_on_the_batch() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    config = config_of("phi3", **changes)
    tensors = tensors_of(reference("phi3"))
    model = build_model(config, Resident(tensors), torch.float32)
    assert model.geometry.max_model_len == 64
    model.warm_up()


def test_preloading_starts_no_threads() -> None:
    before = set(Path("/proc/self/task").iterdir())
    preload(config_of("gemma3"))
    built("gemma3")
    assert set(Path("/proc/self/task").iterdir()) == before


def test_a_failed_pass_changes_no_cache() -> None:
    model = built("llama")
    own, other, fresh = (table_of(model, 16) for _ in range(3))
    first = logits_of(model, own, prompt(6))
    with pytest.raises(IndexError):
        model.forward(Batch.of([Part(own, [5], 1), Part(other, [VOCAB_SIZE], 1)]))
    assert (own.num_tokens, other.num_tokens) == (6, 0)
    assert len(model.forward(Batch.of([Part(other, prompt(6), 0)]))) == 0
    assert torch.equal(logits_of(model, fresh, prompt(6)), first)
    after = [logits_of(model, one, [7]) for one in (own, other, fresh)]
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])


def test_logits_of_as_many_of_the_last_tokens_as_are_wanted() -> None:
    model = built("llama")
    parts = [([4, 5, 6], 3), ([7], 0), ([8, 9], 1)]
    tables = [table_of(model, 16) for _ in parts]
    batch = [Part(own, ids, count) for own, (ids, count) in zip(tables, parts, strict=True)]
    rows = model.forward(Batch.of(batch))
    assert rows.shape == (4, VOCAB_SIZE)
    alone = [logits_in_chunks(model, ids, iter([1] * 3)) for ids, _ in parts]
    expected = torch.cat([alone[0], alone[2][-1:]])
    assert float((rows - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
