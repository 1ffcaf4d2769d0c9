"""The pool through real daemons and clients: leases, blocks that are shared, quotas, room, ends."""

import hashlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator import (
    AllocatorGone,
    Client,
    DoubleFree,
    InvalidMessage,
    Lease,
    Manifest,
    OutOfDeviceMemory,
    QuotaExceeded,
    RuntimeDir,
    WeightSetWriter,
    messages,
)
from allocator.backends.host import SHM_ROOT, HostBackend
from allocator.messages import BlockToPut, LeaseId, PutBlocks, Return, UnpinBlocks
from tests.allocator.client.leases_on_small_shm import on_small_shm
from tests.allocator.daemon.raw_session import RawSession
from tests.allocator.processes import ClientProcess, Refused, in_fork
from tests.daemon_process import DaemonProcess
from tests.leaks import segments, wait_until

KIB, MIB = 1 << 10, 1 << 20
GRANULE = HostBackend.granularity
StartDaemon = Callable[..., DaemonProcess]
Start = Callable[..., ClientProcess]
Connect = Callable[..., Client]


@pytest.fixture
def start(daemon: DaemonProcess) -> Iterator[Start]:
    """Start client processes; they are stopped before the daemon is."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(ClientProcess(daemon.runtime_dir, **options))


def pool_bytes(runtime_dir: RuntimeDir) -> int:
    """Memory that the pool takes, by the kernel's word."""
    names = segments(runtime_dir.segment_prefix)
    return sum((SHM_ROOT / name).stat().st_blocks * 512 for name in names)


def digest(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def cached(memory: Client, number: int, num_bytes: int = GRANULE) -> None:
    """A block of the index, full of its number, that nobody pins."""
    lease = memory.lease(num_bytes)
    lease.buffer[:] = bytes([number]) * len(lease.buffer)
    [block] = memory.put_blocks([(digest(number), lease)])
    assert block is not None
    block.release()


def idle_set(memory: Client, key: str, num_bytes: int) -> None:
    writer = memory.open_weight_set(key, {})
    assert isinstance(writer, WeightSetWriter)
    with writer:
        writer.reserve(num_bytes)
        writer.seal(Manifest(version=1, tensors={}, metadata={}), 0).release()


def keys(memory: Client) -> set[str]:
    return {one.key for one in memory.statistics().weight_sets}


def numbers_cached(memory: Client, most: int) -> set[int]:
    """Which of the blocks 0, 1, … are in the index; looking uses them."""
    found = set()
    for number in range(most):
        for block in memory.look_up_blocks([digest(number)]):
            assert bytes(block.buffer) == bytes([number]) * len(block.buffer)
            block.release()
            found.add(number)
    return found


# --- leases


def test_a_lease_is_zeros_to_write_until_it_is_released(
    memory: Client, runtime_dir: RuntimeDir
) -> None:
    lease = memory.lease(100_000)
    assert len(lease.buffer) == lease.extent.num_bytes == 2 * GRANULE
    assert bytes(lease.buffer) == bytes(2 * GRANULE)
    assert pool_bytes(runtime_dir) == 2 * GRANULE  # committed before it is touched
    lease.buffer[:] = b"x" * (2 * GRANULE)
    tensor = lease.tensor()
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (2 * GRANULE,))
    tensor[5] = 7
    assert lease.buffer[4:7] == b"x\7x"
    assert memory.statistics().pool.leased_bytes == 2 * GRANULE
    del tensor
    lease.release()
    assert pool_bytes(runtime_dir) == 0
    assert memory.statistics().pool.leased_bytes == 0
    with pytest.raises(DoubleFree, match="the lease of offset 0 has ended"):
        assert lease.buffer
    again = memory.lease(100_000)
    assert again.extent == lease.extent
    assert bytes(again.buffer) == bytes(2 * GRANULE)


def test_a_lease_can_be_released_once(memory: Client) -> None:
    lease, other = memory.lease_many(1, 2)
    lease.release()
    for wrong in ([lease], [other, lease], [other, other]):
        with pytest.raises(DoubleFree):
            memory.release_many(wrong)
        other.buffer[0] = 1  # none of them was released
    assert memory.statistics().pool.num_leases == 1
    other.release()


