"""The next token of a sequence from its logits.

Owns the choice, greedy or random. Invariant: it depends on that row of logits, the parameters and
the token's index alone, never on the rest of the batch or on earlier draws, so that any instance
can go on with a sequence. Does not know sequences, models or when to stop.
"""

from collections.abc import Sequence
from typing import Final

import torch

from workers.errors import InvalidLogits
from workers.messages import SamplingParams

_SORTED_FIRST: Final = 1024
"""Tokens among which `top_p` is sought before the whole vocabulary is sorted."""
_MASK: Final = (1 << 64) - 1
_GOLDEN_GAMMA: Final = 0x9E3779B97F4A7C15


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]
) -> list[int | InvalidLogits]:
    """One token for each row of `logits` [num_rows, vocab_size] (any float dtype).

    `indices[i]` counts the tokens that row i's sequence has generated before. A row that can't be
    sampled gives an error in its place, and leaves the others alone.
    """
    if not params:
        return []
    rows = logits.float()
    largest = rows.amax(dim=-1)  # NaN wins, so that one number a row tells all
    greedy = rows.argmax(dim=-1).tolist()
    tokens: list[int | InvalidLogits] = []
    for row, usable in enumerate(largest.isfinite().tolist()):
        if not usable:
            tokens.append(InvalidLogits("the model's logits are not finite"))
        elif params[row].temperature == 0:
            tokens.append(greedy[row])
        else:
            number = uniform(params[row].seed, indices[row])
            tokens.append(_draw(rows[row], params[row], number))
    return tokens


def _draw(row: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Inverse transform sampling in fp64: the token at which the cumulative probability passes
    `number`. `top_k` is applied first, then `top_p` to what it leaves; a filtered distribution is
    ordered from the likeliest down, equal logits by token id."""
    token_ids = None
    weights = ((row.double() - row.max()) / params.temperature).exp()
    if 0 < params.top_k < row.numel():
        token_ids = _likeliest(row, params.top_k)
        weights = weights[token_ids]
    if params.top_p < 1:
        enough = params.top_p * weights.sum()
        if token_ids is None:
            token_ids = _likeliest(row, _SORTED_FIRST)
            if weights[token_ids].sum() < enough:
                token_ids = _likeliest(row, row.numel())
            weights = weights[token_ids]
        # Kept: every token before which less than top_p has been gathered. The first always is.
        kept = int((weights.cumsum(0) - weights < enough).sum())
        weights = weights[: max(kept, 1)]
    cumulative = weights.cumsum(0)
    total = cumulative[-1]
    position = torch.searchsorted(cumulative, total * number, right=True)
    # Rounding may reach the total, and behind the last token that has any weight there is none.
    position = torch.minimum(position, torch.searchsorted(cumulative, total))
    return int(position if token_ids is None else token_ids[position])


def _likeliest(row: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the `count` largest logits, in falling order, equal ones by id.

    Sorting a few candidates takes a fraction of the time of sorting a vocabulary.
    """
    count = min(count, row.numel())
    if count == row.numel():
        return row.argsort(descending=True, stable=True)
    least = row.topk(count, sorted=False).values.min()
    candidates = (row >= least).nonzero()[:, 0]  # by id; more than `count` where logits are equal
    order = row[candidates].argsort(descending=True, stable=True)
    return candidates[order[:count]]


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of the `index`-th generated token.

    The state of a splitmix64 generator after `index + 1` steps, mixed (G. L. Steele, D. Lea and
    C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, variant 13 of
    D. Stafford's mixers). The seed is mixed first, so that no two seeds are shifted copies of one
    stream.
    """
    state = _mix(seed) + (index + 1) * _GOLDEN_GAMMA
    return (_mix(state) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state &= _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
