"""The client library: fork, threads, what it says when things go wrong."""

import gc
import os
import re
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch
import xxhash

import allocator
from allocator import (
    AllocatorGone,
    AllocatorSilent,
    Client,
    FingerprintMismatch,
    InvalidMessage,
    Manifest,
    OutOfDeviceMemory,
    RuntimeDir,
    TensorEntry,
    WaitTimeout,
    WeightSetReader,
    WeightSetWriter,
    connect,
)
from allocator.errors import BY_CODE, AllocatorError
from tests.allocator.processes import in_fork
from tests.daemon_process import DaemonProcess
from tests.leaks import wait_until

ENTRY = TensorEntry(dtype="uint8", shape=(1000,), stride=(1,), offset=0, num_bytes=1000)
MANIFEST = Manifest(version=1, tensors={"x": ENTRY}, metadata={"made": "here"})


def sealed(memory: Client, key: str = "k") -> WeightSetReader:
    writer = memory.open_weight_set(key, {})
    assert isinstance(writer, WeightSetWriter)
    with writer:
        writer.reserve(4096)
        tensors = writer.writable_tensors(MANIFEST)
        tensors["x"].fill_(7)
        tensors.clear()
        return writer.seal(MANIFEST, 1024)


# --- fork


def test_a_forked_child_is_refused_and_harms_nobody(memory: Client) -> None:
    reader = sealed(memory)
    tensor = reader.tensors()["x"]

    def child() -> str:
        with pytest.raises(AllocatorGone, match=r"belongs to the parent process: connect\(\)"):
            memory.statistics()
        with pytest.raises(AllocatorGone):
            memory.open_weight_set("k", {})
        memory.close()
        memory.close()
        return f"{int(tensor.sum())}"  # what is mapped stays mapped

    assert in_fork(child).text == "7000"
    assert memory.is_alive()
    [found] = memory.statistics().weight_sets
    assert found.reader_pids == (os.getpid(),)
    reader.release()


def test_collecting_the_inherited_client_in_a_child_harms_nobody(daemon: DaemonProcess) -> None:
    clients = [daemon.connect()]
    sealed(clients[0])

    def child() -> str:
        clients.clear()
        gc.collect()
        return "collected"

    assert in_fork(child).text == "collected"
    assert clients[0].statistics().num_sessions == 1
    assert clients[0].statistics().weight_sets[0].state == "sealed"
    clients[0].close()


def test_a_child_can_open_a_session_of_its_own(memory: Client, runtime_dir: RuntimeDir) -> None:
    def child() -> str:
        with connect(runtime_dir) as own:
            return str(own.statistics().num_sessions)

    assert in_fork(child).text == "2"
    wait_until(lambda: memory.statistics().num_sessions == 1, "the child's session has ended")


def test_a_child_that_lives_on_does_not_keep_the_parents_session(daemon: DaemonProcess) -> None:
    inherited = daemon.connect()
    sealed(inherited)
    go_read, go_write = os.pipe()
    started_read, started_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go_write)
            os.write(started_write, b"s")
            os.read(go_read, 1)  # until the parent is done
        finally:
            os._exit(0)
    try:
        assert os.read(started_read, 1) == b"s"
        inherited.close()
        with daemon.connect() as other:
            wait_until(lambda: other.statistics().num_sessions == 1, "the session has ended")
            assert other.statistics().weight_sets[0].state == "idle"
    finally:
        for fd in (go_read, go_write, started_read, started_write):
            os.close(fd)
        os.waitpid(pid, 0)


def test_a_fork_while_a_thread_waits_does_not_hang_the_child(
    daemon: DaemonProcess, memory: Client
) -> None:
    with daemon.connect() as other, ThreadPoolExecutor(1) as pool:
        writer = other.open_weight_set("k", {})
        assert isinstance(writer, WeightSetWriter)
        waiting = threading.Event()
        opened = pool.submit(memory.open_weight_set, "k", {}, on_wait=lambda *_: waiting.set())
        assert waiting.wait(60.0)
        wait_until(
            lambda: _locked(memory._connection._turns._lock), "the thread is inside a request"
        )

        def child() -> str:
            return str(memory.statistics())

        assert in_fork(child).text.startswith("AllocatorGone")
        writer.abandon()
        elected = opened.result(60.0)
        assert isinstance(elected, WeightSetWriter)
        elected.abandon()


