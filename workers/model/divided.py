"""A pass's sequences divided among ranks, each of which has the whole model.

Owns who computes which, and how their logits come together. Invariants: all ranks divide alike, by
the pass alone; all of them end it with the same bits, or all with an error. A sequence may go from
one rank to another between any two passes: keys and values are where all ranks map them.
"""

from collections.abc import Callable, Sequence

import torch

from workers.errors import PartFailed, RankError
from workers.model.batch import Batch
from workers.ranks import Ranks


def division(num_tokens: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each part, so that none has much more to compute than another: the largest
    first, each to who has least."""
    load = [0] * num_ranks
    ranks = [0] * len(num_tokens)
    for index in sorted(range(len(num_tokens)), key=lambda index: -num_tokens[index]):
        rank = load.index(min(load))
        ranks[index] = rank
        load[rank] += num_tokens[index]
    return ranks


class Divided:
    """One rank's side."""

    def __init__(self, ranks: Ranks, vocab_size: int) -> None:
        self._ranks = ranks
        self._vocab_size = vocab_size

    def forward(self, batch: Batch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        """All logits of the batch, of which this rank computes its part by `compute`. Raises
        RankError; where a part can't be computed what that raised, on other ranks PartFailed."""
        owners = division([len(part.token_ids) for part in batch.parts], self._ranks.num_ranks)
        own = [rank == self._ranks.rank for rank in owners]
        parts = [part for part, is_own in zip(batch.parts, own, strict=True) if is_own]
        logits, error = None, None
        try:
            logits = compute(Batch.of(parts)) if parts else None
        except RankError:
            raise
        except Exception as raised:  # noqa: BLE001 - all ranks must hear of it, whatever it is
            error = raised
        self._agree(error)
        whole = torch.zeros(len(batch.logit_rows), self._vocab_size)
        if logits is not None and len(logits):
            counts = torch.tensor([part.num_logits for part in batch.parts])
            whole[torch.tensor(own).repeat_interleave(counts)] = logits.to("cpu", torch.float32)
        return self._ranks.sum(whole)

    def _agree(self, error: Exception | None) -> None:
        failed = torch.zeros(self._ranks.num_ranks)
        failed[self._ranks.rank] = float(error is not None)
        failed = self._ranks.sum(failed)
        if error is not None:
            raise error
        if failed.any():
            rank = int(failed.argmax())
            raise PartFailed(f"rank {rank} could not compute its part of the pass: see the log")
