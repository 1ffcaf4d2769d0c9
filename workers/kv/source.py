"""Where blocks come from: the allocator's pool, and this process's own memory while none answers.

Owns the translation between the allocator's words and blocks. Invariants: what the pool refuses is
`OutOfKVMemory`, and nothing changed then; an allocator that is gone is `PoolGone`, and what is held
stays usable; where others hold the room and are at work it is `PoolTaken`. Does not know sequences.
"""

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from allocator import (
    AllocatorError,
    Block,
    Client,
    Lease,
    OutOfDeviceMemory,
    QuotaExceeded,
    RoomTaken,
)
from allocator.messages import MAX_BATCH
from workers.errors import OutOfKVMemory
from workers.kv.block import KVBlock
from workers.kv.layout import KVLayout

log = logging.getLogger("onecopy.instance")

PRIVATE_LIMIT_BYTES: Final = 256 << 20
"""What blocks of this process alone may take while no allocator answers."""


class PoolGone(OutOfKVMemory):
    """No allocator answers, for now."""


class PoolTaken(OutOfKVMemory):
    """There would be room, but other instances hold it, and are at work."""


@dataclass(frozen=True)
class Pressure:
    """What others want of this instance: `surplus_bytes` beyond its equal part, and whatever it
    holds for sequences that came after `older_since_ms`, where that is not 0."""

    surplus_bytes: int
    older_since_ms: int


_NO_PRESSURE: Final = Pressure(0, 0)


class PoolSource:
    """Blocks of the common pool."""

    def __init__(self, client: Client, layout: KVLayout) -> None:
        self._client = client
        self._layout = layout

    def lease(self, count: int, alone_since_ms: int = 0) -> list[KVBlock]:
        """`count` writable blocks: all, or none. `alone_since_ms`: they are for the only sequence
        that this instance computes, which came then. Raises `OutOfKVMemory`, `PoolTaken`,
        `PoolGone`."""
        blocks: list[KVBlock] = []
        try:
            while len(blocks) < count:
                part = min(count - len(blocks), MAX_BATCH)
                leases = self._client.lease_many(
                    self._layout.block_bytes, part, alone_since_ms=alone_since_ms
                )
                blocks += [_block(lease) for lease in leases]
        except RoomTaken as error:
            self.release(blocks)
            raise PoolTaken(str(error)) from error
        except (OutOfDeviceMemory, QuotaExceeded) as error:
            self.release(blocks)
            raise OutOfKVMemory(str(error)) from error
        except AllocatorError as error:
            self.release(blocks)
            raise PoolGone(str(error)) from error
        return blocks

    def release(self, blocks: Sequence[KVBlock]) -> None:
        """Give back what was leased, let go what is sealed. Never raises: they are given up here in
        any case, and an allocator that did not hear of it is told with the next request."""
        leases = [block.held for block in blocks if isinstance(block.held, Lease)]
        sealed = [block.held for block in blocks if isinstance(block.held, Block)]
        try:
            if leases:
                self._client.release_many(leases)
        except AllocatorError as error:  # another allocator may never have known of them
            log.warning("%d leases were given up, but not accepted: %s", len(leases), error)
        try:
            if sealed:
                self._client.release_blocks(sealed)
        except AllocatorError as error:
            log.warning("%d blocks were let go, but not accepted: %s", len(sealed), error)

    def seal(self, blocks: Sequence[tuple[bytes, KVBlock]]) -> None:
        """Let every instance map these full blocks; those that the pool has already stay writable,
        and ours. Raises `PoolGone`."""
        leases = [(digest, block.held) for digest, block in blocks if isinstance(block.held, Lease)]
        owners = [block for _, block in blocks if isinstance(block.held, Lease)]
        try:
            put = self._client.put_blocks(leases)
        except AllocatorError as error:
            raise PoolGone(str(error)) from error
        for block, sealed in zip(owners, put, strict=True):
            if sealed is not None:
                block.held = sealed

    def look_up(self, digests: Sequence[bytes]) -> list[KVBlock]:
        """The blocks from the first on that some instance has sealed. [] where no allocator
        answers: then they are computed."""
        try:
            found = self._client.look_up_blocks(digests)
        except AllocatorError as error:
            log.debug("the prefix cache was not asked: %s", error)
            return []
        return [_block(block) for block in found]

    def pressure(self) -> Pressure:
        """What this instance should give back while another one lacks room."""
        try:
            share = self._client.pool_share()
        except AllocatorError:
            return _NO_PRESSURE
        surplus = max(0, share.held_bytes - share.fair_bytes) if share.wanted else 0
        return Pressure(surplus, share.older_since_ms)


class PrivateSource:
    """Blocks of this process's own memory."""

    def __init__(
        self,
        layout: KVLayout,
        device: torch.device | None = None,
        limit_bytes: int = PRIVATE_LIMIT_BYTES,
    ) -> None:
        self._layout = layout
        self._device = device
        self._limit = max(1, limit_bytes // layout.block_bytes)
        self._count = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that are out."""
        return self._count

    def lease(self, count: int) -> list[KVBlock]:
        """`count` blocks: all, or none. Raises `OutOfKVMemory`."""
        if self._count + count > self._limit:
            raise OutOfKVMemory(
                f"no allocator answers, and this instance holds {self._count} KV blocks of its own "
                f"of at most {self._limit}: start an allocator in its runtime directory"
            )
        num_bytes = self._layout.block_bytes
        blocks = []
        for _ in range(count):
            if self._device is None or self._device.type == "cpu":
                try:
                    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                except OSError as error:
                    text = f"this process can't get memory for its KV blocks: {error.strerror}"
                    raise OutOfKVMemory(text) from error
                storage = torch.frombuffer(memory, dtype=torch.uint8)
            else:
                storage = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
            blocks.append(KVBlock(storage, 0, None))
        self._count += count
        return blocks

    def release(self, blocks: Sequence[KVBlock]) -> None:
        """The memory goes with the last view of it."""
        self._count -= len(blocks)


def _block(held: Lease | Block) -> KVBlock:
    return KVBlock(held.window(), held.extent.offset, held)