def _locked(lock: Any) -> bool:
    """Whether another thread holds it."""
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


# --- threads


def test_many_threads_share_one_client(memory: Client) -> None:
    readers = {f"k{n}": sealed(memory, f"k{n}") for n in range(4)}

    def use(number: int) -> set[str]:
        seen = set()
        for _ in range(25):
            key = f"k{number % 4}"
            reader = memory.open_weight_set(key, {})
            assert isinstance(reader, WeightSetReader)
            assert reader.handle == readers[key].handle
            seen.add(reader.key)
            assert len(memory.statistics().weight_sets) == 4
            reader.release()
        return seen

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(8))) == [{f"k{n % 4}"} for n in range(8)]
    assert all(len(s.reader_pids) == 1 for s in memory.statistics().weight_sets)


def test_threads_take_turns_with_one_that_waits(
    daemon: DaemonProcess, memory: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allocator.client.client._POLL_SLICE_MS", 20)
    with daemon.connect() as other, ThreadPoolExecutor(1) as pool:
        writer = other.open_weight_set("k", {})
        assert isinstance(writer, WeightSetWriter)
        waiting, slices = threading.Event(), []

        def on_wait(done: int, _total: int, _writer: int) -> None:
            slices.append(done)
            waiting.set()

        opened = pool.submit(memory.open_weight_set, "k", {}, on_wait=on_wait)
        assert waiting.wait(60.0)
        before = len(slices)
        for _ in range(40):
            memory.statistics()
        # Each request waits for the slice that is running, and never for a second one.
        num_slices = len(slices) - before
        writer.abandon()
        elected = opened.result(60.0)
        assert isinstance(elected, WeightSetWriter)
        elected.abandon()
        assert num_slices <= 42


def test_who_asks_again_comes_after_who_waited(memory: Client) -> None:
    """Who would win a plain lock is up to the scheduler, so the order itself is looked at."""
    order: list[str] = []

    def ask() -> None:
        with memory._connection._turns.taken():
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        for _ in range(50):
            with memory._connection._turns.taken():
                order.append("first")
                asked = pool.submit(ask)
                wait_until(
                    lambda: _locked(memory._connection._turns._next), "the second is in line"
                )
            with memory._connection._turns.taken():
                order.append("third")
            asked.result(60.0)
    assert order == ["first", "second", "third"] * 50


def test_closing_while_another_thread_waits_is_safe(daemon: DaemonProcess) -> None:
    with daemon.connect() as other, ThreadPoolExecutor(1) as pool:
        writer = other.open_weight_set("k", {})
        memory = daemon.connect()
        waiting = threading.Event()
        opened = pool.submit(memory.open_weight_set, "k", {}, on_wait=lambda *_: waiting.set())
        assert waiting.wait(60.0)
        memory.close()
        with pytest.raises(AllocatorGone, match="closed"):
            opened.result(60.0)
        assert isinstance(writer, WeightSetWriter)
        writer.abandon()


# --- what is said when things go wrong


def test_no_daemon(runtime_dir: RuntimeDir) -> None:
    command = f"start one with `onecopy allocator --runtime-dir {runtime_dir.path}`"
    with pytest.raises(AllocatorGone, match=re.escape(command)):
        connect(runtime_dir)


def test_a_socket_of_a_dead_daemon(daemon: DaemonProcess, runtime_dir: RuntimeDir) -> None:
    daemon.kill()
    assert runtime_dir.lifeline.exists()
    with pytest.raises(AllocatorGone, match="onecopy allocator"):
        connect(runtime_dir)
    DaemonProcess(runtime_dir).stop()  # takes the dead one's files


def test_a_session_goes_on_with_the_next_daemon(
    daemon: DaemonProcess, start_daemon: Callable[..., DaemonProcess]
) -> None:
    with daemon.connect(label="first") as memory:
        reader = sealed(memory)
        tensor = reader.tensors()["x"]
        daemon.kill()
        assert not memory.is_alive()
        with pytest.raises(AllocatorGone, match="ask again once a new allocator runs"):
            memory.statistics()
        successor = start_daemon()
        statistics = memory.statistics()
        assert memory.is_alive()
        assert memory.daemon_pid == statistics.pid == successor.pid
        assert [(one.label, one.adopted) for one in statistics.sessions] == [("first", False)]
        assert statistics.weight_sets[0].reader_pids == (os.getpid(),)
        reader.release()
        assert memory.statistics().weight_sets[0].state == "idle"
        assert int(tensor.sum()) == 7000


@pytest.mark.parametrize("closed", ["before", "after"])
def test_a_session_that_was_closed_without_a_daemon_ends_with_the_next(
    daemon: DaemonProcess, start_daemon: Callable[..., DaemonProcess], closed: str
) -> None:
    """Its process lives on, so its end can't be seen by that."""
    memory = daemon.connect(label="closed")
    sealed(memory)
    memory.lease(1)
    daemon.kill()
    if closed == "before":
        memory.close()
    successor = start_daemon()
    if closed == "after":
        memory.close()
    with successor.connect(label="new") as other:

        def only_the_new_one() -> bool:
            return [one.label for one in other.statistics().sessions] == ["new"]

        wait_until(only_the_new_one, "the closed session has ended")
        statistics = other.statistics()
        assert statistics.weight_sets[0].state == "idle"
        assert statistics.pool.leased_bytes == 0


def test_with_a_daemon_that_knows_nothing_of_it_a_session_begins_anew(
    daemon: DaemonProcess, start_daemon: Callable[..., DaemonProcess], runtime_dir: RuntimeDir
) -> None:
    """What it mapped stays valid; what it held is nobody's any more."""
    with daemon.connect() as memory:
        reader = sealed(memory)
        tensor = reader.tensors()["x"]
        daemon.kill()
        runtime_dir.journal.unlink()
        start_daemon()
        assert memory.statistics().weight_sets == ()
        again = sealed(memory)
        assert again.handle.generation == reader.handle.generation  # and yet another set
        reader.release()  # the allocator does not know of it: there is nothing to give back
        assert memory.statistics().weight_sets[0].reader_pids == (os.getpid(),)
        again.release()
        assert int(tensor.sum()) == 7000
        memory.evict("k")
        other = sealed(memory, "other")
        assert memory.statistics().weight_sets[0].reader_pids == (os.getpid(),)
        other.release()


def test_a_silent_daemon_is_given_up(daemon: DaemonProcess, runtime_dir: RuntimeDir) -> None:
    os.kill(daemon.pid, 19)  # SIGSTOP
    try:
        with pytest.raises(AllocatorSilent, match="does not answer within"):
            connect(runtime_dir, timeout_s=0.1)
    finally:
        os.kill(daemon.pid, 18)  # SIGCONT


def test_a_closed_client_says_so(daemon: DaemonProcess) -> None:
    memory = daemon.connect()
    assert memory.is_alive()
    memory.close()
    memory.close()
    assert not memory.is_alive()
    with pytest.raises(AllocatorGone, match="this session is closed"):
        memory.statistics()


def test_a_wait_ends_in_time(daemon: DaemonProcess, memory: Client) -> None:
    with daemon.connect() as other:
        writer = other.open_weight_set("k", {})
        for timeout_s in (0.0, 0.05):
            with pytest.raises(WaitTimeout, match=f"process {os.getpid()} has been loading 'k'"):
                memory.open_weight_set("k", {}, timeout_s=timeout_s)
        assert isinstance(writer, WeightSetWriter)
        writer.abandon()


def test_a_request_that_is_too_long_is_refused_here(memory: Client) -> None:
    fingerprint = {f"{n:04}": "x" * 4096 for n in range(256)}
    with pytest.raises(InvalidMessage, match="at most"):
        memory.open_weight_set("k", fingerprint)
    assert memory.statistics().weight_sets == ()


def test_errors_keep_their_names_over_the_wire(memory: Client) -> None:
    reader = sealed(memory)
    with pytest.raises(FingerprintMismatch, match="a was 'absent' and is now 'b'"):
        memory.open_weight_set("k", {"a": "b"})
    reader.release()
    with pytest.raises(allocator.UnknownWeightSet):
        reader.release()


def test_every_error_has_a_code_of_its_own() -> None:
    def below(cls: type[AllocatorError]) -> Iterator[type[AllocatorError]]:
        yield cls
        for sub in cls.__subclasses__():
            yield from below(sub)

    found = set(below(AllocatorError))
    named = {cls for cls in found if cls.__module__ == "allocator.errors"}
    assert {cls.code: cls for cls in named} == BY_CODE
    assert len(named) == len(BY_CODE)
    for special in found - named:  # a backend's own: over the wire it is what it is a kind of
        assert issubclass(special, BY_CODE[special.code])


# --- writers


def test_what_is_sealed_is_what_was_written(memory: Client) -> None:
    reader = sealed(memory)
    digest = xxhash.xxh3_128_hexdigest(b"\7" * 1000)
    entry = msgspec.structs.replace(ENTRY, digest=digest)  # made where the writer gave none
    assert reader.manifest == msgspec.structs.replace(MANIFEST, tensors={"x": entry})
    assert reader.damaged() == []
    assert torch.equal(reader.tensors()["x"], torch.full((1000,), 7, dtype=torch.uint8))


def test_leaving_without_a_seal_gives_the_election_back(memory: Client) -> None:
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)

    def fail() -> None:
        with writer:
            writer.reserve(100)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert memory.statistics().weight_sets == ()
    writer.abandon()  # a second time is harmless


