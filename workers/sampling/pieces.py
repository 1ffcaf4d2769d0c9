"""Finding a few elements of long rows without looking at all of them more than once.

Owns the maxima of pieces of a row, from which it can be seen where its largest elements are.
Invariant: results depend on each row alone, and of equal elements the one with the lower index is
the larger.
"""

from typing import Final

import torch

PIECE: Final = 128
_SHORT: Final = 1 << 16
"""Rows up to that length are as quickly looked at whole."""


def piece_maxima(rows: torch.Tensor) -> torch.Tensor:
    """[n, num_pieces] of rows [n, length]; the last piece may be shorter. NaN is the largest."""
    whole = rows.shape[1] // PIECE * PIECE
    maxima = rows[:, :whole].view(len(rows), -1, PIECE).amax(dim=-1) if whole else None
    if whole == rows.shape[1] and maxima is not None:
        return maxima
    rest = rows[:, whole:].amax(dim=-1, keepdim=True)
    return rest if maxima is None else torch.cat((maxima, rest), dim=1)


def piece_sums(rows: torch.Tensor) -> torch.Tensor:
    """As `piece_maxima`, but the sums, in float64."""
    whole = rows.shape[1] // PIECE * PIECE
    sums = rows[:, :whole].view(len(rows), -1, PIECE).sum(dim=-1) if whole else None
    if whole == rows.shape[1] and sums is not None:
        return sums.double()
    rest = rows[:, whole:].sum(dim=-1, keepdim=True)
    return (rest if sums is None else torch.cat((sums, rest), dim=1)).double()


def piece_of(rows: torch.Tensor, pieces: torch.Tensor, missing: float) -> torch.Tensor:
    """Piece `pieces[i]` of each row i, [n, PIECE]; what a short piece lacks is `missing`."""
    indices = pieces[:, None] * PIECE + torch.arange(PIECE)
    found = rows.gather(1, indices.clamp(max=rows.shape[1] - 1))
    if rows.shape[1] % PIECE:
        found = found.masked_fill(indices >= rows.shape[1], missing)
    return found


def largest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's maximum and where it is first, [n] and [n]. NaN is the largest."""
    if rows.dtype == torch.float32:  # as logits are: numpy takes one pass, and wakes no threads
        indices = torch.from_numpy(rows.numpy().argmax(axis=1))
        return rows.gather(1, indices[:, None])[:, 0], indices
    best, pieces = piece_maxima(rows).max(dim=1)
    return best, pieces * PIECE + piece_of(rows, pieces, float("-inf")).argmax(dim=1)


def at_least(row: torch.Tensor, maxima: torch.Tensor, bound: float) -> torch.Tensor:
    """The indices of a row's elements from `bound` up, rising. `maxima`: those of its pieces."""
    pieces = (maxima >= bound).nonzero()[:, 0]
    whole = row.numel() // PIECE
    if pieces.numel() * 4 > maxima.numel() or int(pieces.max()) == whole:
        return (row >= bound).nonzero()[:, 0]
    found = (row[: whole * PIECE].view(-1, PIECE)[pieces] >= bound).nonzero()
    return pieces[found[:, 0]] * PIECE + found[:, 1]


def largest_few(
    row: torch.Tensor, count: int, maxima: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's `count` largest elements, falling, and their indices. Equal ones are in any order,
    and the last may be any of its equals. `maxima`: those of the row's pieces, if they are known.
    """
    if maxima is None or count > maxima.numel() or row.numel() <= _SHORT:
        values, indices = row.topk(count)
        return values, indices
    # So many pieces have an element as large as that: no smaller one can be wanted.
    candidates = at_least(row, maxima, float(maxima.topk(count).values[-1]))
    values, positions = row[candidates].topk(count)
    return values, candidates[positions]


def top(row: torch.Tensor, count: int, maxima: torch.Tensor | None = None) -> torch.Tensor:
    """The indices of a row's `count` largest elements, rising. `maxima` as above."""
    if count >= row.numel():
        return torch.arange(row.numel())
    values, indices = largest_few(row, count + 1, maxima)
    if values[count - 1] > values[count]:
        return indices[:count].sort().values
    least = float(values[count])
    maxima = piece_maxima(row[None])[0] if maxima is None else maxima
    candidates = at_least(row, maxima, least)
    own = row[candidates]
    kept = own > least
    kept[(own == least).nonzero()[: count - int(kept.count_nonzero()), 0]] = True
    return candidates[kept]


def falling(row: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rising indices by their elements, the largest first."""
    return indices[row[indices].argsort(descending=True, stable=True)]
