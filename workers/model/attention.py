"""Attention of a ragged batch: each sequence's queries against that sequence's keys, exactly.

Invariants: a sequence's queries meet its own keys only; what a call takes beyond its arguments and
result, scores and copied keys included, stays within the workspace, however long the sequence (but
at least one query meets one key at a time, whatever they take); for a sequence alone that fits the
workspace the call is the one that transformers' own `sdpa` makes, so that the bits agree, but for a
single query in 16 bits on the processor. Does not know weights, scheduling or sampling.
"""

from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from workers.errors import UnsupportedCheckpoint
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part

DEFAULT_WORKSPACE_BYTES: Final = 256 << 20
_FP32_BYTES: Final = 4
_KEY_CHUNK: Final = 1024

# On Hopper torch would let cuDNN compute attention, which plans anew for every number of keys (some
# 30 ms each) and keeps the plans for ever; a sequence has another number of keys at each token.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    batch: Batch | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values to each sequence's blocks, then attend to all that is in them.

    `s_aux` [num_heads] are attention sinks: the score of one more key of each head, whose value is
    zero. Returns [1, num_tokens, num_heads, head_dim]. Raises `UnsupportedCheckpoint` for what the
    plain formula does not cover, and `OutOfKVMemory`.
    """
    if batch is None:
        raise UnsupportedCheckpoint(f"{type(module).__name__} does not hand the batch on")
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedCheckpoint(f"{type(module).__name__} biases its attention scores")
    layer: int = module.layer_idx  # type: ignore[assignment]
    results: list[torch.Tensor] = []
    for part, rows in zip(batch.parts, batch.rows, strict=True):
        part.table.write(layer, key[:, :, rows], value[:, :, rows])
        queries = query[:, :, rows]
        copies = _copies(queries, key)
        if (
            softcap is None
            and s_aux is None
            and copies * _copied_bytes(key, part, sliding_window) <= workspace_bytes // 2
        ):
            results += _by_queries(
                module, batch, part.table, layer, queries, scaling, sliding_window, workspace_bytes
            )
        else:
            results.append(
                _by_queries_and_keys(
                    part.table,
                    layer,
                    queries,
                    key,
                    scaling,
                    sliding_window,
                    softcap,
                    s_aux,
                    workspace_bytes,
                )
            )
    return (results[0] if len(results) == 1 else torch.cat(results, dim=1)), None


def causal_mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device | None = None
) -> torch.Tensor:
    """Which key each query may see, where the last query is as far on as the last key.

    Returns bool [1, 1, num_queries, num_keys]: true for a query's own key and the earlier ones,
    of which `window` counts the nearest, the own one included. Made on `device`, where a copy to it
    would wait for all that it has been told to do.
    """
    return _visible(num_keys - num_queries, num_queries, 0, num_keys, window, device)[None, None]


# --- all keys at once, some queries at a time


def _by_queries(
    module: torch.nn.Module,
    batch: Batch,
    table: BlockTable,
    layer: int,
    queries: torch.Tensor,
    scaling: float | None,
    window: int | None,
    workspace_bytes: int,
) -> list[torch.Tensor]:
    """Parts [1, some queries, num_heads, head_dim] of the result, in order."""
    _, num_heads, num_queries, _ = queries.shape
    past = table.num_tokens
    seen_from = _first_key(past, window)
    keys, values = table.read(layer, seen_from, past + num_queries)
    # A score in fp32, the mask, and the mask as numbers, which is what a kernel makes of it.
    per_query = keys.shape[2] * (num_heads * _FP32_BYTES + 1 + queries.element_size())
    left = workspace_bytes - _copies(queries, keys) * (keys.nbytes + values.nbytes)
    step = max(1, left // per_query)
    results = []
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        first = _first_key(past + start, window) - seen_from
        last = past + stop - seen_from
        num_keys = last - first
        mask = None
        # At exactly the window's length the mask hides nothing, but transformers makes one, and a
        # mask selects another kernel.
        hides = window if window is not None and past + stop >= window else None
        if hides is None and stop - start == 1 and _copies_for_each_head(queries, keys):
            results.append(_one_query(queries[:, :, start:stop], keys, values, scaling))
            continue
        if hides is not None or 1 < stop - start < num_keys:
            mask = _mask(batch, stop - start, num_keys, hides, queries.device)
        result, _ = sdpa_attention_forward(
            module,
            queries[:, :, start:stop],
            keys[:, :, first:last],
            values[:, :, first:last],
            mask,
            scaling=scaling,
            is_causal=True,
        )
        results.append(result)
    return results


def _copies_for_each_head(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether torch arranges keys and values anew for each head that reads them: on the processor,
    in 16 bits, which then takes longer than all else."""
    shared = queries.shape[1] > keys.shape[1]
    return shared and queries.device.type == "cpu" and queries.element_size() == 2


