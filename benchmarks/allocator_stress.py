"""Random work by real clients that are killed at random, and proof that nothing is lost.

8 client processes lease and return extents, put and look up blocks, load, read, move and evict
weight sets, and check what they read. All the while some of them are ended by SIGKILL and replaced,
and now and then the allocator itself is; those that live go on with what they hold. Afterwards all
must add up: every invariant of the daemon holds, nothing is held by anybody who is gone, memory
that nobody uses can be had again to the last byte, and no segment, file, descriptor or process is
left over. Prints JSON; exit status 1 where anything does not add up.

  python benchmarks/allocator_stress.py [--operations 100000] [--clients 8] [--daemon-kills 9]
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _machine import describe_machine, steal_ticks

from allocator import (
    AllocatorError,
    AllocatorGone,
    Block,
    Client,
    Lease,
    Manifest,
    RuntimeDir,
    TensorEntry,
    WeightSetReader,
    WeightSetWriter,
    connect,
    manifest_bytes,
)
from allocator.errors import Unanswered

LIMIT_BYTES = 256 << 20
KIB = 1 << 10
NUM_KEYS = 6
NUM_BLOCKS = 64
PATIENCE_S = 60.0
LABEL = "stress"
LEAK = "leak"
BOOKS = "books"


def main() -> int:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--daemon-kills", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steal = steal_ticks()
    with tempfile.TemporaryDirectory(prefix="onecopy-stress-") as folder:
        stage = Stage(Path(folder), arguments.clients, arguments.seed)
        outcome = stage.play(arguments.operations, arguments.daemon_kills)
    document = {
        "benchmark": "allocator_stress",
        **describe_machine(),
        "clients": arguments.clients,
        "seed": arguments.seed,
        **outcome,
        "steal_ticks": steal_ticks() - steal,
    }
    print(json.dumps(document, indent=2))
    return 1 if outcome["problems"] else 0


class Board:
    """Counters in memory that all processes share. Each cell has one writer, so that one killed in
    the middle of anything leaves no lock behind."""

    def __init__(self, num_cells: int) -> None:
        self._cells = mmap.mmap(-1, 8 * num_cells)

    def add(self, cell: int) -> None:
        self.put(cell, self.get(cell) + 1)

    def get(self, cell: int) -> int:
        value: int = struct.unpack_from("q", self._cells, 8 * cell)[0]
        return value

    def put(self, cell: int, value: int) -> None:
        struct.pack_into("q", self._cells, 8 * cell, value)


class Stage:
    """The daemon, the clients, and what is done to them."""

    def __init__(self, folder: Path, num_clients: int, seed: int) -> None:
        self.runtime_dir = folder / "run"
        self.runtime_dir.mkdir(mode=0o700)
        self.images = folder / "images"
        self._chance = random.Random(seed)
        self._num_clients = num_clients
        # A cell a client for its operations, for those that were refused, for wrong bytes that it
        # read, for wrong books that it saw; and one to stop all.
        self._board = Board(4 * num_clients + 1)
        self._clients: dict[int, int] = {}  # pid → slot
        self._num_started = 0
        self._daemon = self._start_daemon()

    def play(self, num_operations: int, num_daemon_kills: int) -> dict[str, Any]:
        num_client_kills = 0
        with connect(self.runtime_dir) as memory:
            memory.statistics()  # its connection is there once it was answered
            fds_before = _descriptors(memory.daemon_pid)
        for slot in range(self._num_clients):
            self._start_client(slot)
        started = time.monotonic()
        kill_at = [
            num_operations * n // (num_daemon_kills + 1) for n in range(num_daemon_kills, 0, -1)
        ]
        adopted: Counter[str] = Counter()
        while (done := self._num_operations()) < num_operations:
            time.sleep(self._chance.uniform(0.01, 0.08))
            self._reap()
            if kill_at and done > kill_at[-1]:
                kill_at.pop()
                adopted += self._replace_daemon()
            if self._chance.random() < 0.4:
                self._kill_one()
                num_client_kills += 1
        elapsed = time.monotonic() - started
        problems = self._end_clients()
        problems += self._check(fds_before, num_daemon_kills)
        wrong_bytes = self._sum(2)
        return {
            "operations": self._num_operations(),
            "seconds": round(elapsed, 1),
            "operations_per_s": round(self._num_operations() / elapsed),
            "client_kills": num_client_kills,
            "clients_started": self._num_started,
            "daemon_kills": num_daemon_kills - len(kill_at),
            "adopted": dict(adopted),
            "refused": self._sum(1),
            "wrong_bytes": wrong_bytes,
            "leaks": sum(problem.startswith(LEAK) for problem in problems),
            "conservation": not any(problem.startswith(BOOKS) for problem in problems),
            "problems": problems,
        }

    def _num_operations(self) -> int:
        return self._sum(0)

    def _sum(self, row: int) -> int:
        first = row * self._num_clients
        return sum(self._board.get(first + slot) for slot in range(self._num_clients))

    # --- processes

    def _start_daemon(self) -> "subprocess.Popen[bytes]":
        ready_read, ready_write = os.pipe()
        command = [sys.executable, "-P", "-m", "allocator", "--quiet"]
        command += ["--runtime-dir", str(self.runtime_dir), "--image-dir", str(self.images)]
        command += ["--memory-limit", str(LIMIT_BYTES), "--ready-fd", str(ready_write)]
        daemon = subprocess.Popen(command, pass_fds=[ready_write])
        os.close(ready_write)
        assert os.read(ready_read, 1), "the allocator did not start"
        os.close(ready_read)
        return daemon

    def _replace_daemon(self) -> "Counter[str]":
        """Kill it, start another; what that one took over."""
        self._daemon.kill()
        self._daemon.wait()
        self._daemon = self._start_daemon()
        with connect(self.runtime_dir) as memory:
            now = memory.statistics()
            memory.check_integrity()
        sessions = [one for one in now.sessions if one.label == LABEL]
        return Counter(
            weight_sets=now.num_adopted_sets,
            sessions=len(sessions),
            leases=sum(one.num_leases for one in sessions),
            blocks=now.pool.num_blocks,
        )

    def _start_client(self, slot: int) -> None:
        self._num_started += 1
        seed = self._chance.getrandbits(32)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                Actor(self, slot, seed).run()
                status = 0
            finally:
                os._exit(status)
        self._clients[pid] = slot

    def _kill_one(self) -> None:
        pid = self._chance.choice(list(self._clients))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._start_client(self._clients.pop(pid))

    def _reap(self) -> None:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG) if self._clients else (0, 0)
            if pid not in self._clients:
                return
            raise RuntimeError(f"a client ended by itself with status {status}")

    def _end_clients(self) -> list[str]:
        """Half of them end in order, half by SIGKILL."""
        for pid in list(self._clients)[::2]:
            os.kill(pid, signal.SIGKILL)
        self._board.put(4 * self._num_clients, 1)
        wrong = [
            f"{LEAK}: client {slot} ended with status {status}"
            for index, (pid, slot) in enumerate(self._clients.items())
            if (status := os.waitpid(pid, 0)[1]) and index % 2
        ]
        self._clients.clear()
        return wrong

    @property
    def stopped(self) -> bool:
        return bool(self._board.get(4 * self._num_clients))

    def count(self, slot: int, *, refused: bool) -> None:
        self._board.add(slot)
        if refused:
            self._board.add(self._num_clients + slot)

    def complain(self, slot: int) -> None:
        """Bytes are not what was written."""
        self._board.add(2 * self._num_clients + slot)

    def complain_of_books(self, slot: int) -> None:
        """The daemon's numbers do not add up, or are not what the client knows of."""
        self._board.add(3 * self._num_clients + slot)

    # --- the reckoning

    def _check(self, fds_before: list[str], num_daemon_kills: int) -> list[str]:
        problems: list[str] = []

        def expect(kind: str, holds: object, what: str) -> None:
            if not holds:
                problems.append(f"{kind}: {what}")

        wrong = self._sum(2)
        expect("bytes", not wrong, f"{wrong} times a client read bytes that nobody wrote")
        wrong = self._sum(3)
        expect(BOOKS, not wrong, f"{wrong} times a client saw numbers that are not right")
        prefix = RuntimeDir.open(self.runtime_dir).segment_prefix.lstrip("/")
        with connect(self.runtime_dir) as memory:
            deadline = time.monotonic() + PATIENCE_S
            while memory.statistics().num_sessions > 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            memory.check_integrity()
            now = memory.statistics()
            others = now.num_sessions - 1
            expect(LEAK, not others, f"{others} sessions outlived their clients")
            pool = now.pool
            expect(BOOKS, pool.leased_bytes == 0, f"{pool.leased_bytes} bytes leased by nobody")
            expect(BOOKS, pool.cached_bytes == pool.evictable_bytes, "a block is pinned by nobody")
            idle = [one for one in now.weight_sets if one.tier == "device"]
            expect(BOOKS, all(one.state == "idle" for one in idle), "a set is held by nobody")
            held = sum(one.num_bytes for one in idle) + pool.cached_bytes
            expect(BOOKS, now.used_bytes == held, f"{now.used_bytes} bytes used, {held} accounted")
            for one in now.weight_sets:
                memory.pin(one.key, False)
                memory.evict(one.key, image=True)
            for lease in memory.lease_many(LIMIT_BYTES // 2, 2):  # every byte can be had again
                lease.release()
            empty = memory.statistics()
            expect(BOOKS, empty.used_bytes == 0, f"{empty.used_bytes} bytes used by nothing")
            asleep = empty.host_tier_bytes
            expect(BOOKS, asleep == 0, f"{asleep} bytes asleep as nothing")
            memory.check_integrity()
            found = [path for path in Path("/dev/shm").iterdir() if path.name.startswith(prefix)]
            # The daemon's own, and those of daemons whose segments it has taken over.
            owners = [path for path in found if path.name.endswith("-owner")]
            most = 1 + num_daemon_kills
            expect(LEAK, len(owners) <= most, f"{len(owners)} files say whose segments are")
            left = [path for path in found if path not in owners]
            blocks = sum(path.stat().st_blocks for path in left)
            expect(LEAK, len(left) <= 1, f"segments are left: {[path.name for path in left]}")
            expect(LEAK, blocks == 0, f"{blocks * 512} bytes of shared memory are left")
            fds = _descriptors(memory.daemon_pid)
            shared = [fd for fd in fds if fd.startswith("/dev/shm/")]
            few = len(shared) <= len(owners) + len(left)
            expect(LEAK, few, f"the daemon has {shared} open")
            fds = [fd for fd in fds if fd not in shared]
            few = len(fds) <= len(fds_before)
            expect(LEAK, few, f"the daemon has {fds}, at first {fds_before}")
        images = list(self.images.iterdir()) if self.images.is_dir() else []
        expect(LEAK, not images, f"images are left: {[path.name for path in images]}")
        self._daemon.send_signal(signal.SIGTERM)
        expect(LEAK, self._daemon.wait(PATIENCE_S) == 0, "the daemon did not end in order")
        left = [path for path in Path("/dev/shm").iterdir() if path.name.startswith(prefix)]
        expect(LEAK, not left, f"the daemon left {[path.name for path in left]}")
        files = [path.name for path in self.runtime_dir.iterdir()]
        expect(LEAK, not files, f"the daemon left {files}")
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        expect(LEAK, not children, f"the processes {children} are left")
        return problems


class Actor:
    """One client process: does things at random, and checks what it reads."""

    def __init__(self, stage: Stage, slot: int, seed: int) -> None:
        self._stage = stage
        self._slot = slot
        self._chance = random.Random(seed)
        self._leases: list[tuple[Lease, bytes]] = []
        self._blocks: list[tuple[int, Block]] = []
        self._readers: list[WeightSetReader] = []

    def run(self) -> None:
        while not self._stage.stopped:
            try:
                memory = connect(self._stage.runtime_dir, timeout_s=PATIENCE_S, label=LABEL)
            except AllocatorGone:
                time.sleep(0.02)  # killed; another is about to start
            else:
                with memory:
                    self._act(memory)

    def _act(self, memory: Client) -> None:
        deeds = [self._lease] * 5 + [self._give_back] * 5 + [self._put] * 4 + [self._look_up] * 4
        deeds += [self._unpin] * 4 + [self._open] * 4 + [self._release] * 4
        deeds += [self._sleep, self._wake, self._evict, self._pin, self._look]
        while not self._stage.stopped:
            try:
                self._chance.choice(deeds)(memory)
            except AllocatorGone:  # killed; the session goes on with its successor
                self._stage.count(self._slot, refused=True)
                time.sleep(0.05)
            except AllocatorError:  # refused, as it may be: busy, full, unknown, timed out
                self._stage.count(self._slot, refused=True)
            else:
                self._stage.count(self._slot, refused=False)

    def _lease(self, memory: Client) -> None:
        if len(self._leases) > 12:
            return self._give_back(memory)
        size = self._chance.choice([4, 64, 200, 1024]) * KIB
        for lease in memory.lease_many(size, self._chance.randint(1, 3)):
            if any(lease.buffer[:64]) or any(lease.buffer[-64:]):
                self._stage.complain(self._slot)  # it is zero at first
            mark = self._chance.randbytes(64)
            lease.buffer[:64] = lease.buffer[-64:] = mark
            self._leases.append((lease, mark))
        return None

    def _give_back(self, memory: Client) -> None:
        self._chance.shuffle(self._leases)
        mine, self._leases = self._leases[:3], self._leases[3:]
        for lease, mark in mine:
            if lease.buffer[:64] != mark or lease.buffer[-64:] != mark:
                self._stage.complain(self._slot)  # somebody else wrote to it
        memory.release_many([lease for lease, _ in mine])

    def _put(self, memory: Client) -> None:
        number = self._chance.randrange(NUM_BLOCKS)
        lease = memory.lease(64 * KIB)
        lease.buffer[:] = _block_bytes(number)
        try:
            (block,) = memory.put_blocks([(_block_digest(number), lease)])
        except Unanswered:  # the lease has ended
            raise
        except AllocatorError:
            lease.release()
            raise
        if block is None:
            lease.release()
        else:
            self._blocks.append((number, block))

    def _look_up(self, memory: Client) -> None:
        first = self._chance.randrange(NUM_BLOCKS)
        numbers = range(first, min(first + 4, NUM_BLOCKS))
        found = memory.look_up_blocks([_block_digest(number) for number in numbers])
        self._blocks += zip(numbers, found, strict=False)
        self._check_blocks(self._blocks[-len(found) :] if found else [])

    def _unpin(self, memory: Client) -> None:
        self._chance.shuffle(self._blocks)
        mine, self._blocks = self._blocks[:6], self._blocks[6:]
        self._check_blocks(mine)
        memory.release_blocks([block for _, block in mine])

    def _check_blocks(self, blocks: list[tuple[int, Block]]) -> None:
        for number, block in blocks:
            if block.buffer != _block_bytes(number):
                self._stage.complain(self._slot)

    def _open(self, memory: Client) -> None:
        if len(self._readers) > 3:
            return self._release(memory)
        number = self._chance.randrange(NUM_KEYS)
        opened = memory.open_weight_set(_key(number), {"number": str(number)}, timeout_s=2.0)
        if isinstance(opened, WeightSetWriter):
            opened = self._load(opened, number)
        if opened is not None:
            if opened.damaged():
                self._stage.complain(self._slot)
            self._readers.append(opened)
        return None

    def _load(self, writer: WeightSetWriter, number: int) -> WeightSetReader | None:
        num_bytes = (number + 1) << 20
        with writer:
            if self._chance.random() < 0.2:
                return None  # it changes its mind
            entry = TensorEntry(
                dtype="uint8", shape=(num_bytes,), stride=(1,), offset=0, num_bytes=num_bytes
            )
            manifest = Manifest(version=1, tensors={"weight": entry}, metadata={})
            mapping = writer.reserve_uncommitted(num_bytes + manifest_bytes(manifest))
            mapping.write(0, bytes([number + 1]) * num_bytes)
            return writer.seal(manifest, num_bytes)

    def _release(self, _memory: Client) -> None:
        if self._readers:
            reader = self._readers.pop(self._chance.randrange(len(self._readers)))
            if self._chance.random() < 0.2 and reader.damaged():
                self._stage.complain(self._slot)
            reader.release()

    def _sleep(self, memory: Client) -> None:
        memory.sleep(self._any_key(), level=self._chance.choice([1, 2]), timeout_s=2.0)

    def _wake(self, memory: Client) -> None:
        memory.wake(self._any_key(), timeout_s=2.0)

    def _evict(self, memory: Client) -> None:
        memory.evict(self._any_key(), image=self._chance.random() < 0.5)

    def _pin(self, memory: Client) -> None:
        memory.pin(self._any_key(), self._chance.random() < 0.3)

    def _look(self, memory: Client) -> None:
        statistics = memory.statistics()
        pool = statistics.pool
        used = statistics.weights_bytes + pool.leased_bytes + pool.cached_bytes
        if used != statistics.used_bytes or used > LIMIT_BYTES:
            self._stage.complain_of_books(self._slot)
        # After a kill, too, the allocator holds for this session what it knows of, and no more.
        mine = next(one for one in statistics.sessions if one.pid == os.getpid())
        num_reads = sum(one.reader_pids.count(mine.pid) for one in statistics.weight_sets)
        held = (mine.num_leases, mine.num_pinned_blocks, num_reads)
        if held != (len(self._leases), len(self._blocks), len(self._readers)):
            self._stage.complain_of_books(self._slot)

    def _any_key(self) -> str:
        return _key(self._chance.randrange(NUM_KEYS))


def _descriptors(pid: int) -> list[str]:
    return sorted(str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir())


def _key(number: int) -> str:
    return f"stress-{number}"


def _block_digest(number: int) -> bytes:
    return hashlib.sha256(_block_bytes(number)).digest()


def _block_bytes(number: int) -> bytes:
    return struct.pack("<I", number * 2654435761 % 2**32) * (64 * KIB // 4)


if __name__ == "__main__":
    sys.exit(main())