def test_many_leases_in_one_request(memory: Client, runtime_dir: RuntimeDir) -> None:
    leases = [*memory.lease_many(1, 1024), *memory.lease_many(GRANULE, 300)]
    assert len({lease.extent.offset for lease in leases}) == 1324
    assert memory.statistics().pool.leased_bytes == 1324 * GRANULE == pool_bytes(runtime_dir)
    memory.release_many(leases)
    assert memory.statistics().pool.leased_bytes == pool_bytes(runtime_dir) == 0
    for num_bytes, count in ((1, 1025), (0, 1), (-1, 1), (1, 0)):
        with pytest.raises(InvalidMessage):
            memory.lease_many(num_bytes, count)


def test_sessions_do_not_see_each_others_leases(start: Start) -> None:
    clients = [start(), start(), start()]
    offsets = [client.do.lease(1 * MIB, 2) for client in clients]
    for value, (client, mine) in enumerate(zip(clients, offsets, strict=True)):
        client.do.fill_leases([[offset, 10 + value] for offset in mine])
    for value, (client, mine) in enumerate(zip(clients, offsets, strict=True)):
        expected = hashlib.sha256(bytes([10 + value]) * MIB).hexdigest()
        assert [client.do.lease_digest(offset) for offset in mine] == [expected] * 2
    assert len({offset for mine in offsets for offset in mine}) == 6
    clients[0].do.release_leases(offsets[0])
    again = clients[1].do.lease(1 * MIB, 2)
    assert set(again) == set(offsets[0])  # of another session, and nothing of it is left
    zeros = hashlib.sha256(bytes(MIB)).hexdigest()
    assert [clients[1].do.lease_digest(offset) for offset in again] == [zeros] * 2
    with pytest.raises(Refused, match="DoubleFree"):
        clients[0].do.release_leases(offsets[0])


@pytest.mark.parametrize("whose", ["one's own", "another's", "one's own, released"])
def test_only_what_one_leases_is_within_reach(
    daemon: DaemonProcess, start: Start, whose: str
) -> None:
    other = start()
    [theirs] = other.do.lease(GRANULE)
    other.do.fill_leases([[theirs, 9]])

    def child() -> str:
        with daemon.connect() as own:
            lease = own.lease(GRANULE)
            view = lease._mapped.window.buffer
            view[lease.extent.offset] = 5
            if whose == "one's own, released":
                lease.release()
            return str(view[theirs if whose == "another's" else lease.extent.offset])

    ended = in_fork(child)
    if whose == "one's own":
        assert (ended.signal, ended.text) == (0, "5")
    else:
        assert ended.signal == signal.SIGSEGV
    assert other.do.lease_digest(theirs) == hashlib.sha256(b"\t" * GRANULE).hexdigest()


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_of_what_a_process_left_the_next_one_sees_nothing(
    start: Start, memory: Client, how: str
) -> None:
    first = start()
    offsets = first.do.lease(GRANULE, 8)
    first.do.fill_leases([[offset, 255] for offset in offsets])
    first.stop() if how == "closed" else first.kill()
    wait_until(lambda: not memory.statistics().pool.num_leases, "its leases have ended")
    second = start()
    assert sorted(second.do.lease(GRANULE, 8)) == sorted(offsets)  # the very same memory
    zeros = hashlib.sha256(bytes(GRANULE)).hexdigest()
    assert {second.do.lease_digest(offset) for offset in offsets} == {zeros}


def test_a_lease_of_another_generation_is_none(daemon: DaemonProcess, memory: Client) -> None:
    """With a bad one among them, no good one is taken either."""
    raw = RawSession(daemon.runtime_dir)

    def lease() -> LeaseId:
        reply = raw.ask(messages.Lease(num_bytes=GRANULE))
        assert isinstance(reply, messages.Leased)
        return LeaseId(reply.extents[0].offset, reply.generation)

    good, ended = lease(), lease()
    assert isinstance(raw.ask(Return(leases=(ended,))), messages.Done)
    assert raw.code(Return(leases=(good, ended))) == "double_free"
    again = lease()
    assert (again.offset, again.generation > ended.generation) == (ended.offset, True)
    inside = LeaseId(good.offset + 1, good.generation)
    for wrong, code in ((ended, "stale_generation"), (inside, "foreign_extent")):
        assert raw.code(Return(leases=(good, wrong))) == code
        blocks = [(good, digest(1)), (wrong, digest(2))]
        put = tuple(BlockToPut(name, one.offset, one.generation) for one, name in blocks)
        assert raw.code(PutBlocks(blocks=put)) == code
    assert raw.code(Return(leases=(good, good))) == "double_free"
    pool = memory.statistics().pool
    assert (pool.num_leases, pool.num_blocks) == (2, 0)
    assert isinstance(raw.ask(Return(leases=(good, again))), messages.Done)
    assert memory.statistics().pool.num_leases == 0
    memory.check_integrity()
    raw.close()