def _one_query(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[1, 1, num_heads, head_dim] for one that sees all of `keys`: the heads that share a key head
    are as many queries of that one. Rounds as the call for each head does, not always alike."""
    _, num_heads, _, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    by_group = query.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    result = scaled_dot_product_attention(by_group, keys, values, scale=scaling)
    return result.reshape(1, 1, num_heads, values.shape[-1])


def _mask(
    batch: Batch, num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> torch.Tensor:
    shape = (num_queries, num_keys, window)
    mask = batch.masks.get(shape)
    if mask is None:
        batch.masks.clear()  # one at a time is within the workspace
        mask = causal_mask(num_queries, num_keys, window, device)
        batch.masks[shape] = mask
    return mask


# --- some queries against some keys at a time


def _by_queries_and_keys(
    table: BlockTable,
    layer: int,
    queries: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    workspace_bytes: int,
) -> torch.Tensor:
    """softmax(cap(q k^T * scaling)) v in fp32, where a soft cap is cap(x) = softcap *
    tanh(x / softcap) (Gemma 2, arXiv:2408.00118 §2). A sink is in the softmax from the beginning,
    with a value of zero (gpt-oss, arXiv:2508.10925 §2). The softmax is gathered over chunks of keys
    with its running maximum and sum (M. Milakov and N. Gimelshein, "Online normalizer calculation
    for softmax", arXiv:1805.02867).

    Returns [1, num_queries, num_heads, head_dim] in the dtype of `queries`.
    """
    _, num_heads, num_queries, head_dim = queries.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scaling is None else scaling
    past = table.num_tokens
    key_chunk, query_chunk = _chunks(num_heads, num_kv_heads, head_dim, workspace_bytes)
    out = queries.new_empty(1, num_queries, num_heads, head_dim)
    for start in range(0, num_queries, query_chunk):
        stop = min(start + query_chunk, num_queries)
        count = stop - start
        part = queries[0, :, start:stop].float().reshape(num_kv_heads, group * count, head_dim)
        if sinks is None:
            highest = part.new_full((num_kv_heads, group * count, 1), float("-inf"))
            total = torch.zeros_like(highest)
        else:
            highest = sinks.float().repeat_interleave(count).view(num_kv_heads, group * count, 1)
            total = torch.ones_like(highest)
        gathered = torch.zeros_like(part)
        end = past + stop
        for first in range(_first_key(past + start, window), end, key_chunk):
            last = min(first + key_chunk, end)
            keys, values = table.read(layer, first, last)
            scores = part @ keys[0].float().transpose(1, 2)
            if softcap is None:
                scores.mul_(scale)
            else:
                scores.mul_(scale / softcap).tanh_().mul_(softcap)
            hidden = ~_visible(past + start, count, first, last, window, queries.device)
            scores.view(num_kv_heads, group, count, -1).masked_fill_(hidden, float("-inf"))
            new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
            # A query that has met no key of its own yet has no maximum: nothing is gathered.
            base = new_highest.nan_to_num(neginf=0.0)
            scores.sub_(base).exp_()
            shrink = (highest - base).exp_()
            total = total * shrink + scores.sum(-1, keepdim=True)
            gathered = gathered * shrink + scores @ values[0].float()
            highest = new_highest
        result = (gathered / total).view(num_heads, count, head_dim)
        out[0, start:stop] = result.transpose(0, 1).to(out.dtype)
    return out


def _chunks(
    num_heads: int, num_kv_heads: int, head_dim: int, workspace_bytes: int
) -> tuple[int, int]:
    """How many keys and how many queries to take at a time: half the workspace for keys, values and
    their fp32 copies, half for scores, queries and what is gathered."""
    half = workspace_bytes // 2
    per_key = 2 * num_kv_heads * head_dim * 3 * _FP32_BYTES
    num_keys = max(1, min(_KEY_CHUNK, half // per_key))
    per_query = num_heads * (2 * num_keys + 4 * head_dim + 8) * _FP32_BYTES + num_keys
    return num_keys, max(1, half // per_query)


def _visible(
    position: int,
    count: int,
    first: int,
    last: int,
    window: int | None,
    device: torch.device | None,
) -> torch.Tensor:
    """bool [count, last - first]: which of the keys each query may see."""
    query_positions = torch.arange(position, position + count, device=device)[:, None]
    key_positions = torch.arange(first, last, device=device)[None, :]
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    return mask


def _first_key(position: int, window: int | None) -> int:
    """The first key that the query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def _copies(queries: torch.Tensor, key: torch.Tensor) -> int:
    """How often keys and values are there: where several heads share them, transformers repeats
    them for each head under a mask, unless there is only one query."""
    group = queries.shape[1] // key.shape[1]
    return 1 if group == 1 or queries.shape[2] == 1 else 1 + group


def _copied_bytes(key: torch.Tensor, part: Part, window: int | None) -> int:
    """Bytes of all keys and values that the queries of this part see."""
    past = part.table.num_tokens
    num_keys = past + len(part.token_ids) - _first_key(past, window)
    _, num_kv_heads, _, head_dim = key.shape
    return 2 * num_keys * num_kv_heads * head_dim * key.element_size()
