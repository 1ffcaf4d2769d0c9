"""Attention of a ragged batch against the plain formula, and how much memory it takes."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from workers.errors import UnsupportedCheckpoint
from workers.kv.block import KVBlock
from workers.kv.layout import KVLayer, KVLayout
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.attention import attend, causal_mask
from workers.model.batch import Batch, Part

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8
LAYOUT = KVLayout((KVLayer(NUM_KV_HEADS, HEAD_DIM),), torch.float32, block_size=4)


def test_attention_is_not_planned_anew_for_each_number_of_keys() -> None:
    """Whether it would be shows on some GPUs only."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


class Layer(torch.nn.Module):
    """What `attend` reads of a transformers attention module."""

    layer_idx = 0
    is_causal = True

    def __init__(self, num_key_value_groups: int = NUM_HEADS // NUM_KV_HEADS) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def rows(
    num_tokens: int, num_heads: int, generator: torch.Generator, head_dim: int = HEAD_DIM
) -> torch.Tensor:
    return torch.randn(1, num_heads, num_tokens, head_dim, generator=generator)


def table_of(layout: KVLayout, num_tokens: int, order: Sequence[int] | None = None) -> BlockTable:
    """Room for so many tokens, in blocks that lie as `order` says in one storage full of NaN."""
    count = layout.num_blocks(num_tokens)
    storage = torch.full((count * layout.block_bytes,), 255, dtype=torch.uint8)
    places = [index * layout.block_bytes for index in order or range(count)]
    return BlockTable(layout, [KVBlock(storage, place, None) for place in places])


def plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition in fp64, one query and one head at a time: [1, num_queries, num_heads, d]."""
    _, num_heads, num_queries, head_dim = query.shape
    group_size, num_keys = num_heads // keys.shape[1], keys.shape[2]
    out = torch.empty(1, num_queries, num_heads, head_dim, dtype=torch.float64)
    for head in range(num_heads):
        group = head // group_size
        for index in range(num_queries):
            stop = num_keys - num_queries + index + 1
            start = 0 if window is None else max(0, stop - window)
            seen = slice(start, stop)
            scores = keys[0, group, seen].double() @ query[0, head, index].double()
            scores = scores / math.sqrt(head_dim)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            weights = scores.softmax(0)[: stop - start]
            out[0, index, head] = weights @ values[0, group, seen].double()
    return out


@pytest.mark.parametrize("workspace_bytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_every_sequence_attends_to_its_own_keys(
    window: int | None, softcap: float | None, num_kv_heads: int, workspace_bytes: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    layout = KVLayout((KVLayer(num_kv_heads, HEAD_DIM),), torch.float32, block_size=4)
    orders = ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 2, 4, 1, 3], [1, 2, 3, 4, 0])
    tables = [table_of(layout, 20, order) for order in orders]
    history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in tables]
    # Whole prompts, single tokens, chunks behind a past, and sequences that sit a pass out.
    for lengths in [(5, 1, 0, 9), (1, 1, 12, 4), (3, 0, 1, 1), (1, 1, 1, 1)]:
        parts = [Part(table, [0] * n, 1) for table, n in zip(tables, lengths, strict=True) if n]
        batch = Batch.of(parts)
        total = sum(lengths)
        query = rows(total, NUM_HEADS, generator)
        key, value = (rows(total, num_kv_heads, generator) for _ in range(2))
        out, _ = attend(
            Layer(NUM_HEADS // num_kv_heads),
            query,
            key,
            value,
            None,
            scaling=HEAD_DIM**-0.5,
            sliding_window=window,
            softcap=softcap,
            batch=batch,
            workspace_bytes=workspace_bytes,
        )
        assert out.shape == (1, total, NUM_HEADS, HEAD_DIM)
        for part, own in zip(batch.parts, batch.rows, strict=True):
            past = history[tables.index(part.table)]
            past.append((key[:, :, own], value[:, :, own]))
            keys, values = (torch.cat(side, dim=2) for side in zip(*past, strict=True))
            expected = plain(query[:, :, own], keys, values, window, softcap)
            torch.testing.assert_close(out[:, own].double(), expected, atol=1e-5, rtol=1e-5)
        batch.commit()


@pytest.mark.parametrize("workspace_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("past", [0, 9])
def test_a_sink_is_a_key_without_a_value(
    past: int, window: int | None, workspace_bytes: int
) -> None:
    """Far below, beside and far above the scores."""
    generator = torch.Generator().manual_seed(9)
    table = table_of(LAYOUT, past + 6)
    query = rows(6, NUM_HEADS, generator)
    key, value = (rows(past + 6, NUM_KV_HEADS, generator) for _ in range(2))
    table.write(0, key[:, :, :past], value[:, :, :past])
    table.commit(past)
    sinks = torch.tensor([-200.0, -1.0, 0.0, 0.5, 2.0, 200.0])
    new = (query, key[:, :, past:], value[:, :, past:])
    out, _ = attend(
        Layer(),
        *new,
        None,
        sliding_window=window,
        batch=Batch.of([Part(table, [0] * 6, 1)]),
        workspace_bytes=workspace_bytes,
        s_aux=sinks,
    )
    expected = plain(query, key, value, window, None, sinks)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (8, 1), (4, 4)])
def test_a_single_query_in_16_bits_is_exact_and_the_same_in_any_company(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    """Its heads are computed together; a call for each is the measure."""
    generator = torch.Generator().manual_seed(7)
    layout = KVLayout((KVLayer(num_kv_heads, 64),), dtype)
    pasts = [0, 3, 40, 700]
    query = rows(len(pasts), num_heads, generator, 64).to(dtype)
    key, value = (rows(len(pasts), num_kv_heads, generator, 64).to(dtype) for _ in range(2))
    histories = [
        [rows(past, num_kv_heads, generator, 64).to(dtype) for _ in range(2)] for past in pasts
    ]

    def computed(*indices: int) -> torch.Tensor:
        parts = []
        for index in indices:
            table = table_of(layout, pasts[index] + 1)
            table.write(0, *histories[index])
            table.commit(pasts[index])
            parts.append(Part(table, [0], 1))
        own = list(indices)
        given = (query[:, :, own], key[:, :, own], value[:, :, own])
        module = Layer(num_heads // num_kv_heads)
        return attend(module, *given, None, batch=Batch.of(parts))[0]

    together = computed(0, 1, 2, 3)
    assert torch.equal(together[:, [2, 0]], computed(2, 0))
    for index, (keys, values) in enumerate(histories):
        own = slice(index, index + 1)
        assert torch.equal(together[:, own], computed(index))
        keys = torch.cat([keys, key[:, :, own]], dim=2)
        values = torch.cat([values, value[:, :, own]], dim=2)
        exact = plain(query[:, :, own], keys, values, None, None)
        for_each_head = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, own], keys, values, enable_gqa=True
        ).transpose(1, 2)
        error, theirs = ((one - exact).abs().mean() for one in (together[:, own], for_each_head))
        assert error <= 1.2 * theirs


# --- the workspace


def attended(
    num_heads: int,
    num_kv_heads: int,
    past: int,
    num_queries: int,
    workspace_bytes: int,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, int]:
    """The result, and the most bytes that were allocated beside it, as torch's allocator says."""
    generator = torch.Generator().manual_seed(5)
    layout = KVLayout((KVLayer(num_kv_heads, 16),), dtype)
    table = table_of(layout, past + num_queries)
    query = rows(num_queries, num_heads, generator, 16).to(dtype)
    key, value = (rows(past + num_queries, num_kv_heads, generator, 16).to(dtype) for _ in range(2))
    table.write(0, key[:, :, :past], value[:, :, :past])
    table.commit(past)
    batch = Batch.of([Part(table, [0] * num_queries, 1)])
    kinds = [ProfilerActivity.CPU]
    with torch.inference_mode(), profile(activities=kinds, profile_memory=True) as profiled:
        out, _ = attend(
            Layer(num_heads // num_kv_heads),
            query,
            key[:, :, past:],
            value[:, :, past:],
            None,
            sliding_window=window,
            softcap=softcap,
            batch=batch,
            workspace_bytes=workspace_bytes,
        )
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    changes = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most >= out.nbytes, "nothing was measured"
    return out, most - out.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (300, None), (None, 30.0)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.slow
def test_what_a_call_takes_is_within_its_workspace(
    num_heads: int, num_kv_heads: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    for past, num_queries, kilobytes in (
        (0, 200, 64),
        (0, 256, 128),
        (500, 20, 64),
        (1500, 96, 1024),
        (1500, 1, 64),
        (4000, 100, 4096),
        (4000, 100, 65536),
    ):
        _, num_bytes = attended(
            num_heads, num_kv_heads, past, num_queries, kilobytes << 10, window, softcap, dtype
        )
        assert num_bytes <= kilobytes << 10, (past, num_queries, kilobytes)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (300, None), (None, 30.0)])
