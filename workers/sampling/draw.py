"""Tokens drawn from rows of logits.

Owns temperature and the draw. Invariant: a token depends on its row, its parameters and its number
alone, whatever rows are beside it: only operations that treat every row by itself, or round every
element correctly, are used on several rows at once.
"""

from collections.abc import Sequence
from typing import Final

import torch

from workers.messages import SamplingParams
from workers.sampling.filters import allowed, is_filtered
from workers.sampling.pieces import PIECE, piece_maxima, piece_of, piece_sums

LEAST_TEMPERATURE: Final = 1e-5
"""Below that the choice is greedy, as in vLLM."""
_LARGEST_QUOTIENT: Final = 1e37
"""Beyond, logits by temperature would overflow, and their maximum is taken from them first."""


def draw(
    rows: torch.Tensor,
    best: torch.Tensor,
    params: Sequence[SamplingParams],
    numbers: Sequence[float],
) -> list[int]:
    """A token of each row, by inverse transform sampling: the first, by token id, at which the sum
    of the probabilities passes the row's number in [0, 1).

    `rows` [n, vocab_size] float32 logits, with finite maxima `best` [n]; overwritten. Temperature
    comes before the filters, as in vLLM.
    """
    temperatures = torch.tensor([one.temperature for one in params], dtype=torch.float32)
    if float((best.abs() / temperatures).max()) > _LARGEST_QUOTIENT:
        rows.sub_(best[:, None])
    torch.softmax(rows.div_(temperatures[:, None]), dim=-1, out=rows)
    filtered = [index for index, one in enumerate(params) if is_filtered(one)]
    if not filtered:
        return _pick_of_all(rows, _column(numbers)).tolist()
    tokens = [0] * len(params)
    maxima = piece_maxima(rows)
    for index in filtered:
        row = rows[index]
        token_ids = allowed(row, maxima[index], params[index])
        position = _pick(row[token_ids].double()[None], _column(numbers[index : index + 1]))
        tokens[index] = int(token_ids[position])
    for index in set(range(len(params))).difference(filtered):
        one = slice(index, index + 1)
        tokens[index] = int(_pick_of_all(rows[one], _column(numbers[one])))
    return tokens


def _column(numbers: Sequence[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def _pick(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The positions [n] where the sums of `weights` [n, length] pass `numbers` [n, 1] of them."""
    cumulative = weights.cumsum(1)
    return _passing(cumulative, cumulative[:, -1:] * numbers)


def _pick_of_all(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`_pick` over a vocabulary: by pieces, then within the piece."""
    cumulative = piece_sums(weights).cumsum(1)
    wanted = cumulative[:, -1:] * numbers
    pieces = _passing(cumulative, wanted)
    below = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, pieces[:, None])
    within = piece_of(weights, pieces, 0.0).double().cumsum(1)
    return pieces * PIECE + _passing(within, wanted - below)


def _passing(cumulative: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    position = torch.searchsorted(cumulative, wanted, right=True)
    # Rounding may reach the total, and behind the last token that has any weight there is none.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(position, last)[:, 0]
