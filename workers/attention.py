"""Attention of a ragged batch: each sequence's queries against that sequence's keys, exactly.

Owns the batch that a forward pass takes, and the function that transformers' models call under the
name `onecopy`. Invariant: a sequence's queries meet its own keys only, and for a sequence alone the
call is the one that transformers' own `sdpa` makes, so that the bits agree. Does not know weights,
scheduling or sampling.

    rows of the batch  | sequence 0: 5 tokens | 1: one | 2: 3 tokens |
                       [start             stop)[   )    [         stop)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from workers.errors import UnsupportedCheckpoint
from workers.kv_cache import KVCache

NAME: Final = "onecopy"
SOFTCAP_SCORES_BYTES: Final = 64 << 20
"""The most that the scores of one soft-capped attention call may take."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of a batch: the tokens of one sequence that follow those in `cache`."""

    cache: KVCache
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes: tokens of several sequences, one after the other."""

    input_ids: torch.Tensor  # [1, num_tokens] int64
    position_ids: torch.Tensor  # [1, num_tokens] int64
    spans: tuple[Span, ...]
    logit_rows: torch.Tensor  # [num_logit_rows] int64
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    """Masks already made in this pass: all layers of a kind share them."""

    @classmethod
    def of(
        cls,
        parts: Sequence[tuple[KVCache, Sequence[int], bool]],
        device: torch.device | None = None,
    ) -> "Batch":
        """Each part: a sequence's cache, its next tokens, and whether the logits of the last of
        them are wanted. A cache may occur once, and a part has at least one token. `device` is the
        model's."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        spans: list[Span] = []
        logit_rows: list[int] = []
        for cache, token_ids, wants_logits in parts:
            start, past = len(input_ids), cache.num_tokens
            input_ids.extend(token_ids)
            position_ids.extend(range(past, past + len(token_ids)))
            spans.append(Span(cache, start, len(input_ids)))
            if wants_logits:
                logit_rows.append(len(input_ids) - 1)
        return cls(
            input_ids=torch.tensor([input_ids], device=device),
            position_ids=torch.tensor([position_ids], device=device),
            spans=tuple(spans),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        )


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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Append the new keys and values to each sequence's cache, then attend to all that is in it.

    Returns [1, num_tokens, num_heads, head_dim]. Raises `UnsupportedCheckpoint` for what the plain
    formula does not cover, and `OutOfKVMemory`.
    """
    if batch is None:
        raise UnsupportedCheckpoint(f"{type(module).__name__} does not hand the batch on")
    if attention_mask is not None or any(
        kwargs.get(name) is not None for name in ("s_aux", "position_bias")
    ):
        raise UnsupportedCheckpoint(f"{type(module).__name__} biases its attention scores")
    layer: int = module.layer_idx  # type: ignore[assignment]
    results: list[torch.Tensor] = []
    for span in batch.spans:
        rows = slice(span.start, span.stop)
        keys, values = span.cache.append(layer, key[:, :, rows], value[:, :, rows])
        queries = query[:, :, rows]
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        window = None
        if sliding_window is not None and num_keys >= sliding_window:
            # Older keys are out of every query's sight. At exactly the window's length the mask
            # hides nothing, but transformers makes one, and a mask selects another kernel.
            window = sliding_window
            num_keys = min(num_keys, sliding_window - 1 + num_queries)
            keys, values = keys[:, :, -num_keys:], values[:, :, -num_keys:]
        mask = None
        if window is not None or 1 < num_queries < num_keys:
            mask = _mask(batch, num_queries, num_keys, window)
        if softcap is not None:
            if mask is None and num_queries > 1:
                mask = _mask(batch, num_queries, num_keys, None)
            results.append(_soft_capped(queries, keys, values, mask, scaling, softcap))
        else:
            result, _ = sdpa_attention_forward(
                module, queries, keys, values, mask, scaling=scaling, is_causal=True
            )
            results.append(result)
    return (results[0] if len(results) == 1 else torch.cat(results, dim=1)), None


def _mask(batch: Batch, num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
    shape = (num_queries, num_keys, window)
    mask = batch.masks.get(shape)
    if mask is None:
        mask = causal_mask(num_queries, num_keys, window).to(batch.input_ids.device)
        batch.masks[shape] = mask
    return mask


def causal_mask(num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
    """Which key each query may see, where the last query is as far on as the last key.

    Returns bool [1, 1, num_queries, num_keys]: true for a query's own key and the earlier ones,
    of which `window` counts the nearest, the own one included.
    """
    query_positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
    key_positions = torch.arange(num_keys)[None, :]
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    return mask[None, None]


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """softmax(softcap * tanh(q k^T * scaling / softcap)) v in fp32 (Gemma 2, arXiv:2408.00118 §2),
    some queries at a time, so that the scores stay within `SOFTCAP_SCORES_BYTES`.

    Returns [1, num_queries, num_heads, head_dim] in the dtype of `query`.
    """
    _, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    scale = head_dim**-0.5 if scaling is None else scaling
    grouped = query.float().view(num_kv_heads, num_heads // num_kv_heads, num_queries, head_dim)
    keys, values = key.float().transpose(2, 3)[0], value.float()[0]
    out = query.new_empty(1, num_queries, num_heads, head_dim)
    step = max(1, SOFTCAP_SCORES_BYTES // (num_heads * num_keys * 4))
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        part = grouped[:, :, start:stop].flatten(1, 2)  # [num_kv_heads, group * queries, head_dim]
        scores = (part @ keys).mul_(scale / softcap).tanh_().mul_(softcap)
        if mask is not None:
            by_query = scores.view(num_kv_heads, -1, stop - start, num_keys)
            by_query.masked_fill_(~mask[:, :, start:stop], float("-inf"))
        result = scores.softmax(dim=-1) @ values
        result = result.view(num_heads, stop - start, head_dim)
        out[0, start:stop] = result.transpose(0, 1).to(query.dtype)
    return out


AttentionInterface.register(NAME, attend)
