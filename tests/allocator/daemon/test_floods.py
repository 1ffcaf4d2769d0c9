"""Peers that send without end, or read nothing: what the daemon holds for them is bounded, others
are served, and nothing that was lost on the way is taken for done."""

import contextlib
import gc
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import Client, RuntimeDir
from allocator.client.session.connection import Connection
from allocator.daemon.clients.flood import MemoryWatch, flooding_connections
from allocator.errors import AllocatorError, Unanswered
from allocator.lifeline import Lifeline
from allocator.messages import (
    PROTOCOL_VERSION,
    GetRegions,
    GetShare,
    GetStatistics,
    Hello,
    Open,
    Share,
    UnpinBlocks,
    encode,
    plain_password,
)
from tests.allocator.daemon import zmtp
from tests.allocator.daemon.raw_session import RawSession
from tests.allocator.processes import ClientProcess
from tests.daemon_process import TIMEOUT_S, DaemonProcess
from tests.leaks import wait_until

MIB = 1 << 20
HELLO = Hello(version=PROTOCOL_VERSION, label="flood")
BOUND_BYTES = 400 * MIB
"""64 MiB are allowed. What comes on top is what can be sent before the daemon looks again."""
StartDaemon = Callable[..., DaemonProcess]


def private_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def warm_daemon() -> None:
    """None: what a daemon holds of its own is measured, from its beginning."""


