"""Which tokens of a distribution may be drawn: `min_p`, `top_k` and `top_p`.

Owns their meaning and their order, vLLM's (v1/sample/sampler.py): `min_p`, then `top_k` of what it
leaves, then `top_p` of what that leaves. Invariant: a row's result depends on that row alone, and
of equally likely tokens the one with the lower id stays. Knows neither temperature nor random
numbers.
"""

from typing import Final

import torch

from workers.messages import SamplingParams
from workers.sampling.pieces import at_least, falling, largest_few, piece_sums, top

_FEW: Final = 128
"""Tokens among which `top_p` is sought before all are looked at."""
_SORTABLE: Final = 4096
"""More are not sorted at once."""
_BUCKET_SHIFT: Final = 19
"""Of a float32's 32 bits, this leaves the exponent and 4 bits of the fraction."""


def allowed(weights: torch.Tensor, maxima: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The tokens that may be drawn, by id. `weights` [vocab_size] float32, not all zero; `maxima`
    those of its pieces."""
    token_ids = None
    if params.min_p > 0:
        token_ids = at_least(weights, maxima, params.min_p * float(maxima.max()))
    if 0 < params.top_k < (weights.numel() if token_ids is None else token_ids.numel()):
        if token_ids is None:
            token_ids = top(weights, params.top_k, maxima)
        else:
            token_ids = token_ids[top(weights[token_ids], params.top_k)]
    if params.top_p == 1:
        return torch.arange(weights.numel()) if token_ids is None else token_ids
    if token_ids is not None:
        return token_ids[_nucleus(weights[token_ids], params.top_p)]
    few = min(_FEW, weights.numel())
    enough = params.top_p * float(piece_sums(weights[None]).sum())
    heaviest, token_ids = largest_few(weights, few, maxima)
    needed = _num_needed(heaviest, 0.0, enough)
    if needed == few:
        return _nucleus(weights, params.top_p)
    if heaviest[needed - 1] == heaviest[needed]:  # among equals their ids decide
        token_ids = falling(weights, top(weights, few, maxima))
    return token_ids[:needed].sort().values


def is_filtered(params: SamplingParams) -> bool:
    """Whether any token could be filtered out."""
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The positions of the heaviest tokens before each of which less than `top_p` of all has been
    gathered, rising. The heaviest always is one of them."""
    if weights.numel() <= _SORTABLE:
        enough = top_p * float(weights.sum(dtype=torch.float64))
        order = weights.argsort(descending=True, stable=True)
        return order[: _num_needed(weights[order], 0.0, enough)].sort().values
    # The bits of positive floats are in the order of the floats: tokens are weighed by buckets of
    # similar weight, and only those of the bucket where enough is reached are sorted.
    buckets = weights.view(torch.int32) >> _BUCKET_SHIFT
    mass = torch.bincount(buckets, weights=weights.double()).flip(0).cumsum(0)
    enough = top_p * float(mass[-1])
    position = int(torch.searchsorted(mass, torch.tensor([enough], dtype=torch.float64)))
    position = min(position, mass.numel() - 1)
    bucket = mass.numel() - 1 - position
    gathered = float(mass[position - 1]) if position else 0.0
    least = torch.tensor([bucket << _BUCKET_SHIFT], dtype=torch.int32).view(torch.float32)
    kept = (weights >= least).nonzero()[:, 0]
    own = falling(weights, kept[buckets[kept] == bucket])
    wanted = torch.ones_like(kept, dtype=torch.bool)
    wanted[torch.searchsorted(kept, own[_num_needed(weights[own], gathered, enough) :])] = False
    return kept[wanted]


def _num_needed(falling_weights: torch.Tensor, gathered: float, enough: float) -> int:
    """How many of these follow while less than `enough` has been gathered, of all one at least."""
    mass = falling_weights.double()
    needed = int((gathered + mass.cumsum(0) - mass < enough).sum())
    return needed if gathered > 0 else max(needed, 1)
