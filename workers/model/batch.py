"""What one forward pass computes: tokens of several sequences, one after the other.

    rows of the batch  | part 0: 5 tokens | 1: one | 2: 3 tokens |

Plain numbers and references to each sequence's keys and values. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from workers.kv.table import BlockTable

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Part:
    """The next tokens of one sequence, and of how many of the last of them logits are wanted."""

    table: BlockTable
    token_ids: Sequence[int]
    num_logits: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of all parts. Made by `Batch.of`."""

    token_ids: Int32s  # [num_rows]
    positions: Int32s  # [num_rows]
    parts: tuple[Part, ...]
    rows: tuple[slice, ...]  # of each part
    logit_rows: Int32s  # [num_logit_rows], in the order of the parts
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    """Masks already made in this pass: all layers of a kind share them."""

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "Batch":
        """A table may occur once, and a part has at least one token."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[slice] = []
        logit_rows: list[int] = []
        for part in parts:
            start, past = len(token_ids), part.table.num_tokens
            token_ids.extend(part.token_ids)
            stop = len(token_ids)
            positions.extend(range(past, past + stop - start))
            rows.append(slice(start, stop))
            logit_rows.extend(range(stop - part.num_logits, stop))
        return cls(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=np.array(positions, dtype=np.int32),
            parts=tuple(parts),
            rows=tuple(rows),
            logit_rows=np.array(logit_rows, dtype=np.int32),
        )

    @property
    def num_rows(self) -> int:
        """Tokens that are computed."""
        return len(self.token_ids)

    def tables(self) -> tuple[Int32s, npt.NDArray[np.int64]]:
        """Of each row its sequence's index [num_rows], and of each sequence the addresses of its
        blocks [num_sequences, the most blocks of any], 0 where it has fewer."""
        counts = [len(part.token_ids) for part in self.parts]
        most = max(len(part.table.blocks) for part in self.parts)
        addresses = np.zeros((len(self.parts), most), dtype=np.int64)
        for row, part in zip(addresses, self.parts, strict=True):
            row[: len(part.table.blocks)] = part.table.addresses
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts), addresses

    def open_blocks(self) -> npt.NDArray[np.int64] | None:
        """Of each sequence the addresses of the open sections that the pass begins and ends in
        [num_sequences, 2, num_open_blocks]; None where nothing is quantized."""
        if not self.parts[0].table.layout.num_open_blocks:
            return None
        return np.stack([part.table.open_addresses(len(part.token_ids)) for part in self.parts])

    def commit(self) -> None:
        """The pass has happened: its tokens belong to their sequences."""
        for part in self.parts:
            part.table.commit(len(part.token_ids))
