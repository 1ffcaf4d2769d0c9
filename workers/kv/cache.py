"""All keys and values of one instance: which sequence holds which blocks, and what others share.

    open ──► SequenceCache ── grow ──► (forward passes) ── seal ──► close
      ▲ blocks that some instance has sealed                │ full blocks, for every instance
      └─────────────────── the allocator's index ◄──────────┘

Owns the account of this instance's blocks. Invariants: a writable block belongs to exactly one
sequence or is free; free + used = leased; a sealed block is pinned as long as a sequence here maps
it. Does not know models, scheduling or the wire.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from workers.errors import OutOfKVMemory
from workers.kv.block import KVBlock
from workers.kv.layout import KVLayout
from workers.kv.prefix import extend_chain, root_digest
from workers.kv.source import PoolGone, PoolSource, PoolTaken, PrivateSource
from workers.kv.table import BlockTable

log = logging.getLogger("onecopy.instance")

_LEASED_AHEAD: Final = 8
"""Blocks that are leased at once where fewer are needed: a request to the allocator costs more than
a block, and what is idle goes back."""
_KEPT_FREE: Final = 32
"""Free blocks that are kept while sequences run."""


@dataclass(eq=False, slots=True)
class SequenceCache:
    """What one sequence holds. Made by `KVCache.open`, ended by `KVCache.close`."""

    table: BlockTable
    root: bytes
    num_cached: int
    """Tokens at the start whose keys and values some instance had computed before."""
    chain: list[bytes] = field(default_factory=list)
    """Digests of the full blocks from the first on, as far as they were needed."""
    num_sealed: int = 0
    """Blocks from the first on that were offered to the index, or came from it."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Of one instance, in blocks and tokens."""

    num_free: int
    num_used: int
    num_private: int
    """Those of the used and free that are this process's own memory."""
    prompt_tokens: int
    """Tokens of all prompts that were looked up."""
    hit_tokens: int
    """Those of them that were found."""