def test_nobody_can_give_away_what_is_anothers(daemon: DaemonProcess, memory: Client) -> None:
    lease = memory.lease(1)
    [block] = memory.put_blocks([(digest(1), memory.lease(1))])
    assert block is not None
    stranger = RawSession(daemon.runtime_dir)
    offset, generation = lease.extent.offset, lease.generation
    assert stranger.code(Return(leases=(LeaseId(offset, generation),))) == "foreign_extent"
    put = PutBlocks(blocks=(BlockToPut(digest(2), offset, generation),))
    assert stranger.code(put) == "foreign_extent"
    assert stranger.code(UnpinBlocks(digests=(digest(1),))) == "foreign_extent"
    stranger.close()
    lease.buffer[0] = 1
    statistics = memory.statistics()
    assert (statistics.pool.num_leases, statistics.pool.num_blocks) == (1, 1)
    memory.check_integrity()


def test_threads_share_the_pool(memory: Client, runtime_dir: RuntimeDir) -> None:
    def use(number: int) -> None:
        for round_ in range(20):
            leases = memory.lease_many(GRANULE, 2)
            for lease in leases:
                lease.buffer[:] = bytes([number]) * GRANULE
            [block] = memory.look_up_blocks([digest(0)])
            assert block.buffer[0] == 0
            block.release()
            assert all(bytes(lease.buffer) == bytes([number]) * GRANULE for lease in leases)
            memory.release_many(leases[round_ % 2 :])
            memory.release_many(leases[: round_ % 2])

    cached(memory, 0)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(1, 5)))
    assert memory.statistics().pool.leased_bytes == 0
    assert pool_bytes(runtime_dir) == GRANULE


def test_a_forked_child_is_refused_whatever_the_parents_threads_do(
    daemon: DaemonProcess, memory: Client
) -> None:
    lease = memory.lease(1)

    def child() -> str:
        for use in (lambda: memory.lease(1), lease.release, lambda: memory.look_up_blocks([])):
            with pytest.raises(AllocatorGone, match="belongs to the parent process"):
                use()
        memory.close()
        return "refused"

    os.kill(daemon.pid, signal.SIGSTOP)  # a thread of ours waits for its answer as we fork
    with ThreadPoolExecutor(1) as threads:
        leased = threads.submit(memory.lease, 1)
        try:
            wait_until(lambda: _is_held(memory._pool._lock), "the thread is inside a request")
            assert in_fork(child).text == "refused"
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        leased.result(60.0).release()
    lease.buffer[0] = 1
    lease.release()


def _is_held(lock: Any) -> bool:
    """Whether another thread holds it."""
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


def test_what_a_forked_child_is_refused_leaves_the_parents_bytes(memory: Client) -> None:
    """To release a lease would discard its memory, which both of them map."""
    lease = memory.lease(1)
    lease.buffer[:] = b"\3" * GRANULE
    [block] = memory.put_blocks([(digest(1), memory.lease(1))])
    assert block is not None

    def child() -> str:
        put = [(digest(2), lease)]
        for use in (lease.release, block.release, lambda: memory.put_blocks(put)):
            with pytest.raises(AllocatorGone, match="belongs to the parent process"):
                use()
        memory.close()
        return "refused"

    assert in_fork(child).text == "refused"
    assert bytes(lease.buffer) == b"\3" * GRANULE
    assert bytes(block.buffer) == bytes(GRANULE)
    pool = memory.statistics().pool
    assert (pool.num_leases, pool.num_blocks, pool.evictable_bytes) == (1, 1, 0)
    lease.release()
    block.release()


def test_after_the_session_nothing_of_it_can_be_used(daemon: DaemonProcess) -> None:
    memory = daemon.connect()
    lease = memory.lease(1)
    memory.close()
    for use in (lease.release, lambda: memory.lease(1), lambda: memory.look_up_blocks([])):
        with pytest.raises(AllocatorGone, match="this session is closed"):
            use()
    with pytest.raises(ValueError, match="the window is closed"):
        assert lease.buffer


