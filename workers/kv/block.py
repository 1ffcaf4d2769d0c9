"""A block in memory, whoever gave the memory.

Invariant: a sealed block is never written again, by anybody.
"""

from dataclasses import dataclass, field

import torch

from allocator import Block, Lease


@dataclass(eq=False, slots=True)
class KVBlock:
    """Memory for `block_size` tokens of one sequence, or of several that begin alike."""

    storage: torch.Tensor = field(repr=False)
    """uint8 [num_bytes of all that this memory was cut from], most of which may not be touched."""
    offset: int
    """Where in `storage` the block begins, in bytes."""
    held: Lease | Block | None
    """What the allocator knows of it; None for memory of this process alone."""
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.storage.data_ptr() + self.offset

    @property
    def is_sealed(self) -> bool:
        """Whether others may map it, so that it is read-only."""
        return isinstance(self.held, Block)

    @property
    def is_private(self) -> bool:
        """Whether it counts for this process and not for the pool."""
        return self.held is None

    @property
    def is_usable(self) -> bool:
        """Whether its bytes are still mapped; an allocator that ends in the wrong moment may take a
        block that was being sealed."""
        return self.held is None or self.held.is_held
