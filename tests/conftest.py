"""Fixtures for all rooms: a private runtime directory, a real allocator, a check for leaks."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import RuntimeDir
from tests.daemon_process import DaemonProcess
from tests.leaks import Leaks, adopt_orphans


@pytest.fixture(scope="session", autouse=True)
def adopted_orphans() -> None:
    """A grandchild that outlives its parent becomes a child of the tests, where it is seen."""
    adopt_orphans()


@pytest.fixture
def no_leaks() -> Iterator[Leaks]:
    """Fails at teardown where the test left a child, a descriptor, or anything of a directory that
    it told this fixture to `watch`."""
    leaks = Leaks()
    yield leaks
    leaks.check()


@pytest.fixture
def runtime_dir(no_leaks: Leaks) -> Iterator[RuntimeDir]:
    """An empty runtime directory, with a path short enough for sockets, watched for leaks."""
    path = Path(tempfile.mkdtemp(prefix="onecopy-", dir="/tmp"))
    opened = RuntimeDir.open(path)
    no_leaks.watch(opened)
    try:
        yield opened
        no_leaks.check()
    finally:
        shutil.rmtree(path)


@pytest.fixture
def start_daemon(runtime_dir: RuntimeDir) -> Iterator[Callable[..., DaemonProcess]]:
    """Start allocators in the runtime directory; each is stopped by SIGTERM at teardown."""
    started: list[DaemonProcess] = []

    def start(*arguments: str) -> DaemonProcess:
        started.append(DaemonProcess(runtime_dir, *arguments))
        return started[-1]

    yield start
    for daemon in started:
        daemon.stop()


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """An allocator that answers."""
    return start_daemon()
