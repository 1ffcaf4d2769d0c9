"""Attention of a ragged batch against the plain formula, sequence by sequence."""

import math

import pytest
import torch

from workers import attention
from workers.attention import Batch, attend, causal_mask
from workers.errors import UnsupportedCheckpoint
from workers.kv_cache import KVCache, KVLayer, KVLayout

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8
LAYOUT = KVLayout((KVLayer(NUM_KV_HEADS, HEAD_DIM),), torch.float32)


class Layer(torch.nn.Module):
    """What `attend` reads of a transformers attention module."""

    layer_idx = 0
    num_key_value_groups = NUM_HEADS // NUM_KV_HEADS
    is_causal = True


def rows(num_tokens: int, num_heads: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, num_heads, num_tokens, HEAD_DIM, generator=generator)


def plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The definition in fp64, one query and one head at a time: [1, num_queries, num_heads, d]."""
    num_queries, num_keys = query.shape[2], keys.shape[2]
    out = torch.empty(1, num_queries, NUM_HEADS, HEAD_DIM, dtype=torch.float64)
    for head in range(NUM_HEADS):
        group = head // (NUM_HEADS // NUM_KV_HEADS)
        for index in range(num_queries):
            stop = num_keys - num_queries + index + 1
            start = 0 if window is None else max(0, stop - window)
            seen = slice(start, stop)
            scores = keys[0, group, seen].double() @ query[0, head, index].double()
            scores = scores / math.sqrt(HEAD_DIM)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            out[0, index, head] = scores.softmax(0) @ values[0, group, seen].double()
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_every_sequence_attends_to_its_own_keys(window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    caches = [KVCache(LAYOUT, 64) for _ in range(4)]
    history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in caches]
    # Whole prompts, single tokens, chunks behind a past, and sequences that sit a pass out.
    for lengths in [(5, 1, 0, 9), (1, 1, 12, 4), (3, 0, 1, 1), (1, 1, 1, 1)]:
        parts = [(cache, [0] * n, True) for cache, n in zip(caches, lengths, strict=True) if n > 0]
        batch = Batch.of(parts)
        total = sum(lengths)
        query = rows(total, NUM_HEADS, generator)
        key, value = (rows(total, NUM_KV_HEADS, generator) for _ in range(2))
        out, _ = attend(
            Layer(),
            query,
            key,
            value,
            None,
            scaling=HEAD_DIM**-0.5,
            sliding_window=window,
            softcap=softcap,
            batch=batch,
        )
        assert out.shape == (1, total, NUM_HEADS, HEAD_DIM)
        for span in batch.spans:
            own = slice(span.start, span.stop)
            past = history[caches.index(span.cache)]
            past.append((key[:, :, own], value[:, :, own]))
            keys, values = (torch.cat(side, dim=2) for side in zip(*past, strict=True))
            expected = plain(query[:, :, own], keys, values, window, softcap)
            torch.testing.assert_close(out[:, own].double(), expected, atol=1e-5, rtol=1e-5)
            span.cache.commit(span.stop - span.start)


def test_soft_capped_scores_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    query = rows(13, NUM_HEADS, generator)
    key, value = (rows(13, NUM_KV_HEADS, generator) for _ in range(2))

    def run() -> torch.Tensor:
        batch = Batch.of([(KVCache(LAYOUT, 64), [0] * 13, True)])
        return attend(Layer(), query, key, value, None, softcap=3.0, batch=batch)[0]

    whole = run()
    for num_queries in (1, 4):
        budget = num_queries * NUM_HEADS * 13 * 4
        monkeypatch.setattr(attention, "SOFTCAP_SCORES_BYTES", budget)
        torch.testing.assert_close(run(), whole, atol=1e-6, rtol=1e-6)


def test_the_mask_is_aligned_to_the_last_key() -> None:
    seen = causal_mask(2, 5, None)[0, 0].int().tolist()
    assert seen == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    seen = causal_mask(2, 5, 2)[0, 0].int().tolist()
    assert seen == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_a_batch_lays_sequences_end_to_end() -> None:
    caches = [KVCache(LAYOUT, 64) for _ in range(3)]
    caches[1].commit(7)
    batch = Batch.of(
        [(caches[0], [4, 5, 6], False), (caches[1], [7], True), (caches[2], [8], True)]
    )
    assert batch.input_ids.tolist() == [[4, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 7, 0]]
    assert [(span.start, span.stop) for span in batch.spans] == [(0, 3), (3, 4), (4, 5)]
    assert batch.logit_rows.tolist() == [3, 4]


def test_unknown_kinds_of_attention_are_refused() -> None:
    generator = torch.Generator().manual_seed(5)
    query = rows(1, NUM_HEADS, generator)
    key = value = rows(1, NUM_KV_HEADS, generator)
    with pytest.raises(UnsupportedCheckpoint, match="does not hand the batch on"):
        attend(Layer(), query, key, value, None)
    batch = Batch.of([(KVCache(LAYOUT, 64), [0], True)])
    with pytest.raises(UnsupportedCheckpoint, match="biases its attention"):
        attend(Layer(), query, key, value, None, batch=batch, s_aux=torch.zeros(NUM_HEADS))
    with pytest.raises(UnsupportedCheckpoint, match="biases its attention"):
        attend(Layer(), query, key, value, torch.zeros(1, 1, 1, 1), batch=batch)
