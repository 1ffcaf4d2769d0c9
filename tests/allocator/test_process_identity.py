"""Which process is meant: reused pids, zombies, odd names."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from allocator import ProcessIdentity
from tests.leaks import wait_until

_PR_SET_NAME = 15  # prctl(2)


@contextmanager
def child(prepare: Callable[[], None] = lambda: None) -> Iterator[int]:
    """A child that has run `prepare` and waits to be killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            os.write(write, b"r")
            signal.pause()
        finally:
            os._exit(0)
    assert os.read(read, 1) == b"r"
    os.close(read)
    os.close(write)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # the test has ended it itself


def test_a_process_is_itself_for_as_long_as_it_lives() -> None:
    with child() as pid:
        identity = ProcessIdentity.of(pid)
        assert identity is not None
        assert identity.pid == pid
        assert identity.is_alive()
        assert identity == ProcessIdentity.of(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not identity.is_alive()
        assert not identity.send_signal(signal.SIGTERM)
        assert ProcessIdentity.of(pid) is None


def test_own() -> None:
    assert ProcessIdentity.own() == ProcessIdentity.of(os.getpid())
    assert ProcessIdentity.own().is_alive()


@pytest.mark.parametrize("off_by", [-1, 1])
def test_another_process_with_the_same_pid_is_neither_it_nor_signalled(off_by: int) -> None:
    with child() as pid:
        identity = ProcessIdentity.of(pid)
        assert identity is not None
        earlier = replace(identity, start_ticks=identity.start_ticks + off_by)
        assert not earlier.is_alive()
        assert not earlier.send_signal(signal.SIGKILL)
        assert identity.is_alive()


def test_a_signal_arrives() -> None:
    with child() as pid:
        identity = ProcessIdentity.of(pid)
        assert identity is not None
        assert identity.send_signal(signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


def test_a_zombie_is_not_alive() -> None:
    with child() as pid:
        identity = ProcessIdentity.of(pid)
        assert identity is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: ProcessIdentity.of(pid) is None, "it is a zombie")
        os.kill(pid, 0)  # the pid is still taken
        assert not identity.is_alive()
        assert not identity.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("name", [b"a) Z 1 (b", b") Z ) S", b"two words", b"\xff\xfe no text"])
def test_the_name_of_a_process_cannot_mislead(name: bytes) -> None:
    libc = ctypes.CDLL(None)
    with child(lambda: libc.prctl(_PR_SET_NAME, name, 0, 0, 0)) as pid:
        identity = ProcessIdentity.of(pid)
        assert identity is not None
        assert identity.is_alive()
        # It started when we, who forked it, had started already.
        assert identity.start_ticks >= ProcessIdentity.own().start_ticks