def test_a_lease_that_cannot_be_committed_is_given_back(runtime_dir: RuntimeDir) -> None:
    found = on_small_shm(runtime_dir)
    assert "/dev/shm holds 8.4 MB in all" in found["refused"]
    assert found["nothing_taken"]
    assert found["leased_bytes"] == 2 * MIB
    assert found["first"]
    assert found["then"] == 7 * MIB
    assert found["used_at_last"] == 0


# --- blocks


def test_a_block_is_mapped_by_who_looks_it_up_and_never_copied(
    start: Start, memory: Client, runtime_dir: RuntimeDir
) -> None:
    maker, user = start(), start()
    offsets = maker.do.lease(MIB, 2)
    maker.do.fill_leases([[offsets[0], 1], [offsets[1], 2]])
    named = [digest(1).hex(), digest(2).hex()]
    assert maker.do.put(list(zip(named, offsets, strict=True))) == [True, True]
    assert user.do.look_up([*named, digest(3).hex()]) == offsets
    for client in (maker, user):
        contents = [client.do.block_digest(one) for one in named]
        assert contents == [hashlib.sha256(bytes([n]) * MIB).hexdigest() for n in (1, 2)]
        # In both of them the same memory, and in neither of them to be written.
        assert {how for how, _ in client.do.mappings()} == {"r--s"}
    assert pool_bytes(runtime_dir) == 2 * MIB
    pool = memory.statistics().pool
    assert (pool.leased_bytes, pool.cached_bytes, pool.evictable_bytes) == (0, 2 * MIB, 0)


@pytest.mark.parametrize("who", ["maker", "user"])
def test_whoever_writes_to_a_block_ends_and_harms_nobody(
    start: Start, memory: Client, who: str
) -> None:
    maker, user = start(), start()
    [offset] = maker.do.lease(MIB)
    maker.do.fill_leases([[offset, 1]])
    name = digest(1).hex()
    maker.do.put([[name, offset]])
    user.do.look_up([name])
    guilty, other = (maker, user) if who == "maker" else (user, maker)
    guilty.begin.write_to_block(name)
    assert guilty.ended_by == signal.SIGSEGV
    assert other.do.block_digest(name) == hashlib.sha256(b"\1" * MIB).hexdigest()
    wait_until(lambda: memory.statistics().num_sessions == 2, "its session has ended")
    assert memory.statistics().pool.evictable_bytes == 0  # the other one still pins it
    other.do.release_blocks([name])
    assert memory.statistics().pool.evictable_bytes == MIB


def test_what_the_index_knows_already_stays_the_makers(connect: Connect) -> None:
    first, second = connect(), connect()
    cached(first, 1)
    lease, other = second.lease_many(1, 2)
    lease.buffer[:3] = b"abc"
    known, new = second.put_blocks([(digest(1), lease), (digest(2), other)])
    assert known is None
    assert new is not None
    lease.buffer[3:6] = b"def"  # still to be written
    assert bytes(lease.buffer[:6]) == b"abcdef"
    lease.release()
    [found] = second.look_up_blocks([digest(1)])
    assert bytes(found.buffer[:6]) == b"\1" * 6
    with pytest.raises(DoubleFree, match="has ended"):
        second.put_blocks([(digest(3), other)])


def test_a_block_is_mapped_until_it_was_released_as_often_as_looked_up(memory: Client) -> None:
    cached(memory, 1)
    first, second = (memory.look_up_blocks([digest(1)])[0] for _ in range(2))
    first.release()
    assert second.buffer[0] == 1
    with pytest.raises(DoubleFree, match="was released"):
        assert first.buffer
    for wrong in ([first], [second, first], [second, second]):
        with pytest.raises(DoubleFree):
            memory.release_blocks(wrong)
        assert second.buffer[0] == 1  # none of them was released
    assert memory.statistics().pool.evictable_bytes == 0
    second.release()
    assert memory.statistics().pool.evictable_bytes == GRANULE