@pytest.mark.parametrize(("past", "num_queries"), [(0, 256), (2000, 24), (1000, 1)])
def test_in_chunks_the_result_is_that_of_the_whole(
    past: int, num_queries: int, window: int | None, softcap: float | None
) -> None:
    whole, _ = attended(8, 2, past, num_queries, 1 << 30, window, softcap)
    for kilobytes in (64, 256, 2048):
        part, _ = attended(8, 2, past, num_queries, kilobytes << 10, window, softcap)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


# --- what is handed in


def test_the_mask_is_aligned_to_the_last_key() -> None:
    seen = causal_mask(2, 5, None)[0, 0].int().tolist()
    assert seen == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    seen = causal_mask(2, 5, 2)[0, 0].int().tolist()
    assert seen == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_a_batch_lays_sequences_end_to_end() -> None:
    tables = [table_of(LAYOUT, count) for count in (8, 12, 4)]
    tables[1].commit(7)
    parts = [Part(tables[0], [4, 5, 6], 2), Part(tables[1], [7], 0), Part(tables[2], [8], 1)]
    batch = Batch.of(parts)
    assert batch.token_ids.tolist() == [4, 5, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 2, 7, 0]
    assert [(rows.start, rows.stop) for rows in batch.rows] == [(0, 3), (3, 4), (4, 5)]
    assert batch.logit_rows.tolist() == [1, 2, 4]
    rows_of, addresses = batch.tables()
    assert rows_of.tolist() == [0, 0, 0, 1, 2]
    expected = [[block.address for block in table.blocks] for table in tables]
    assert addresses.tolist() == [one + [0] * (3 - len(one)) for one in expected]
    batch.commit()
    assert [table.num_tokens for table in tables] == [3, 8, 1]


def test_unknown_kinds_of_attention_are_refused() -> None:
    generator = torch.Generator().manual_seed(5)
    query = rows(1, NUM_HEADS, generator)
    key = value = rows(1, NUM_KV_HEADS, generator)
    with pytest.raises(UnsupportedCheckpoint, match="does not hand the batch on"):
        attend(Layer(), query, key, value, None)
    batch = Batch.of([Part(BlockTable(LAYOUT, PrivateSource(LAYOUT).lease(1)), [0], 1)])
    with pytest.raises(UnsupportedCheckpoint, match="biases its attention"):
        attend(Layer(), query, key, value, None, batch=batch, position_bias=torch.zeros(1))
    with pytest.raises(UnsupportedCheckpoint, match="biases its attention"):
        attend(Layer(), query, key, value, torch.zeros(1, 1, 1, 1), batch=batch)
