"""The plan: where each tensor of a checkpoint lies in its one segment. Pure.

Owns offsets. Invariants: extents do not overlap, begin at multiples of `ALIGNMENT` bytes, and their
order is the checkpoint's. Knows nothing of files or of memory.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from allocator import ALIGNMENT, Manifest, TensorEntry, manifest_bytes
from workers.checkpoint.formats.checkpoint import SourceTensor

FORMAT_VERSION = 2
"""Goes up whenever the same checkpoint would be laid out differently."""


@dataclass(frozen=True)
class Plan:
    """`num_bytes` bytes hold all tensors; the manifest is written behind them."""

    manifest: Manifest
    num_bytes: int

    @property
    def segment_bytes(self) -> int:
        """All that the segment holds."""
        return self.num_bytes + manifest_bytes(self.manifest)


def make_plan(tensors: Iterable[SourceTensor], metadata: Mapping[str, str]) -> Plan:
    """Offsets for all tensors, contiguous and row-major each."""
    entries: dict[str, TensorEntry] = {}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = TensorEntry(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            stride=contiguous_stride(tensor.shape),
            offset=offset,
            num_bytes=tensor.num_bytes,
        )
        offset += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
    manifest = Manifest(version=FORMAT_VERSION, tensors=entries, metadata=dict(metadata))
    return Plan(manifest, offset)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, as torch gives them: a size of 0 counts as 1."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)
