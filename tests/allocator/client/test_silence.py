"""An allocator that is stopped, seen by a client that must not be held up."""

import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from allocator import AllocatorError, AllocatorGone, Client, WaitTimeout, WeightSetWriter
from allocator.client.session.silence import Silence
from allocator.errors import AllocatorSilent
from tests.allocator.processes import ClientProcess, Refused
from tests.daemon_process import DaemonProcess
from tests.leaks import descriptors, wait_until

SIZE = 64 << 10


class Heard:
    """What a client was told of the allocator's silence."""

    def __init__(self) -> None:
        self.all: list[float | None] = []

    @property
    def is_silent(self) -> bool:
        return bool(self.all) and self.all[-1] is not None


@contextmanager
def stopped(daemon: DaemonProcess) -> Iterator[None]:
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


@pytest.fixture
def heard(memory: Client) -> Heard:
    told = Heard()
    memory.hurry(60.0, told.all.append)  # what is stopped is not waited for even so
    return told


def test_a_stopped_allocator_is_waited_for_once_and_asked_again_elsewhere(
    daemon: DaemonProcess, memory: Client, heard: Heard, connect: Callable[..., Client]
) -> None:
    kept = memory.lease(SIZE)
    kept.buffer[:4] = b"kept"
    with stopped(daemon):
        with pytest.raises(WaitTimeout, match="stopped"):
            memory.lease(SIZE)
        assert heard.is_silent
        for _ in range(100):
            with pytest.raises(AllocatorSilent):
                memory.lease(SIZE)
        with pytest.raises(AllocatorGone):
            memory.pool_share()
        kept.release()  # given up here; the allocator hears of it later
    wait_until(lambda: not heard.is_silent, "the allocator to be heard again")
    assert [since is None for since in heard.all] == [False, True]
    # It did what had been asked before it was stopped, and has been told that nobody wants it.
    assert memory.pool_share().held_bytes == 0
    other = connect()
    assert other.statistics().pool.leased_bytes == 0
    with memory.lease(SIZE).buffer as buffer:
        assert bytes(buffer[:4]) == bytes(4)
    other.check_integrity()


def test_a_stopped_allocator_that_is_killed_has_a_successor(
    daemon: DaemonProcess,
    memory: Client,
    heard: Heard,
    start_daemon: Callable[[], DaemonProcess],
) -> None:
    kept = memory.lease(SIZE)
    kept.buffer[:4] = b"kept"
    os.kill(daemon.pid, signal.SIGSTOP)
    with pytest.raises(WaitTimeout):
        memory.pool_share()
    daemon.kill()
    with pytest.raises(AllocatorSilent):
        memory.pool_share()
    start_daemon()
    wait_until(lambda: not heard.is_silent, "the successor to be heard")
    assert bytes(kept.buffer[:4]) == b"kept"
    assert memory.pool_share().held_bytes == SIZE
    kept.release()
    assert memory.pool_share().held_bytes == 0


def test_an_allocator_that_ended_is_looked_for_elsewhere(
    daemon: DaemonProcess,
    memory: Client,
    heard: Heard,
    start_daemon: Callable[[], DaemonProcess],
) -> None:
    daemon.kill()
    with pytest.raises(AllocatorGone):
        memory.lease(SIZE)
    with pytest.raises(AllocatorSilent):
        memory.lease(SIZE)
    start_daemon()
    wait_until(lambda: not heard.is_silent, "the successor to be heard")
    memory.lease(SIZE).release()


def test_a_session_ends_though_the_allocator_is_silent(
    daemon: DaemonProcess, connect: Callable[..., Client]
) -> None:
    memory, heard = connect(), Heard()
    memory.hurry(60.0, heard.all.append)
    lease = memory.lease(SIZE)
    with stopped(daemon):
        with pytest.raises(WaitTimeout):
            memory.pool_share()
        memory.close()
        with pytest.raises(AllocatorError):
            lease.release()
    wait_until(lambda: connect().statistics().pool.leased_bytes == 0, "its lease to be returned")


def test_who_is_in_no_hurry_waits(daemon: DaemonProcess, connect: Callable[..., Client]) -> None:
    memory = connect(request_timeout_s=0.3)
    with stopped(daemon):
        for _ in range(2):  # each time: nobody asks elsewhere
            with pytest.raises(WaitTimeout, match=r"within 0\.3 s"):
                memory.pool_share()
    wait_until(lambda: _answers(memory), "the allocator to answer")


def _answers(memory: Client) -> bool:
    try:
        memory.pool_share()
    except WaitTimeout:
        return False
    return True


def test_a_stopped_writer_is_given_up_for_who_waits(
    daemon: DaemonProcess, memory: Client, connect: Callable[..., Client]
) -> None:
    with ClientProcess(daemon.runtime_dir) as writer:
        assert writer.do.open("k", {}) == "writer"
        os.kill(writer.pid, signal.SIGSTOP)
        told: list[int] = []
        opened = memory.open_weight_set("k", {}, on_wait=lambda _1, _2, pid: told.append(pid))
        assert isinstance(opened, WeightSetWriter)
        assert set(told) == {writer.pid}
        os.kill(writer.pid, signal.SIGCONT)
        with pytest.raises(Refused) as refused:
            writer.do.reserve(4096)
        assert refused.value.name in ("AllocatorGone", "NotWriter", "StaleGeneration")
        opened.abandon()
    assert any(event.kind == "given up" for event in memory.events())
    connect().check_integrity()


# --- a process that lacks something itself


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 8, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_without_descriptors_asks_on_until_it_has_some(
    daemon: DaemonProcess,
    memory: Client,
    heard: Heard,
    start_daemon: Callable[[], DaemonProcess],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = memory.lease(SIZE)
    kept.buffer[:4] = b"kept"
    caplog.set_level(logging.INFO, "onecopy.allocator")
    daemon.kill()
    with no_descriptors():
        with pytest.raises(AllocatorGone):
            memory.pool_share()
        wait_until(lambda: "raise what it may open" in caplog.text.lower(), "it to ask", 30)
    start_daemon()
    wait_until(lambda: not heard.is_silent, "the successor to be heard", 30)
    assert bytes(kept.buffer[:4]) == b"kept"
    assert memory.pool_share().held_bytes == SIZE
    kept.release()


def test_whatever_goes_wrong_it_is_asked_on(caplog: pytest.LogCaptureFixture) -> None:
    heard = Heard()
    wrong: list[Exception] = [OSError(24, "no descriptors"), ValueError("never thought of")] * 2

    def ask() -> None:
        if wrong:
            raise wrong.pop()

    silence = Silence(ask, heard.all.append)
    silence.begin()
    wait_until(lambda: not heard.is_silent, "it to be answered", 30)
    assert not wrong
    assert "never thought of" in caplog.text
    silence.check()


def test_where_nobody_can_ask_it_is_not_taken_to_be_silent(
    memory: Client, daemon: DaemonProcess, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with stopped(daemon), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for _ in range(2):
            with pytest.raises(WaitTimeout):
                memory.pool_share()
    assert not heard.is_silent
    assert memory.pool_share().held_bytes == 0