class KVCache:
    """The instance's part of the pool. One thread calls it."""

    def __init__(
        self,
        layout: KVLayout,
        pool: PoolSource | None = None,
        *,
        weights: str = "",
        device: torch.device | None = None,
        prefix_caching: bool = True,
        private_limit_bytes: int | None = None,
        private: PrivateSource | None = None,
    ) -> None:
        """`weights` identifies the bytes of the weights, for the index. Without a `pool` all memory
        is this process's own, `private_limit_bytes` at most (None: a default for emergencies), or
        comes from `private`."""
        self.layout = layout
        self._pool = pool
        if private is not None:
            self._private = private
        elif private_limit_bytes is None:
            self._private = PrivateSource(layout, device)
        else:
            self._private = PrivateSource(layout, device, private_limit_bytes)
        self._weights = weights
        self._prefix_caching = prefix_caching and pool is not None
        self._free: list[KVBlock] = []
        self._open: dict[int, SequenceCache] = {}
        self._prompt_tokens = self._hit_tokens = 0
        self._pool_is_gone = False
        self.problem = ""
        """Why the last `grow` was refused."""
        self.is_taken = False
        """Whether that was since others hold the room, and are at work: so it is worth waiting."""

    # --- one sequence

    def open(self, token_ids: Sequence[int], salt: str = "") -> SequenceCache:
        """Begin a sequence with what is known of `token_ids`, all but the last of them at most: the
        last must be computed, for something to follow from it."""
        root = root_digest(self._weights, self.layout, salt)
        chain: list[bytes] = []
        blocks: list[KVBlock] = []
        size = self.layout.block_size
        if self._prefix_caching and self._pool is not None:
            extend_chain(chain, root, token_ids[:-1], size)
            if chain:
                blocks = self._pool.look_up(chain)
            self._prompt_tokens += len(token_ids)
            self._hit_tokens += len(blocks) * size
        num_cached = len(blocks) * size
        table = BlockTable(self.layout, blocks, num_cached)
        cache = SequenceCache(table, root, num_cached, chain, len(blocks))
        self._open[id(cache)] = cache
        return cache

    def grow(self, cache: SequenceCache, num_tokens: int, since_ms: int = 0) -> bool:
        """Have room for `num_tokens` tokens in all. False, and nothing changed, where there is
        none; `problem` says why. `since_ms`: when the sequence came (CLOCK_MONOTONIC): of those
        that are alone in their instances, the oldest comes first."""
        short = cache.table.num_missing(num_tokens)
        if short > len(self._free):
            alone_since_ms = since_ms if len(self._open) == 1 else 0
            try:
                self._free += self._lease(short - len(self._free), alone_since_ms)
            except OutOfKVMemory as error:
                self.problem = str(error)
                self.is_taken = isinstance(error, PoolTaken)
                return False
        # In the order in which they were leased, most of which lie in a row.
        given = self._free[:short]
        del self._free[:short]
        self._free += cache.table.grow(num_tokens, given)
        return True

    def seal(self, cache: SequenceCache, token_ids: Sequence[int]) -> bool:
        """Offer every full block to the index. `token_ids` are the sequence's. False where an
        allocator that ended meanwhile took blocks with it: the sequence must be closed as `lost`
        and computed again."""
        if not self._prefix_caching or self._pool is None:
            return True
        num_full = cache.table.num_tokens // self.layout.block_size
        if num_full <= cache.num_sealed:
            return True
        size = self.layout.block_size
        extend_chain(cache.chain, cache.root, token_ids[: num_full * size], size)
        offered = [
            (digest, block)
            for digest, block in zip(
                cache.chain[cache.num_sealed : num_full],
                cache.table.blocks[cache.num_sealed : num_full],
                strict=True,
            )
            if not block.is_private
        ]
        try:
            if offered:
                self._pool.seal(offered)
        except PoolGone:
            return all(block.is_usable for block in cache.table.held)
        cache.num_sealed = num_full
        return True

    def close(self, cache: SequenceCache, token_ids: Sequence[int] | None = None) -> None:
        """End a sequence. With its `token_ids`, what it computed stays for others to find, as long
        as nobody needs the room."""
        if token_ids is not None:
            self.seal(cache, token_ids)
        del self._open[id(cache)]
        blocks = cache.table.clear()
        usable = [block for block in blocks if block.is_usable]
        # What was let go first is evicted first, and without a beginning nothing is found.
        self._release([block for block in reversed(usable) if block.is_sealed])
        self._free += [block for block in usable if not block.is_sealed]
        self._trim(_KEPT_FREE if self._open else 0)

    # --- the instance

    def trim(self) -> None:
        """Give back every block that no sequence holds."""
        self._trim(0)

    def surplus(self) -> tuple[int, int]:
        """Blocks of sequences that should be given up, because another instance lacks its part of
        the pool; and the age of an only sequence of another's that lacks room, for which all that
        came later should give way (0: there is none). Blocks that no sequence holds are given back
        first."""
        if self._pool is None:
            return 0, 0
        pressure = self._pool.pressure()
        num_free = sum(not block.is_private for block in self._free)
        surplus = -(-pressure.surplus_bytes // self.layout.block_bytes) - num_free
        if pressure.surplus_bytes or pressure.older_since_ms:
            self.trim()
        return max(0, surplus), pressure.older_since_ms

    @property
    def num_bytes(self) -> int:
        """Memory of all blocks that this instance holds, shared ones too."""
        return (self.num_used + len(self._free)) * self.layout.block_bytes

    @property
    def num_used(self) -> int:
        """Blocks of all sequences."""
        return sum(len(cache.table.held) for cache in self._open.values())

    def open_caches(self) -> set[int]:
        """The identities (`id`) of those that were opened and not closed."""
        return set(self._open)

    def statistics(self) -> CacheStatistics:
        """All in one picture."""
        return CacheStatistics(
            num_free=len(self._free),
            num_used=self.num_used,
            num_private=self._private.num_blocks,
            prompt_tokens=self._prompt_tokens,
            hit_tokens=self._hit_tokens,
        )

    def check(self) -> None:
        """Raise `AssertionError` where an invariant does not hold. For tests and idle moments."""
        writable = list(self._free)
        private = sum(block.is_private for block in self._free)
        for cache in self._open.values():
            table = cache.table
            if table.num_tokens > table.capacity:
                raise AssertionError(f"{table.num_tokens} tokens in room for {table.capacity}")
            writable += [block for block in table.held if not block.is_sealed]
            private += sum(block.is_private for block in table.held)
        if len({id(block) for block in writable}) != len(writable):
            raise AssertionError("a writable block is in two places")
        if len({block.address for block in writable}) != len(writable):
            raise AssertionError("two writable blocks are at one address")
        if private != self._private.num_blocks:
            raise AssertionError(
                f"{private} private blocks, but {self._private.num_blocks} are out"
            )

    # --- steps

    def _lease(self, count: int, alone_since_ms: int) -> list[KVBlock]:
        if self._pool is None:
            return self._private.lease(count)
        try:
            leased = self._lease_of_pool(self._pool, count, alone_since_ms)
        except PoolGone as gone:
            if not self._pool_is_gone:
                log.warning("KV blocks come from this process's own memory: %s", gone)
            self._pool_is_gone = True
            return self._private.lease(count)
        if self._pool_is_gone:
            log.info("KV blocks come from the pool again")
        self._pool_is_gone = False
        return leased

    def _lease_of_pool(self, pool: PoolSource, count: int, alone_since_ms: int) -> list[KVBlock]:
        try:
            return pool.lease(max(count, _LEASED_AHEAD), alone_since_ms)
        except PoolGone:
            raise
        except OutOfKVMemory:
            if count >= _LEASED_AHEAD:
                raise
            return pool.lease(count, alone_since_ms)

    def _trim(self, keep: int) -> None:
        surplus, self._free = self._free[keep:], self._free[:keep]
        self._release(surplus)

    def _release(self, blocks: Sequence[KVBlock]) -> None:
        private = [block for block in blocks if block.is_private]
        if private:
            self._private.release(private)
        if self._pool is not None and len(private) < len(blocks):
            self._pool.release([block for block in blocks if not block.is_private])
