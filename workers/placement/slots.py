"""How the tensors of a layer lie in a slot, and which reads put them there. Pure.

Owns offsets. Invariants: no two tensors overlap; each begins at a multiple of `ALIGNMENT` bytes, as
one that stays does, since libraries add in another order where it does not; where that allows it, a
byte lies at the same place within a block of `BLOCK` bytes as in its file, with nothing else in
that block that is not read with it, so that whole blocks can be read straight into the slot; what
lies together in both is one read.

    file   ..|....aaaaaaaa|aabbbb..|..        blocks of 4 KiB
    slot     |....aaaaaaaa|aabbbb..|          one read
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from workers.checkpoint.offloaded import OffloadedTensor

BLOCK: Final = 4096
ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class SlotRead:
    """Bytes [begin, begin + num_bytes) of a file go to `offset` of the slot."""

    file: int
    begin: int
    num_bytes: int
    offset: int
    in_blocks: bool
    """Whether all of its first and its last block may be written to."""


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Of one layer, in a slot of `num_bytes` that begins at a multiple of `BLOCK`."""

    num_bytes: int
    tensors: Mapping[str, OffloadedTensor]
    offsets: Mapping[str, int]
    reads: tuple[SlotRead, ...]

    def views(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """The layer's tensors in a slot, uint8 # [num_bytes or more]."""
        return {
            name: slot[offset : offset + self.tensors[name].num_bytes]
            .view(getattr(torch, self.tensors[name].dtype))
            .view(self.tensors[name].shape)
            for name, offset in self.offsets.items()
        }


def slot_layout(tensors: Mapping[str, OffloadedTensor]) -> SlotLayout:
    """Of a layer with these."""
    offsets: dict[str, int] = {}
    reads: list[SlotRead] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: _place(item[1])):
        offset = offsets[name] = _next_offset(reads, end, tensor)
        in_blocks = len(tensor.runs) == 1 and offset % BLOCK == tensor.runs[0].begin % BLOCK
        for run in tensor.runs:
            read = SlotRead(run.file, run.begin, run.num_bytes, offset, in_blocks)
            if reads and _adjoins(reads[-1], read):
                read = _joined(reads.pop(), read)
            reads.append(read)
            offset += run.num_bytes
        end = max(end, offset)
    return SlotLayout(_up(end, BLOCK), dict(tensors), offsets, tuple(reads))


def _place(tensor: OffloadedTensor) -> tuple[int, int, int]:
    """In the order of the files; what is empty last."""
    if not tensor.runs:
        return (1, 0, 0)
    return (0, tensor.runs[0].file, tensor.runs[0].begin)


def _next_offset(reads: list[SlotRead], end: int, tensor: OffloadedTensor) -> int:
    """For a tensor behind `end`: as in its file, if that is possible."""
    if len(tensor.runs) == 1:
        begin = tensor.runs[0].begin
        if reads and reads[-1].file == tensor.runs[0].file:
            last = reads[-1]
            offset = last.offset + begin - last.begin
            if end <= offset < end + BLOCK and not offset % ALIGNMENT:
                return offset
        if not begin % ALIGNMENT:
            return _up(end, BLOCK) + begin % BLOCK
    return _up(end, BLOCK if reads and reads[-1].in_blocks else ALIGNMENT)


def _adjoins(last: SlotRead, read: SlotRead) -> bool:
    begin = last.begin + last.num_bytes
    is_placed_alike = read.offset - last.offset == read.begin - last.begin
    return last.file == read.file and is_placed_alike and begin <= read.begin < begin + BLOCK


def _joined(first: SlotRead, second: SlotRead) -> SlotRead:
    num_bytes = second.begin + second.num_bytes - first.begin
    in_blocks = first.in_blocks and second.in_blocks
    return SlotRead(first.file, first.begin, num_bytes, first.offset, in_blocks)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
