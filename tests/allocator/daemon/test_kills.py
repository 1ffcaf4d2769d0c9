"""Kills at chosen and at random moments: of writers, of all clients at once, of the daemon.

After each the books are right, and no memory is left that nobody can reach.
"""

import hashlib
import os
import random
import signal
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from allocator import (
    AllocatorError,
    Client,
    Manifest,
    RuntimeDir,
    TensorEntry,
    WeightSetReader,
    WeightSetWriter,
    connect,
)
from allocator.backends.host import SHM_ROOT
from allocator.messages import (
    Done,
    Elected,
    Extent,
    Open,
    Pin,
    Release,
    Reserve,
    Reserved,
    Seal,
    Sealed,
    encode,
)
from tests.allocator.backends.doomed import Doomed, Report
from tests.allocator.daemon.raw_session import RawSession, commit
from tests.allocator.processes import ClientProcess
from tests.daemon_process import DaemonProcess
from tests.leaks import segments, wait_until

KIB = 1 << 10
MIB = 1 << 20
EXTENT = 64 * KIB
SET_BYTES = 128 * KIB
"""After which the memory of a client that was killed is free again."""
StartDaemon = Callable[..., DaemonProcess]


def committed_bytes(runtime_dir: RuntimeDir) -> int:
    """What all segments of the directory take of the machine's memory."""
    names = segments(runtime_dir.segment_prefix)
    return sum((SHM_ROOT / name).stat().st_blocks * 512 for name in names)


# --- a writer


def manifest_of(num_bytes: int) -> Manifest:
    entry = TensorEntry(
        dtype="uint8", shape=(num_bytes,), stride=(1,), offset=0, num_bytes=num_bytes
    )
    return Manifest(version=1, tensors={"x": entry}, metadata={})


