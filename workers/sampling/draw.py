"""One token drawn from one row of logits.

Owns temperature, `min_p`, `top_k` and `top_p`. Invariant: the token depends on the row, the
parameters and the number alone. Rows are computed one by one: in one operation over several rows,
how a row is rounded would depend on where in the batch it lies.
"""

from typing import Final

import torch

from workers.messages import SamplingParams

_BLOCK: Final = 512
"""Weights are added up by blocks, and one by one only in the block where the number falls."""


def draw(row: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Inverse transform sampling: the token at which the cumulative probability passes `number`.

    The order of the filters is vLLM's (v1/sample/sampler.py): temperature, then `min_p`, then
    `top_k` of what it leaves, then `top_p` of what that leaves. A distribution that `top_k` or
    `top_p` has filtered is ordered from the likeliest down, equal logits by token id; any other by
    token id. `row` is float32, its maximum finite.
    """
    weights = row - row.max()
    weights = weights.div_(params.temperature).exp_()  # the likeliest has 1
    token_ids = None
    if params.min_p > 0:
        token_ids = (weights >= params.min_p).nonzero()[:, 0]
    if 0 < params.top_k < (row.numel() if token_ids is None else token_ids.numel()):
        token_ids = _within(row, token_ids, params.top_k)
    if params.top_p < 1:
        token_ids = _nucleus(row, weights, token_ids, params.top_p)
    if token_ids is None:
        return _pick_of_all(weights, number)
    return int(token_ids[_pick(weights[token_ids], number)])


def likeliest(row: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the `count` largest logits, in falling order, equal ones by id.

    Sorting a few candidates takes a fraction of the time of sorting a vocabulary.
    """
    count = min(count, row.numel())
    if count == row.numel():
        return row.argsort(descending=True, stable=True)
    least = row.topk(count, sorted=False).values.min()
    candidates = (row >= least).nonzero()[:, 0]  # by id; more than `count` where logits are equal
    return _ordered(row, candidates)[:count]


def _within(row: torch.Tensor, token_ids: torch.Tensor | None, count: int) -> torch.Tensor:
    """`likeliest` among `token_ids`, which are in rising order."""
    if token_ids is None:
        return likeliest(row, count)
    return token_ids[likeliest(row[token_ids], count)]


def _ordered(row: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return token_ids[row[token_ids].argsort(descending=True, stable=True)]


def _nucleus(
    row: torch.Tensor, weights: torch.Tensor, token_ids: torch.Tensor | None, top_p: float
) -> torch.Tensor:
    """The likeliest tokens before each of which less than `top_p` has been gathered. The first
    always is one of them."""
    if token_ids is None:
        total = float(weights.sum(dtype=torch.float64))
        # All that are lighter than this weigh less than 1 - top_p together: none can be needed.
        least = (1 - top_p) * total / weights.numel()
        token_ids = (weights >= min(least, 1.0)).nonzero()[:, 0]
    else:
        total = float(weights[token_ids].sum(dtype=torch.float64))
    token_ids = _ordered(row, token_ids)
    mass = weights[token_ids].double()
    kept = int((mass.cumsum(0) - mass < top_p * total).sum())
    return token_ids[: max(kept, 1)]


def _pick(weights: torch.Tensor, number: float) -> int:
    """The position where the sum of the weights, from the first on, passes `number` of them."""
    cumulative = weights.double().cumsum(0)
    total = cumulative[-1:]
    position = torch.searchsorted(cumulative, total * number, right=True)
    # Rounding may reach the total, and behind the last token that has any weight there is none.
    return int(torch.minimum(position, torch.searchsorted(cumulative, total)))


def _pick_of_all(weights: torch.Tensor, number: float) -> int:
    """`_pick` over a vocabulary, most of which is only added up."""
    whole = weights.numel() // _BLOCK * _BLOCK
    sums = weights[:whole].view(-1, _BLOCK).sum(dim=1)
    sums = torch.cat((sums, weights[whole:].sum().view(1)))
    cumulative = sums.double().cumsum(0)
    block = _pick(sums, number)
    below = float(cumulative[block - 1]) if block else 0.0
    within = weights[block * _BLOCK : (block + 1) * _BLOCK].double().cumsum(0)
    left = torch.tensor([float(cumulative[-1]) * number - below], dtype=torch.float64)
    position = torch.searchsorted(within, left, right=True)
    return block * _BLOCK + int(torch.minimum(position, torch.searchsorted(within, within[-1:])))
