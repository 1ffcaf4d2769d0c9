"""Leased extents and sealed blocks of the pool, as a client sees them.

    lease ─► Lease, writable ─► put ─► Block, read-only, shared ─► release
                 │                       ▲
                 └─► release             └─ look_up, in any process

Owns this session's window on the pool and what is mapped in it. Invariants: an extent is mapped
exactly as long as this session leases it or pins its block; memory that is written is committed;
what is released while no allocator answers is returned to the next one. Knows nothing of what lies
in a block.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from allocator import messages
from allocator.backends import PoolWindow, for_handle
from allocator.client.session.connection import Connection, expect
from allocator.client.session.shortage import Shortage
from allocator.errors import (
    AllocatorGone,
    DeviceError,
    DoubleFree,
    SharedMemoryFull,
    Unanswered,
    WaitTimeout,
)
from allocator.lifeline import close_all
from allocator.messages import MAX_BATCH, BlockToPut, Extent, Handle, LeaseId

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class _Mapped:
    """A window on one pool. A lease or a block belongs to the one that it was mapped in, also when
    a later allocator has another pool."""

    window: PoolWindow
    handle: Handle
    epoch: int
    users: Counter[int] = field(default_factory=Counter)
    """By offset, how many Leases and Blocks."""
    is_open: bool = True
    _bytes: "torch.Tensor | None" = field(default=None, repr=False)  # most can't be touched

    def as_bytes(self) -> "torch.Tensor":
        """The whole window as uint8, one tensor however often it is asked for."""
        if self._bytes is None:
            from allocator.client.weights.tensor import as_bytes

            self._bytes = as_bytes(self.window)
        return self._bytes

    def map(self, extent: Extent, *, writable: bool, descriptor: int | None = None) -> None:
        if not self.users[extent.offset]:
            self.window.map(extent, writable=writable, descriptor=descriptor)
        self.users[extent.offset] += 1

    def unmap(self, extent: Extent, *, discard: bool) -> None:
        self.users[extent.offset] -= 1
        if not self.users[extent.offset]:
            del self.users[extent.offset]
            if self.is_open:
                self.window.unmap(extent, discard=discard)

    def close(self) -> None:
        """Nothing of it is mapped any more."""
        self.is_open = False
        self.window.close()


@dataclass(eq=False)
class _Held(ABC):
    """An extent of the pool that this session maps until it lets go of it."""

    extent: Extent
    _pool: "PoolClient"
    _mapped: _Mapped
    _held: bool = field(default=True, init=False)

    @property
    @abstractmethod
    def _end_message(self) -> str:
        """What the user is told who goes on with it after its end."""

    @property
    def is_held(self) -> bool:
        """Whether it has not ended: by a release, a put, or an allocator that died during one."""
        return self._held

    @property
    def buffer(self) -> memoryview:
        """Its bytes. Not to be touched after the release."""
        self._check()
        begin = self.extent.offset
        return self._mapped.window.buffer[begin : begin + self.extent.num_bytes]

    @property
    def pool(self) -> Handle:
        """Of the pool that it is in: for a process of one's own that is to map it, by a
        `PoolView`."""
        return self._mapped.handle

    def window(self) -> "torch.Tensor":
        """The whole pool as this session sees it, uint8 # [num_bytes of the pool]: its own bytes
        are at `extent.offset`, what is not mapped can't be touched. The same tensor for all leases
        and blocks of one pool."""
        self._check()
        return self._mapped.as_bytes()

    def _check(self) -> None:
        if not self._held:
            raise DoubleFree(self._end_message)


@dataclass(eq=False)
class Lease(_Held):
    """An extent that this session may write, zeros at first, until it releases it or puts it into
    the index."""

    generation: int

    @property
    def _end_message(self) -> str:
        return f"the lease of offset {self.extent.offset} has ended"

    def tensor(self) -> "torch.Tensor":
        """Its bytes as uint8 # [num_bytes], to be viewed as another dtype. As for `buffer`."""
        begin = self.extent.offset
        return self.window()[begin : begin + self.extent.num_bytes]

    def release(self) -> None:
        """Its memory goes back to the device. Raises DoubleFree for the second time."""
        self._pool.release([self])