def test_long_prefixes_are_looked_up_in_parts(memory: Client) -> None:
    leases = [*memory.lease_many(1, 1024), *memory.lease_many(1, 100)]
    digests = [digest(number) for number in range(1124)]
    blocks = memory.put_blocks(list(zip(digests, leases, strict=True)))
    memory.release_blocks([block for block in blocks if block is not None])
    assert memory.statistics().pool.num_blocks == 1124
    found = memory.look_up_blocks([*digests[:1100], digest(-1), digests[1100]])
    assert [block.digest for block in found] == digests[:1100]
    assert len(memory.look_up_blocks([digest(-1), *digests])) == 0
    memory.release_blocks(found)
    pool = memory.statistics().pool
    assert (pool.evictable_bytes, pool.num_lookups, pool.num_hits) == (
        1124 * GRANULE,
        1102 + 1024,
        1100,
    )


# --- ends


def test_within_a_second_of_their_death_clients_hold_nothing(
    start: Start, memory: Client, runtime_dir: RuntimeDir
) -> None:
    clients = [start(), start(), start()]
    cached(memory, 7)
    for client in clients:
        offsets = client.do.lease(MIB, 4)
        client.do.fill_leases([[offset, 1] for offset in offsets])
        client.do.put([[digest(client.pid).hex(), offsets[0]]])
        client.do.look_up([digest(7).hex()])
    assert pool_bytes(runtime_dir) == GRANULE + 12 * MIB
    assert memory.statistics().pool.evictable_bytes == 0
    for client in clients:
        client.kill()
    # What they had sealed is anybody's now, and stays until room is needed.
    sealed = GRANULE + 3 * MIB

    def returned() -> bool:
        return pool_bytes(runtime_dir) == sealed

    wait_until(returned, "leases are returned to the system")
    statistics = memory.statistics()
    assert statistics.num_sessions == 1
    assert statistics.pool.leased_bytes == 0
    assert statistics.pool.evictable_bytes == statistics.pool.cached_bytes == sealed
    memory.check_integrity()