@pytest.fixture
def good(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.connect() as client:
        yield client
        client.check_integrity()
        assert client.daemon_pid == daemon.pid
        assert daemon.process.poll() is None


def requests_path(runtime_dir: RuntimeDir) -> Path:
    return Path(runtime_dir.allocator_requests.removeprefix("ipc://"))


class Flooder:
    """A process of its own, since whoever floods is known by its pid: a lifeline, and a connection
    on which parts of a message come without end, and another one whenever that is cut. Ends by
    itself with its session."""

    def __init__(self, runtime_dir: RuntimeDir, part_bytes: int) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                lifeline = Lifeline.connect(runtime_dir.lifeline, 60.0, HELLO)
                password = plain_password(lifeline.welcome.token)
                chunk = zmtp.frame(b"x" * part_bytes, more=True)
                chunk *= max(1, (1 << 18) // len(chunk))
                while lifeline.is_open():
                    lifeline.take_loss()  # what is unread would look as if it were open
                    with (
                        contextlib.suppress(OSError),  # cut off, or not let in again
                        zmtp.connect(requests_path(runtime_dir), password, 60.0) as connection,
                    ):
                        while True:
                            connection.sendall(chunk)
            finally:
                os._exit(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("part_bytes", [64, 1000, 64 << 10, MIB])
def test_a_message_without_end(
    daemon: DaemonProcess, good: Client, runtime_dir: RuntimeDir, part_bytes: int
) -> None:
    """Its sender loses its session, everybody else nothing."""
    lease = good.lease(MIB)
    lease.buffer[:] = b"\7" * MIB
    before = private_bytes(daemon.pid)
    flooder = Flooder(runtime_dir, part_bytes)
    most = 0
    try:
        while os.waitpid(flooder.pid, os.WNOHANG) == (0, 0):
            most = max(most, private_bytes(daemon.pid))
            good.lease(64 << 10).release()
    except BaseException:
        flooder.kill()
        flooder.wait()
        raise
    assert most < before + BOUND_BYTES
    assert any(event.kind == "cut off" for event in good.events())
    assert bytes(lease.buffer) == b"\7" * MIB
    assert good.statistics().num_sessions == 1
    wait_until(lambda: private_bytes(daemon.pid) < before + 70 * MIB, "it is given back")
    lease.release()


def test_parts_of_messages_that_never_come_on(
    daemon: DaemonProcess, good: Client, runtime_dir: RuntimeDir
) -> None:
    """Many that send a little, and then nothing: nobody floods when it is looked, so that all
    connections begin anew. What others had asked meanwhile is asked again."""
    before = private_bytes(daemon.pid)
    lifeline = Lifeline.connect(runtime_dir.lifeline, 60.0, HELLO)
    password = plain_password(lifeline.welcome.token)
    part = zmtp.frame(b"x" * 65536, more=True) * 16
    opened = []
    try:
        for _ in range(300):  # 1 MiB each, were they all kept
            with contextlib.suppress(OSError):
                opened.append(zmtp.connect(requests_path(runtime_dir), password, 60.0))
                opened[-1].sendall(part)
            assert private_bytes(daemon.pid) < before + BOUND_BYTES
            good.lease(64 << 10).release()
    finally:
        for connection in opened:
            connection.close()
        lifeline.close()
    wait_until(lambda: private_bytes(daemon.pid) < before + 70 * MIB, "it is given back")


def test_without_a_session_nobody_gets_past_the_handshake(
    daemon: DaemonProcess, good: Client, runtime_dir: RuntimeDir
) -> None:
    path = requests_path(runtime_dir)
    for password in (None, b"", b"wrong", plain_password(bytes(16)), b"\xff" * 32):
        with pytest.raises(OSError, match=r"hung up|the peer said|reset"):
            zmtp.connect(path, password, 60.0)
    lifeline = Lifeline.connect(runtime_dir.lifeline, 60.0, HELLO)
    password = plain_password(lifeline.welcome.token)
    zmtp.connect(path, password, 60.0).close()
    lifeline.close()
    wait_until(lambda: good.statistics().num_sessions == 1, "the session has ended")
    with pytest.raises(OSError, match=r"hung up|the peer said|reset"):
        zmtp.connect(path, password, 60.0)


def test_answers_that_nobody_reads(daemon: DaemonProcess, good: Client) -> None:
    before = private_bytes(daemon.pid)
    slow = [RawSession(daemon.runtime_dir) for _ in range(5)]
    leases = good.lease_many(64 << 10, 1000)
    good.release_many(leases[::2])  # a long answer, so
    for _ in range(200):
        for session in slow:
            session.send(encode(GetRegions()))
    assert good.statistics().num_sessions == 6
    assert private_bytes(daemon.pid) < before + BOUND_BYTES
    for session in slow:
        session.close()
    good.release_many(leases[1::2])


# --- when answers are lost


@pytest.fixture
def lossy(start_daemon: StartDaemon, runtime_dir: RuntimeDir) -> Iterator[DaemonProcess]:
    """A daemon whose connections all begin anew whenever it gets SIGUSR1, as they would where
    memory is short. It writes a byte for each time."""
    program = (
        "import runpy, signal, sys\n"
        "done = open(sys.argv[sys.argv.index('--runtime-dir') + 1] + '/done', 'ab', 0)\n"
        "import allocator.daemon.clients.bounded_router as router\n"
        "wanted = []\n"
        "class Watch(router.MemoryWatch):\n"
        "    @property\n"
        "    def is_exceeded(self):\n"
        "        return bool(wanted)\n"
        "    def settle(self):\n"
        "        wanted.clear()\n"
        "        done.write(b'x')\n"
        "router.MemoryWatch = Watch\n"
        "signal.signal(signal.SIGUSR1, lambda *_: wanted.append(1))\n"
        "runpy.run_module('allocator', run_name='__main__', alter_sys=True)\n"
    )
    yield start_daemon(program=program)
    (runtime_dir.path / "done").unlink()


def begin_anew(daemon: DaemonProcess) -> None:
    """Lose whatever is on its way."""
    done = daemon.runtime_dir.path / "done"
    before = done.stat().st_size
    daemon.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: done.stat().st_size > before, "all connections are new")


def test_what_is_asked_while_connections_begin_anew_is_done_once(lossy: DaemonProcess) -> None:
    """Clients that lease, seal, look up and return all the while: what they hold is what the
    daemon says, and every byte is theirs."""
    stop = threading.Event()
    errors: list[str] = []

    def work(seed: int) -> None:
        with lossy.connect(label=str(seed)) as memory:
            number = 0
            while not stop.is_set():
                number += 1
                mark = bytes([seed, number % 256]) * 32
                try:
                    [lease] = memory.lease_many(64 << 10, 1)
                    if any(lease.buffer[:64]):
                        errors.append("a new lease is not zero")
                    lease.buffer[:64] = mark
                    [block] = memory.put_blocks([(mark, lease)])
                    if block is None:
                        lease.release()
                    else:
                        block.release()
                    found = memory.look_up_blocks([mark])
                    if found and found[0].buffer[:64] != mark:
                        errors.append("a block has other bytes")
                    memory.release_blocks(found)
                except Unanswered:
                    continue
                except AllocatorError as error:
                    errors.append(repr(error))
                    return
            [mine] = [one for one in memory.statistics().sessions if one.label == str(seed)]
            if mine.num_leases or mine.num_pinned_blocks:
                errors.append(f"{mine} is held by nobody's will")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    with lossy.connect() as memory:
        try:
            for _ in range(25):
                seen = memory.statistics().pool.num_lookups
                begin_anew(lossy)
                wait_until(
                    lambda seen=seen: errors or memory.statistics().pool.num_lookups > seen,
                    "it goes on",
                )
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []
        wait_until(lambda: memory.statistics().num_sessions == 1, "they have left")
        pool = memory.statistics().pool
        assert pool.leased_bytes == 0
        assert pool.cached_bytes == pool.evictable_bytes
        memory.check_integrity()


def test_a_request_on_its_way_is_answered_though_all_connections_begin_anew(
    lossy: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    """One that waits for a writer, so that its answer is far away. A request that was lost would be
    missed after the time that the client grants one, which is longer than the test waits."""
    patient = ClientProcess(runtime_dir, request_timeout_s=10 * TIMEOUT_S)
    with ClientProcess(runtime_dir) as writer, patient as waiter:
        assert writer.do.open("k", {}) == "writer"
        writer.do.reserve(MIB)
        waiter.begin.open("k", {}, 10 * TIMEOUT_S)
        with lossy.connect() as memory:
            wait_until(lambda: memory.statistics().num_sessions == 3, "all are there")
            for _ in range(3):
                begin_anew(lossy)
            writer.do.fill(7)
            writer.do.seal()
            assert waiter.receive() == "reader"


def test_who_waited_and_does_not_ask_again_is_not_elected(
    lossy: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    """It has heard that its request may be lost: nobody knows whether it still wants anything."""
    request = encode(Open(key="k", fingerprint={}, wait_ms=60_000))
    with ClientProcess(runtime_dir) as writer, lossy.connect() as memory:
        assert writer.do.open("k", {}) == "writer"
        with (
            contextlib.closing(RawSession(runtime_dir)) as waiter,
            contextlib.closing(RawSession(runtime_dir)) as other,
        ):
            waiter.send(request)
            waiter.await_reply(waiter.send(encode(GetShare()), other.token))  # by then it waits
            begin_anew(lossy)
            assert memory.statistics().weight_sets[0].state == "loading"
            writer.do.abandon()
            assert memory.statistics().weight_sets == ()
            assert waiter.lifeline.take_loss()


def test_what_is_lost_while_the_books_are_compared_is_asked_again(
    lossy: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    """A client that has given something up compares first, and that may be lost as well."""
    session = Connection(runtime_dir, HELLO, 10.0)
    stop = threading.Event()
    errors: list[str] = []
    num_answers = 0

    def work() -> None:
        nonlocal num_answers
        while not stop.is_set() and not errors:
            session.give_up(UnpinBlocks(digests=()))
            try:
                session.request(GetShare(), Share)
            except AllocatorError as error:
                errors.append(repr(error))
            num_answers += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            begin_anew(lossy)
            before = num_answers
            wait_until(lambda before=before: num_answers > before + 1 or errors, "it goes on")
    finally:
        stop.set()
        thread.join()
        session.close()
    assert errors == []


# --- the figures


def test_a_peer_that_is_late_is_no_flood(tmp_path: Path) -> None:
    """What waits unread but does not change belongs to a reader that is busy."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as peer:
        listener.bind(path)
        listener.listen()
        peer.connect(path)
        accepted, _ = listener.accept()
        with accepted:
            peer.sendall(b"x" * 100_000)
            assert flooding_connections(path) == {}
            stop = threading.Event()

            def read_and_write() -> None:
                rng = random.Random(1)
                while not stop.is_set():
                    num_read = len(accepted.recv(rng.randrange(1, 90_000)))
                    peer.sendall(b"x" * num_read)

            thread = threading.Thread(target=read_and_write)
            thread.start()
            try:
                found = wait_until(lambda: flooding_connections(path), "the flood is seen")
            finally:
                stop.set()
                thread.join()
            assert found == {accepted.fileno(): os.getpid()}


def test_the_watch_sees_what_is_held_and_what_was_given_back() -> None:
    watch = MemoryWatch(allowed_bytes=32 * MIB)
    try:
        gc.collect()  # in between it would make up for what is held
        watch.settle()  # as would what this process had kept free
        assert not watch.is_exceeded
        held = [b"x" * MIB for _ in range(64)]
        assert watch.is_exceeded
        watch.settle()  # it is in order
        assert not watch.is_exceeded
        held.clear()
        watch.settle()
        held = [b"x" * MIB for _ in range(40)]
        assert watch.is_exceeded
        held.clear()
        assert not watch.is_exceeded_when_trimmed()
    finally:
        watch.close()


def test_statistics_are_for_who_has_a_session(daemon: DaemonProcess, good: Client) -> None:
    """As before: the token goes with each request, too."""
    session = RawSession(daemon.runtime_dir)
    request = session.send(encode(GetStatistics()), bytes(16))
    assert getattr(session.await_reply(request), "code", "") == "unauthorized"
    session.close()