@dataclass(eq=False)
class Block(_Held):
    """A sealed block that this session maps, read-only, and pins: writing to it ends the
    process."""

    digest: bytes

    @property
    def _end_message(self) -> str:
        return f"the block {self.digest.hex()} was released"

    def release(self) -> None:
        """This session maps it no longer. Raises DoubleFree for the second time."""
        self._pool.release_blocks([self])


H = TypeVar("H", bound=_Held)


class PoolClient:
    """One session's part of the pool. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._current: _Mapped | None = None
        self._closed = False
        self._lock = threading.RLock()

    def lease(self, num_bytes: int, count: int = 1, *, alone_since_ms: int = 0) -> list[Lease]:
        """`count` extents of at least `num_bytes` bytes each, mapped, committed and zero: all, or
        none. `alone_since_ms`: see `messages.Lease`. Raises OutOfDeviceMemory, RoomTaken,
        QuotaExceeded."""
        with self._turn():
            answer, descriptors = self._connection.exchange(
                messages.Lease(num_bytes=num_bytes, count=count, alone_since_ms=alone_since_ms)
            )
            leased = expect(answer, messages.Leased)
            try:
                mapped = self._map(leased.pool, leased.extents, descriptors, writable=True)
            except BaseException:
                self._give_back([LeaseId(e.offset, leased.generation) for e in leased.extents])
                raise
            return [Lease(extent, self, mapped, leased.generation) for extent in leased.extents]

    def release(self, leases: Sequence[Lease]) -> None:
        """Give them back, all at once. Raises DoubleFree, and then gives nothing back. Where no
        allocator answers, the next one that knows the session gets them back. What a device does
        not unmap stays leased while this session lasts: the first such DeviceError is raised once
        the others are given back."""
        with self._turn(), _unmapped(leases, discard=True) as gone:
            current = [lease for lease in gone if lease._mapped is self._current]
            self._give_back([LeaseId(one.extent.offset, one.generation) for one in current])

    def put(self, blocks: Sequence[tuple[bytes, Lease]]) -> list[Block | None]:
        """Seal leased extents under their digests and go on with them read-only. None where the
        index had that digest already, or the lease is of a pool before this one: the lease goes on,
        to be released. Where this raises Unanswered or WaitTimeout the leases that were on their
        way have ended."""
        with self._turn():
            put: list[Block | None] = []
            for start in range(0, len(blocks), MAX_BATCH):
                try:
                    put += self._put(blocks[start : start + MAX_BATCH])
                except BaseException:
                    self.release_blocks([block for block in put if block is not None])
                    raise
            return put

    def look_up(self, digests: Sequence[bytes]) -> list[Block]:
        """The blocks from the first on that the index has, mapped read-only and pinned."""
        found: list[Block] = []
        with self._turn():
            for start in range(0, len(digests), MAX_BATCH):
                part = digests[start : start + MAX_BATCH]
                try:
                    some = self._look_up(part)
                except BaseException:
                    self.release_blocks(found)
                    raise
                found += some
                if len(some) < len(part):
                    break
        return found

    def release_blocks(self, blocks: Sequence[Block]) -> None:
        """Unmap and unpin them. As for `release`."""
        with self._turn(), _unmapped(blocks, discard=False) as gone:
            self._unpin([block.digest for block in gone if block._mapped is self._current])

    def share(self) -> messages.Share:
        """What this session holds of the pool, and how much it should while others lack room."""
        with self._turn():
            return self._connection.request(messages.GetShare(), messages.Share)

    def close(self) -> None:
        """Unmap everything; the session's end gives it back. A forked child keeps what it has
        inherited mapped: it may have inherited the lock from a thread that is lost, too."""
        if self._connection.is_inherited:
            return
        with self._lock:
            self._closed = True
            if self._current is not None:
                self._current.close()
                self._current = None

    # --- steps

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        self._connection.check_owner()  # before the lock, as there
        with self._lock:
            if self._closed:
                raise AllocatorGone("this session is closed")
            yield

    def _look_up(self, digests: Sequence[bytes]) -> list[Block]:
        answer, descriptors = self._connection.exchange(
            messages.LookUpBlocks(digests=tuple(digests))
        )
        blocks = expect(answer, messages.Blocks)
        try:
            mapped = self._map(blocks.pool, blocks.extents, descriptors, writable=False)
        except BaseException:
            self._unpin(digests[: len(blocks.extents)])
            raise
        return [
            Block(extent, self, mapped, digest)
            for digest, extent in zip(digests, blocks.extents, strict=False)
        ]

    def _put(self, blocks: Sequence[tuple[bytes, Lease]]) -> list[Block | None]:
        for _, lease in blocks:
            lease._check()
        current = self._current
        own = [(digest, lease) for digest, lease in blocks if lease._mapped is current]
        if current is None or not own:
            return [None] * len(blocks)
        request = messages.PutBlocks(
            blocks=tuple(
                BlockToPut(digest, lease.extent.offset, lease.generation) for digest, lease in own
            )
        )
        current.window.settle()  # once it is answered, others may read them
        try:
            # In another pool the same offset and generation may be another lease of ours.
            answer = self._connection.request(request, messages.BlocksPut, epoch=current.epoch)
        except (Unanswered, WaitTimeout):
            self._give_up([lease for _, lease in own])
            raise
        stored = {id(lease) for (_, lease), new in zip(own, answer.stored, strict=True) if new}
        put: list[Block | None] = []
        for digest, lease in blocks:
            if id(lease) in stored:
                lease._held = False
                lease._mapped.window.map(lease.extent, writable=False)
            put.append(
                Block(lease.extent, self, lease._mapped, digest) if id(lease) in stored else None
            )
        return put

    def _give_up(self, leases: Sequence[Lease]) -> None:
        """They may be blocks by now, which others map: not to be written any more, nor discarded.
        Those that are not go back with the next request."""
        ids = tuple(LeaseId(lease.extent.offset, lease.generation) for lease in leases)
        with _unmapped(leases, discard=False):
            self._connection.give_up(messages.Return(leases=ids))

    def _map(
        self,
        pool: Handle,
        extents: Iterable[Extent],
        descriptors: Sequence[int],
        *,
        writable: bool,
    ) -> _Mapped:
        shortage = Shortage(self._connection)
        with contextlib.ExitStack() as always, contextlib.ExitStack() as undo:
            always.callback(close_all, descriptors)
            mapped = self._window_of(pool)
            for index, extent in enumerate(extents):
                descriptor = descriptors[index] if descriptors else None
                while True:
                    try:
                        mapped.map(extent, writable=writable, descriptor=descriptor)
                        break
                    except SharedMemoryFull as error:
                        shortage(error)
                undo.callback(mapped.unmap, extent, discard=writable)
            undo.pop_all()
        return mapped

    def _give_back(self, leases: Sequence[LeaseId]) -> None:
        for start in range(0, len(leases), MAX_BATCH):
            part = tuple(leases[start : start + MAX_BATCH])
            self._connection.give_back(messages.Return(leases=part))

    def _unpin(self, digests: Sequence[bytes]) -> None:
        for start in range(0, len(digests), MAX_BATCH):
            part = tuple(digests[start : start + MAX_BATCH])
            self._connection.give_back(messages.UnpinBlocks(digests=part))

    def _window_of(self, pool: Handle) -> _Mapped:
        current, epoch = self._current, self._connection.epoch
        if current is None or (current.handle.segment, current.epoch) != (pool.segment, epoch):
            # Another pool means an allocator that did not adopt ours: what is mapped of the old one
            # stays as it is, for whoever still views it. In the same pool others may hold it now.
            if current is not None and current.handle.segment == pool.segment:
                current.close()
            current = _Mapped(for_handle(pool).open_pool(pool), pool, epoch)
            self._current = current
        return current


@contextlib.contextmanager
def _unmapped(held: Sequence[H], *, discard: bool) -> Iterator[list[H]]:
    """None of them is held any more; those that are not mapped either. Raises as `_end` does, and
    at last the first DeviceError with which one stayed mapped."""
    _end(held)
    gone: list[H] = []
    errors: list[DeviceError] = []
    for one in held:
        try:
            one._mapped.unmap(one.extent, discard=discard)
        except DeviceError as error:
            errors.append(error)
        else:
            gone.append(one)
    yield gone
    if errors:
        raise errors[0]


def _end(held: Sequence[_Held]) -> None:
    """From now on none of them is held. Raises DoubleFree, and then all still are."""
    for one in held:
        one._check()
    if len({id(one) for one in held}) < len(held):
        raise DoubleFree("one of them is named twice")
    for one in held:
        one._held = False