def write_slowly(memory: Client, report: Report) -> None:
    """Load the set "k", with a report after each step."""
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    report(1)
    mapping = writer.reserve_uncommitted(SET_BYTES + 4096)
    report(2)
    mapping.commit(0, SET_BYTES // 2)
    report(3)
    mapping.write(0, b"?" * (SET_BYTES // 2))
    writer.progress(SET_BYTES // 2)
    report(4)
    mapping.write(SET_BYTES // 2, b"?" * (SET_BYTES // 2))
    writer.progress(SET_BYTES)
    report(5)
    reader = writer.seal(manifest_of(SET_BYTES), SET_BYTES)
    report(6)
    reader.release()
    report(7)


@pytest.mark.parametrize("step", range(1, 8))
def test_a_writer_that_is_killed_at_any_step_is_followed_by_who_waits(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir, step: int
) -> None:
    daemon = start_daemon()

    def work(report: Report) -> None:
        def report_and_stop(number: int) -> None:
            report(number)
            if number == step:
                signal.pause()

        with connect(runtime_dir) as memory:
            write_slowly(memory, report_and_stop)

    with Doomed(work) as writer, ClientProcess(runtime_dir) as waiter:
        while writer.read() != step:
            pass
        waiter.begin.load("k", MIB, 7)
        writer.kill()
        sealed = step >= 6
        assert waiter.receive() == ("reader" if sealed else "writer")
        expected = b"?" * SET_BYTES if sealed else b"\7" * MIB
        assert waiter.do.digest() == hashlib.sha256(expected).hexdigest()
        with daemon.connect() as memory:
            memory.check_integrity()
            [found] = memory.statistics().weight_sets
            assert found.segment.lstrip("/") in segments(runtime_dir.segment_prefix)
            assert len(segments(runtime_dir.segment_prefix)) == 1


@pytest.mark.parametrize("last", ["open", "reserve", "seal", "release"])
def test_a_writer_that_ends_before_it_is_answered(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir, last: str
) -> None:
    """Its request may have been done: what it was given comes back."""
    daemon = start_daemon()
    raw = RawSession(runtime_dir)
    extent = Extent(offset=0, num_bytes=0)
    steps: dict[str, tuple[Callable[[int], object], type]] = {
        "open": (lambda _: Open(key="k", fingerprint={}, wait_ms=0), Elected),
        "reserve": (lambda g: Reserve(key="k", generation=g, num_bytes=SET_BYTES), Reserved),
        "seal": (
            lambda g: Seal(key="k", generation=g, manifest=extent, manifest_digest=""),
            Sealed,
        ),
        "release": (lambda g: Release(key="k", generation=g), Done),
    }
    generation = 0
    for name, (request, kind) in steps.items():
        message = request(generation)
        if name == last:
            raw.send(encode(message))  # type: ignore[arg-type]
            break
        reply = raw.ask(message)  # type: ignore[arg-type]
        assert isinstance(reply, kind)
        if isinstance(reply, Reserved):
            commit(reply.handle)
        generation = getattr(reply, "generation", generation)
    raw.close()
    with daemon.connect() as memory:
        wait_until(lambda: memory.statistics().num_sessions == 1, "it has ended")
        states = [found.state for found in memory.statistics().weight_sets]
        assert states in ([], ["idle"])
        assert len(segments(runtime_dir.segment_prefix)) == len(states)
        memory.check_integrity()


# --- all clients


def test_the_memory_of_all_clients_that_are_killed_is_free_again(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    daemon = start_daemon()
    with daemon.connect() as memory, ExitStack() as stack:
        seed = memory.lease_many(EXTENT, 2)
        memory.release_blocks(
            [
                b
                for b in memory.put_blocks(
                    [(bytes([n]) * 16, lease) for n, lease in enumerate(seed)]
                )
                if b
            ]
        )
        clients = [stack.enter_context(ClientProcess(runtime_dir)) for _ in range(6)]
        for number, client in enumerate(clients):
            client.do.lease(EXTENT, 16)
            client.do.look_up([(bytes([n]) * 16).hex() for n in range(2)])
            if number % 2:
                assert client.do.open(f"k{number}", {}) == "writer"
                client.do.reserve(MIB)
                client.do.fill(number)
            else:
                assert client.do.load("shared", MIB, 1) == ("writer" if not number else "reader")
        before = memory.statistics()
        assert before.pool.leased_bytes == 6 * 16 * EXTENT
        assert (
            committed_bytes(runtime_dir)
            == before.used_bytes
            == 6 * 16 * EXTENT + 2 * EXTENT + 4 * (MIB + 4096)
        )
        for client in clients:
            os.kill(client.pid, signal.SIGKILL)

        def all_is_free() -> bool:
            now = memory.statistics()
            return (
                now.pool.leased_bytes == 0
                and now.pool.evictable_bytes == 2 * EXTENT
                and [(s.key, s.state) for s in now.weight_sets] == [("shared", "idle")]
                and committed_bytes(runtime_dir) == now.used_bytes == 2 * EXTENT + MIB + 4096
            )

        wait_until(all_is_free, "all that they held is free")
        assert memory.statistics().num_sessions == 1
        memory.check_integrity()
        for client in clients:
            client.kill()


# --- the daemon, while clients work


def patterned(buffer: memoryview, value: int) -> bool:
    return bytes(buffer) == bytes([value]) * len(buffer)


def block_value(number: int) -> int:
    """Equal digests mean equal bytes, whoever writes them."""
    return number * 37 % 251 + 1


class Worker:
    """A client that takes and gives back whatever there is, and checks its bytes every time."""

    def __init__(self, memory: Client, seed: int):
        self._memory = memory
        self._chance = random.Random(seed)
        self._value = seed % 250 + 1
        self._steps = [self._hold, self._share, self._read, self._look]

    def step(self) -> None:
        """Do something, and undo it, unless the daemon is gone."""
        self._chance.choice(self._steps)()

    def _hold(self) -> None:
        count = self._chance.randrange(1, 4)
        leases = self._memory.lease_many(EXTENT, count)
        for lease in leases:
            assert patterned(lease.buffer, 0), "a lease is not empty"
            lease.buffer[:] = bytes([self._value]) * EXTENT
        self._look()
        for lease in leases:
            assert patterned(lease.buffer, self._value), "another one writes to a lease"
        self._memory.release_many(leases)

    def _share(self) -> None:
        number = self._chance.randrange(20)
        digest = bytes([number]) * 16
        found = self._memory.look_up_blocks([digest])
        if not found:
            lease = self._memory.lease(EXTENT)
            lease.buffer[:] = bytes([block_value(number)]) * EXTENT
            [block] = self._memory.put_blocks([(digest, lease)])
            if block is None:
                lease.release()
                return
            found = [block]
        assert patterned(found[0].buffer, block_value(number)), "a block has other bytes"
        self._memory.release_blocks(found)

    def _read(self) -> None:
        number = self._chance.randrange(5)
        opened = self._memory.open_weight_set(f"k{number}", {}, timeout_s=0.2)
        if isinstance(opened, WeightSetReader):
            assert opened.damaged() == [], "a sealed set is damaged"
            opened.release()
            return
        with opened:
            buffer = opened.reserve(SET_BYTES + 4096)
            buffer[:SET_BYTES] = bytes([block_value(number)]) * SET_BYTES
            del buffer
            opened.seal(manifest_of(SET_BYTES), SET_BYTES).release()

    def _look(self) -> None:
        self._memory.statistics()


def work_in(runtime_dir: RuntimeDir, seed: int) -> Callable[[Report], None]:
    """Steps for ever; those that an absent daemon or another writer prevents are left out."""

    def work(report: Report) -> None:
        done = 0
        with connect(runtime_dir) as memory:
            worker = Worker(memory, seed)
            while True:
                try:
                    worker.step()
                except AllocatorError:
                    continue
                done += 1
                report(done)

    return work


@pytest.mark.parametrize("seed", [1, 2])
def test_a_daemon_that_is_killed_again_and_again_while_clients_work(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir, seed: int
) -> None:
    chance = random.Random(seed)
    daemon = start_daemon()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Doomed(work_in(runtime_dir, seed * 10 + n))) for n in range(3)
        ]
        for _ in range(6):
            for worker in workers:
                for _ in range(chance.randrange(1, 30)):
                    assert worker.read() is not None, "a worker found something wrong"
            daemon.kill()
            daemon = start_daemon()
        with daemon.connect() as memory:
            memory.check_integrity()
            for worker in workers:
                worker.kill()
            wait_until(lambda: memory.statistics().num_sessions == 1, "all have ended")
            statistics = memory.statistics()
            assert statistics.pool.leased_bytes == 0
            assert statistics.pool.cached_bytes == statistics.pool.evictable_bytes
            assert {s.state for s in statistics.weight_sets} <= {"idle"}
            assert committed_bytes(runtime_dir) == statistics.used_bytes
            for found in statistics.weight_sets:
                memory.evict(found.key)
            memory.check_integrity()
            assert committed_bytes(runtime_dir) == memory.statistics().pool.cached_bytes


# --- the journal


def test_a_compaction_that_is_killed_in_the_middle_loses_nothing(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    """Long fingerprints make the journal grow, and its compaction take time to be killed in."""
    aside = runtime_dir.journal.with_name(runtime_dir.journal.name + ".new")
    fingerprint = {f"{n:03}": "x" * 4000 for n in range(200)}
    keys = [f"k{n}" for n in range(4)]
    daemon = start_daemon()
    raw = RawSession(runtime_dir)
    with daemon.connect() as memory:
        for key in keys:
            writer = memory.open_weight_set(key, fingerprint)
            assert isinstance(writer, WeightSetWriter)
            writer.reserve(SET_BYTES + 4096)
            writer.seal(manifest_of(SET_BYTES), SET_BYTES).release()
    pinned = dict.fromkeys(keys, False)
    chance = random.Random(5)
    num_in_the_middle = 0
    for _ in range(20):
        if num_in_the_middle == 3:
            break
        while True:
            key = chance.choice(keys)
            request_id = raw.send(encode(Pin(key=key, pinned=not pinned[key])))
            answered = False
            while not answered and not aside.exists():
                answered = raw.poll()
            if aside.exists():
                break
            assert isinstance(raw.await_reply(request_id), Done)
            pinned[key] = not pinned[key]
        daemon.kill()
        num_in_the_middle += aside.exists()
        raw.close()
        daemon = start_daemon()
        assert not aside.exists()
        raw = RawSession(runtime_dir)
        with daemon.connect() as memory:
            found = {s.key: s.pinned for s in memory.statistics().weight_sets}
            assert {k: v for k, v in found.items() if k != key} == {
                k: v for k, v in pinned.items() if k != key
            }
            pinned[key] = found[key]  # it was on its way: either is right
            memory.check_integrity()
    raw.close()
    assert num_in_the_middle == 3
