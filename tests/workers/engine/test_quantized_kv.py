"""Requests whose keys and values are quantized: the same tokens alone, in company, in chunks, on
trial, after giving way, and on another instance that finds what one has computed."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from tests.daemon_process import DaemonProcess
from tests.workers.engine.engines import only, request, run, tokens
from tests.workers.tiny_models import config_of, prompt, reference_model, tensors_of
from workers.engine.generate import GenerationEngine
from workers.kv.cache import KVCache
from workers.kv.layout import FULL
from workers.kv.source import PoolSource
from workers.messages import Generate
from workers.model.decoder import Model, build_model
from workers.placement.resident import Resident

CHANGES: dict[str, Any] = {"max_position_embeddings": 512}
LONGEST = 400
PROMPTS = [prompt(length, seed=length) for length in (3, 31, 64, 150, 290)]
TEXTS = [*PROMPTS, [5, 6, 7, 8] * 20]
"""The last one says again what it has said, so that there are guesses at what follows."""

pytestmark = pytest.mark.parametrize("bits", [8, 4])


@cache
def model_of(bits: int) -> Model:
    reference = reference_model("llama", torch.bfloat16, **CHANGES)
    tensors = Resident(tensors_of(reference))
    model = build_model(config_of("llama", **CHANGES), tensors, torch.bfloat16, kv_bits=bits)
    assert model.accelerate(512, LONGEST, 2) is None
    return model


def engine_of(bits: int, **changes: Any) -> GenerationEngine:
    return GenerationEngine(model_of(bits), LONGEST, **changes)


def requests() -> list[Generate]:
    return [request(f"r{i}", text, max_tokens=60) for i, text in enumerate(TEXTS)]


@cache
def alone(bits: int) -> list[list[int]]:
    return [only(engine_of(bits), one)[0] for one in requests()]


def test_they_are_others_than_without(bits: int) -> None:
    """Or nothing here would tell anything."""
    assert alone(bits) != alone(FULL)
    assert all(len(one) == 60 for one in alone(bits))


@pytest.mark.parametrize("num_batched_tokens", [7, 32, 100])
@pytest.mark.parametrize("num_speculative_tokens", [0, 16])
def test_neither_company_nor_chunks_nor_trials_change_a_token(
    bits: int, num_batched_tokens: int, num_speculative_tokens: int
) -> None:
    engine = engine_of(
        bits,
        max_num_batched_tokens=num_batched_tokens,
        num_speculative_tokens=num_speculative_tokens,
    )
    outputs = run(engine, *requests(), most_steps=4000)
    assert [tokens(outputs[one.request_id]) for one in requests()] == alone(bits)
    assert (engine.report(()).drafted_tokens > 0) == (num_speculative_tokens > 0)


def test_giving_way_changes_no_token(bits: int) -> None:
    """Four begin where there is room for two at their end."""
    asked = [request(f"g{i}", prompt(100, seed=i), max_tokens=60) for i in range(4)]
    expected = [only(engine_of(bits), one)[0] for one in asked]
    layout = model_of(bits).geometry.kv_layout
    room = 2 * layout.num_bytes(160) + layout.block_bytes
    engine = engine_of(bits, kv=KVCache(layout, private_limit_bytes=room))
    outputs = run(engine, *asked, most_steps=4000)
    assert [tokens(outputs[one.request_id]) for one in asked] == expected
    assert engine.report(()).num_preempted > 0


def on_pool(client: Any, bits: int) -> GenerationEngine:
    layout = model_of(bits).geometry.kv_layout
    return engine_of(bits, kv=KVCache(layout, PoolSource(client, layout), weights="w"))


def continued(text: Sequence[int], generated: Sequence[int], count: int) -> Generate:
    """A request that another instance had begun to answer."""
    return request("moved", [*text, *generated[:count]], count, max_tokens=60)


def test_another_instance_finds_what_was_computed_and_says_the_same(
    bits: int, daemon: DaemonProcess
) -> None:
    size = model_of(bits).geometry.kv_layout.block_size
    with daemon.connect() as first, daemon.connect() as second:
        long, expected = TEXTS[4], alone(bits)[4]
        assert only(on_pool(first, bits), request("a", long, max_tokens=60))[0] == expected
        other = on_pool(second, bits)
        assert only(other, request("b", long, max_tokens=60))[0] == expected
        assert other.report(()).cached_tokens == len(long) // size * size
        for count in (1, 17, 40):
            assert only(other, continued(long, expected, count))[0] == expected[count:]


def test_whose_keys_and_values_are_kept_otherwise_finds_nothing(
    bits: int, daemon: DaemonProcess
) -> None:
    with daemon.connect() as first, daemon.connect() as second:
        only(on_pool(first, bits), request("a", TEXTS[4]))
        plain = on_pool(second, FULL)
        assert only(plain, request("b", TEXTS[4], max_tokens=60))[0] == alone(FULL)[4]
        assert plain.report(()).cached_tokens == 0