def test_a_writer_that_gets_no_memory_can_give_up(memory: Client) -> None:
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    with pytest.raises(OutOfDeviceMemory), writer:
        writer.reserve(1 << 50)
    assert memory.statistics().weight_sets == ()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda writer: writer.seal(MANIFEST, 0),
        lambda writer: writer.writable_tensors(MANIFEST),
        lambda writer: (writer.reserve(100), writer.reserve(100)),
        lambda writer: (writer.reserve(100), writer.seal(MANIFEST, 50)),
        lambda writer: (writer.reserve(100), writer.writable_tensors(MANIFEST)),
    ],
    ids=["no segment to seal", "no segment to view", "twice", "no room for it", "beyond it"],
)
def test_misuse_is_refused_by_name(
    memory: Client, misuse: Callable[[WeightSetWriter], object]
) -> None:
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    with pytest.raises(InvalidMessage), writer:
        misuse(writer)
    assert memory.statistics().weight_sets == ()


def test_a_manifest_that_cannot_be_read_is_refused_by_name(memory: Client) -> None:
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    writer.reserve(100)[:] = b"\xc1" * 100
    extent = allocator.messages.Extent(offset=0, num_bytes=100)
    request = allocator.messages.Seal(
        key="k", generation=writer.generation, manifest=extent, manifest_digest=""
    )
    memory.request(request, allocator.messages.Sealed)
    for _ in range(2):
        with pytest.raises(InvalidMessage, match="manifest"):
            memory.open_weight_set("k", {})
    [found] = memory.statistics().weight_sets
    assert found.reader_pids == (os.getpid(),)  # of the seal; those who were refused do not count


def test_a_session_takes_few_descriptors_and_gives_them_back(daemon: DaemonProcess) -> None:
    for _ in range(3):
        with daemon.connect() as memory:
            memory.statistics()  # ZeroMQ connects when there is something to say
            before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            for n in range(20):
                sealed(memory, f"{memory._connection.welcome.token.hex()}{n}").release()
            gc.collect()
            assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
    assert not select.select([], [], [], 0)[0]