def test_what_is_released_without_a_daemon_is_the_next_ones(
    daemon: DaemonProcess, start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    with daemon.connect() as memory:
        kept, *others = memory.lease_many(GRANULE, 3)
        kept.buffer[:4] = b"kept"
        [block] = memory.put_blocks([(digest(1), memory.lease(1))])
        assert block is not None
        daemon.kill()
        memory.release_many(others)
        block.release()
        assert pool_bytes(runtime_dir) == 2 * GRANULE  # the system has it already
        with pytest.raises(AllocatorGone):
            memory.lease(1)
        with start_daemon().connect() as other:
            assert other.statistics().pool.num_leases == 3
            [new] = memory.lease_many(GRANULE, 1)
            statistics = other.statistics()
            assert statistics.pool.num_leases == 2
            assert statistics.pool.evictable_bytes == GRANULE
            assert bytes(kept.buffer[:4]) == b"kept"
            assert bytes(new.buffer[:4]) == bytes(4)
            memory.release_many([kept, new])
            assert other.statistics().pool.leased_bytes == 0
            other.check_integrity()


def test_with_a_daemon_that_knows_nothing_of_it_a_lease_keeps_its_bytes(
    daemon: DaemonProcess, start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    """They are in a pool that is nobody's any more, beside that of the next daemon."""
    with daemon.connect() as memory:
        old = memory.lease(GRANULE)
        old.buffer[:3] = b"old"
        [block] = memory.put_blocks([(digest(1), memory.lease(1))])
        assert block is not None
        daemon.kill()
        runtime_dir.journal.unlink()
        start_daemon()
        new = memory.lease(GRANULE)
        assert new.extent == old.extent
        new.buffer[:3] = b"new"
        assert (bytes(old.buffer[:3]), bytes(new.buffer[:3])) == (b"old", b"new")
        assert len(block.buffer) == GRANULE
        block.release()
        old.release()
        assert bytes(new.buffer[:3]) == b"new"
        assert memory.statistics().pool.num_leases == 1
        new.release()
        assert memory.statistics().pool.num_leases == 0


def test_whose_session_was_cut_can_no_longer_reach_what_is_anothers_now(
    connect: Connect,
) -> None:
    memory, other = connect(), connect()
    lost = memory.lease(GRANULE)
    memory._connection._lifeline.connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: other.statistics().num_sessions == 1, "the session has ended")
    found = other.lease(GRANULE)
    assert found.extent == lost.extent
    found.buffer[:5] = b"found"
    mine = memory.lease(GRANULE)  # in a session of its own
    with pytest.raises(ValueError, match="the window is closed"):
        assert lost.buffer
    assert bytes(found.buffer[:5]) == b"found"
    assert mine.extent != found.extent
    memory.release_many([lost, mine])
    assert bytes(found.buffer[:5]) == b"found"
    assert [lease.is_held for lease in (lost, mine, found)] == [False, False, True]
    assert memory.statistics().pool.num_leases == 1


# --- room


@pytest.fixture
def small(start_daemon: StartDaemon) -> DaemonProcess:
    """An allocator that may use 16 granules: 1 MiB."""
    return start_daemon("--memory-limit", "1MiB")


def test_who_holds_what_is_said_when_there_is_no_room(small: DaemonProcess) -> None:
    with (
        small.connect(model="smollm2", user="ada") as first,
        small.connect(model="", user="") as second,
        small.connect(model="qwen", user="") as third,
    ):
        first.lease_many(GRANULE, 5)
        second.lease(GRANULE)
        [block] = third.put_blocks([(digest(1), third.lease(2 * GRANULE))])
        assert block is not None
        idle_set(third, "idle", 4 * GRANULE)
        reader = third.open_weight_set("idle", {})
        assert not isinstance(reader, WeightSetWriter)
        with pytest.raises(OutOfDeviceMemory) as caught:
            third.lease_many(GRANULE, 5)
        assert str(caught.value) == (
            "0.3 MB are needed, but the limit is 1.0 MB, and 0.8 MB of it are in use: "
            "smollm2 of ada (5 leases, 0.3 MB), idle (sealed, 0.3 MB), "
            "pinned prefix blocks (0.1 MB), session 2 (1 leases, 0.1 MB). "
            "Stop one of them, or raise --memory-limit."
        )
        third.lease_many(GRANULE, 4)
        reader.release()


def test_blocks_and_sets_go_in_the_order_of_their_last_use(small: DaemonProcess) -> None:
    with small.connect() as memory:
        for number in range(4):
            cached(memory, number)
        idle_set(memory, "set", 4 * GRANULE)
        for number in range(4, 8):
            cached(memory, number)
        for number in (0, 2):  # used once more
            memory.look_up_blocks([digest(number)])[0].release()
        assert memory.statistics().used_bytes == 12 * GRANULE
        lease = memory.lease(6 * GRANULE)
        assert keys(memory) == {"set"}
        lease.release()
        assert numbers_cached(memory, 8) == {0, 2, 4, 5, 6, 7}
        # Looking has used the blocks: now the set is what nobody used for longest.
        memory.lease(8 * GRANULE)
        assert keys(memory) == set()
        assert numbers_cached(memory, 8) == {0, 2, 4, 5, 6, 7}
        memory.lease_many(GRANULE, 3)
        assert numbers_cached(memory, 8) == {2, 4, 5, 6, 7}
        statistics = memory.statistics()
        assert (statistics.num_evictions, statistics.pool.num_block_evictions) == (1, 3)
        assert statistics.used_bytes == 16 * GRANULE


def test_what_is_pinned_or_read_stays(small: DaemonProcess) -> None:
    with small.connect() as memory, small.connect() as other:
        for number in range(4):
            cached(memory, number, 2 * GRANULE)
        pinned = memory.look_up_blocks([digest(1)])
        idle_set(memory, "kept", 2 * GRANULE)
        memory.pin("kept")
        for wish in (
            lambda: other.lease(13 * GRANULE),
            lambda: other.lease_many(GRANULE, 13),
            lambda: idle_set(other, "large", 13 * GRANULE),
        ):
            with pytest.raises(OutOfDeviceMemory):
                wish()
            assert numbers_cached(memory, 4) == {0, 1, 2, 3}  # nothing went in vain
        idle_set(other, "large", 12 * GRANULE)
        assert keys(memory) == {"kept", "large"}
        assert numbers_cached(memory, 4) == {1}
        assert bytes(pinned[0].buffer) == b"\1" * (2 * GRANULE)
        memory.pin("kept", False)
        memory.release_blocks(pinned)
        memory.lease(16 * GRANULE)
        assert keys(memory) == set()
        assert numbers_cached(memory, 4) == set()


def test_evicted_blocks_give_their_memory_to_who_comes(
    small: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    with small.connect() as memory:
        for number in range(16):
            cached(memory, 1 + number)
        assert pool_bytes(runtime_dir) == MIB
        lease = memory.lease(MIB)
        assert bytes(lease.buffer) == bytes(MIB)  # of what was there nothing is left
        lease.release()
        assert pool_bytes(runtime_dir) == 0


# --- quotas


def test_a_quota_is_for_all_sessions_of_a_model(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--quota", "model:m=1MiB", "--quota", "user:u=2MiB")
    with (
        ClientProcess(daemon.runtime_dir, model="m", user="a") as first,
        ClientProcess(daemon.runtime_dir, model="m", user="b") as second,
        daemon.connect(model="n", user="b") as third,
    ):
        offsets = first.do.lease(512 * KIB)
        second.do.lease(256 * KIB)
        told = r"QuotaExceeded: 0\.3 MB more are asked for, but the model 'm' may hold 1\.0 MB"
        with pytest.raises(Refused, match=told):
            second.do.lease(256 * KIB + 1)
        third.lease(4 * MIB)
        first.do.release_leases(offsets)
        second.do.lease(512 * KIB)
        quotas = {(q.kind, q.name): q for q in third.statistics().quotas}
        assert quotas["model", "m"].used_bytes == 768 * KIB
        assert quotas["user", "u"].used_bytes == 0
        # Weight sets count as well, and who dies gives back.
        with pytest.raises(Refused, match="QuotaExceeded"):
            first.do.load("k", 512 * KIB, 1)
        first.do.abandon()
        second.kill()
        wait_until(lambda: third.statistics().num_sessions == 2, "its session has ended")
        first.do.load("k", 512 * KIB, 1)
        quotas = {(q.kind, q.name): q for q in third.statistics().quotas}
        assert quotas["model", "m"].used_bytes == 512 * KIB + 4096


def test_a_quota_can_be_set_and_lifted_at_any_time(connect: Connect) -> None:
    memory, admin = connect(model="m", user="u"), connect()
    memory.lease(4 * GRANULE)
    for kind, name in (("user", "u"), ("model", "m")):
        admin.set_quota(kind, name, 5 * GRANULE)
        memory.lease(GRANULE).release()
        with pytest.raises(QuotaExceeded, match=f"the {kind} '{name}' may hold 0.3 MB"):
            memory.lease(2 * GRANULE)
        admin.set_quota(kind, name, None)
        memory.lease(2 * GRANULE).release()
    with pytest.raises(InvalidMessage, match="a quota is a model's or a user's"):
        admin.set_quota("device", "host", 1)


def test_a_session_is_charged_to_who_runs_it_unless_it_says_otherwise(connect: Connect) -> None:
    import pwd

    connect(label="default")
    connect(label="named", user="ada", model="m")
    told = {one.label: (one.user, one.model) for one in connect().statistics().sessions}
    assert told["default"] == (pwd.getpwuid(os.geteuid()).pw_name, "")
    assert told["named"] == ("ada", "m")


def held(leases: list[Lease]) -> list[int]:
    return [lease.extent.offset for lease in leases]


def test_a_pool_in_pieces_gives_what_is_there_and_evicts_blocks_for_a_whole(
    small: DaemonProcess,
) -> None:
    with small.connect() as memory:
        leases = memory.lease_many(GRANULE, 16)
        memory.release_many(leases[1::4])
        assert memory.statistics().pool.fragmentation == 0.75
        with pytest.raises(
            OutOfDeviceMemory, match=r"the largest free one of the pool has 0\.1 MB"
        ):
            memory.lease(2 * GRANULE)
        [block] = memory.put_blocks([(digest(1), leases[2])])
        assert block is not None
        with pytest.raises(OutOfDeviceMemory):
            memory.lease(2 * GRANULE)
        block.release()
        [whole] = memory.lease_many(2 * GRANULE, 1)
        assert whole.extent.offset == leases[1].extent.offset
        assert memory.statistics().pool.num_blocks == 0
        assert sorted(held(memory.lease_many(GRANULE, 3))) == held(leases[5::4])


def test_leases_of_a_process_are_seen_in_its_maps_only_while_they_are_held(memory: Client) -> None:
    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum("/dev/shm/onecopy-" in line for line in lines)

    lease = memory.lease(GRANULE)
    assert mapped() == 1
    lease.release()
    assert mapped() == 0
