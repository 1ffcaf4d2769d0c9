"""A real daemon and real client processes: sharing, deaths, limits, what is left at the end."""

import hashlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from allocator import Client, RuntimeDir, StaleGeneration, connect
from allocator.backends import open_device
from allocator.backends.host import SHM_ROOT
from allocator.daemon.command import run
from allocator.messages import Handle, WeightSetStatistics
from tests.allocator.processes import ClientProcess, Refused
from tests.daemon_process import ROOT, TIMEOUT_S, DaemonProcess
from tests.leaks import segments, wait_until

MIB = 1 << 20
Start = Callable[[], ClientProcess]
StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def start(daemon: DaemonProcess) -> Iterator[Start]:
    """Start client processes; they are stopped before the daemon is."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(ClientProcess(daemon.runtime_dir))


def weight_set(memory: Client, key: str = "k") -> WeightSetStatistics | None:
    return next((s for s in memory.statistics().weight_sets if s.key == key), None)


def digest_of(value: int, num_bytes: int) -> str:
    return hashlib.sha256(bytes([value]) * num_bytes).hexdigest()


def loaded(client: ClientProcess, key: str = "k", num_bytes: int = MIB, value: int = 1) -> None:
    assert client.do.load(key, num_bytes, value) == "writer"


# --- sharing


def test_many_at_once_make_one_copy(start: Start, memory: Client) -> None:
    clients = [start() for _ in range(6)]
    for value, client in enumerate(clients):
        client.begin.load("k", MIB, value)
    roles = [client.receive() for client in clients]
    assert sorted(roles) == ["reader"] * 5 + ["writer"]
    # Each would have written its own value: all see the writer's, in the same physical memory.
    assert {c.do.digest() for c in clients} == {digest_of(roles.index("writer"), MIB)}
    [inode] = {inode for client in clients for _, inode in client.do.mappings()}
    found = weight_set(memory)
    assert found is not None
    assert (SHM_ROOT / found.segment.lstrip("/")).stat().st_ino == int(inode)
    assert sorted(found.reader_pids) == sorted(client.pid for client in clients)
    assert memory.statistics().used_bytes == found.num_bytes


def test_after_the_seal_not_even_the_writer_can_write(start: Start) -> None:
    client = start()
    loaded(client)
    assert [permissions for permissions, _ in client.do.mappings()] == ["r--s"]


def test_who_waits_sees_progress_and_whom_it_waits_for(start: Start, memory: Client) -> None:
    writer, waiter = start(), start()
    assert writer.do.open("k", {}) == "writer"
    writer.do.reserve(MIB)
    writer.do.progress(MIB // 2)
    with pytest.raises(Refused, match=f"WaitTimeout: process {writer.pid} has been loading 'k'"):
        waiter.do.open("k", {}, 0.05)
    [wait] = {tuple(wait) for wait in waiter.do.seen_waits()}
    assert wait == (MIB // 2, MIB + 4096)
    # Having given up it is no longer in the queue: it is not made a reader behind its back.
    writer.do.fill(1)
    writer.do.seal()
    found = weight_set(memory)
    assert found is not None
    assert found.reader_pids == (writer.pid,)


def test_another_fingerprint_is_refused(start: Start) -> None:
    first, second = start(), start()
    assert first.do.open("k", {"dtype": "bfloat16"}) == "writer"
    with pytest.raises(Refused, match=r"FingerprintMismatch: .*dtype was 'bfloat16' and is now"):
        second.do.open("k", {"dtype": "float32"})


def test_a_released_set_stays_and_is_found_again(start: Start, memory: Client) -> None:
    client = start()
    loaded(client)
    with pytest.raises(Refused, match=r"WeightSetBusy: .* is sealed: stop its readers"):
        client.do.evict("k")
    client.do.release()
    assert client.do.mappings() == []
    idle = weight_set(memory)
    assert idle is not None
    assert (idle.state, idle.reader_pids) == ("idle", ())
    assert client.do.open("k", {}) == "reader"
    assert client.do.digest() == digest_of(1, MIB)


def test_an_evicted_set_is_gone(start: Start, daemon: DaemonProcess, memory: Client) -> None:
    client = start()
    loaded(client)
    client.do.release()
    client.do.evict("k")
    assert segments(daemon.runtime_dir.segment_prefix) == []
    assert memory.statistics().used_bytes == 0
    with pytest.raises(Refused, match="UnknownWeightSet"):
        client.do.evict("k")


def test_the_daemon_is_small(start: Start, daemon: DaemonProcess) -> None:
    loaded(start())
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "/dev/shm/onecopy-" not in maps  # it hands memory out, and maps none itself


# --- deaths


def test_a_writer_killed_while_loading_is_followed_by_one_who_waits(
    start: Start, daemon: DaemonProcess, memory: Client
) -> None:
    first, *others = start(), start(), start()
    assert first.do.open("k", {}) == "writer"
    first.do.reserve(MIB)
    first.do.fill(66)
    before = weight_set(memory)
    assert before is not None
    for value, client in enumerate(others):
        client.begin.load("k", 2 * MIB, value)
    first.kill()
    roles = [client.receive() for client in others]
    assert sorted(roles) == ["reader", "writer"]
    assert {c.do.digest() for c in others} == {digest_of(roles.index("writer"), 2 * MIB)}
    after = weight_set(memory)
    assert after is not None
    assert after.generation > before.generation
    # The half-written segment is gone, the new one is there.
    assert segments(daemon.runtime_dir.segment_prefix) == [after.segment.lstrip("/")]


def test_a_writer_that_abandons_is_followed_at_once(start: Start) -> None:
    first, second = start(), start()
    assert first.do.open("k", {}) == "writer"
    first.do.reserve(MIB)
    second.begin.open("k", {})
    first.do.abandon()
    assert second.receive() == "writer"


def test_a_writer_killed_alone_leaves_the_set_absent(
    start: Start, daemon: DaemonProcess, memory: Client
) -> None:
    client = start()
    assert client.do.open("k", {}) == "writer"
    client.do.reserve(MIB)
    client.kill()
    wait_until(lambda: weight_set(memory) is None, "the set is absent")
    assert segments(daemon.runtime_dir.segment_prefix) == []
    assert memory.statistics().used_bytes == 0


def test_a_killed_reader_stops_counting_within_a_second(start: Start, memory: Client) -> None:
    reader, other = start(), start()
    loaded(reader)
    assert other.do.load("k", MIB, 2) == "reader"
    assert memory.statistics().num_sessions == 3
    reader.kill()

    def only_the_other() -> bool:
        found = weight_set(memory)
        return found is not None and found.reader_pids == (other.pid,)

    wait_until(only_the_other, "only the other reads")
    assert memory.statistics().num_sessions == 2
    assert other.do.digest() == digest_of(1, MIB)


def test_a_dead_waiter_is_passed_over(start: Start) -> None:
    writer, dead, alive = start(), start(), start()
    assert writer.do.open("k", {}) == "writer"
    for client in (dead, alive):
        client.begin.open("k", {})
    dead.kill()
    writer.kill()
    assert alive.receive() == "writer"


def test_after_the_daemon_is_killed_mapped_memory_stays_readable(
    start: Start, daemon: DaemonProcess, runtime_dir: RuntimeDir, start_daemon: StartDaemon
) -> None:
    client = start()
    loaded(client)
    daemon.kill()
    assert client.do.is_alive() is False
    for _ in range(2):  # it says so every time
        with pytest.raises(Refused, match=r"AllocatorGone: .*ask again once a new allocator runs"):
            client.do.open("other", {})
    assert client.do.digest() == digest_of(1, MIB)
    # The next daemon goes on with what it finds, and the client with it.
    names = segments(runtime_dir.segment_prefix)
    assert len(names) == 1
    successor = start_daemon()
    assert segments(runtime_dir.segment_prefix) == names
    with successor.connect() as memory:
        assert memory.statistics().num_adopted_sets == 1
        assert [s.adopted for s in memory.statistics().sessions if s.pid == client.pid] == [True]
        assert client.do.open("other", {}) == "writer"
        assert [s.adopted for s in memory.statistics().sessions if s.pid == client.pid] == [False]
        found = weight_set(memory)
        assert found is not None
        assert (found.state, found.reader_pids) == ("sealed", (client.pid,))
    assert client.do.digest() == digest_of(1, MIB)
    client.do.release()


def test_what_is_left_of_a_killed_daemon_and_its_clients_is_removed(
    start: Start, daemon: DaemonProcess, runtime_dir: RuntimeDir, start_daemon: StartDaemon
) -> None:
    """A half-written set; its writer is gone too, so nobody can go on with it."""
    client = start()
    assert client.do.open("k", {}) == "writer"
    client.do.reserve(MIB)
    daemon.kill()
    client.kill()
    assert len(segments(runtime_dir.segment_prefix)) == 1
    with start_daemon().connect() as memory:
        assert memory.statistics().weight_sets == ()
        assert memory.statistics().num_sessions == 1
    assert segments(runtime_dir.segment_prefix) == []


def test_a_dead_daemons_handle_never_fits_a_new_daemons_segment(
    runtime_dir: RuntimeDir, start_daemon: StartDaemon
) -> None:
    names: list[str] = []
    for _ in range(2):
        daemon = start_daemon()
        with ClientProcess(runtime_dir) as client:
            assert client.do.open("k", {}) == "writer"
            names.append(client.do.reserve(MIB))
            if len(names) == 2:
                stale = Handle(backend="host", segment=names[0], num_bytes=MIB + 4096, generation=1)
                with pytest.raises(StaleGeneration):
                    open_device("host").map(stale, writable=False)
            daemon.kill()
            client.kill()
    assert names[0] != names[1]
    start_daemon()  # takes the dead one's files


# --- start and end


def run_daemon(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "allocator", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_second_daemon_is_refused_and_the_first_goes_on(
    daemon: DaemonProcess, memory: Client
) -> None:
    path = daemon.runtime_dir.path
    second = run_daemon("--runtime-dir", str(path))
    assert second.returncode == 1
    assert second.stderr == (
        f"onecopy allocator: another allocator (pid {daemon.pid}) runs in {path}: stop it with "
        f"`onecopy stop --runtime-dir {path}`, or choose another --runtime-dir.\n"
    )
    assert memory.statistics().pid == daemon.pid


def test_a_bad_runtime_directory_is_one_line(runtime_dir: RuntimeDir) -> None:
    finished = run_daemon("--runtime-dir", str(runtime_dir.path / ("x" * 100)))
    assert finished.returncode == 1
    assert re.fullmatch(
        r"onecopy allocator: the runtime directory .* too long.*\n", finished.stderr
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(
    start: Start, daemon: DaemonProcess, runtime_dir: RuntimeDir, number: signal.Signals
) -> None:
    client = start()
    loaded(client)
    daemon.process.send_signal(number)
    assert daemon.process.wait(TIMEOUT_S) == 0
    assert segments(runtime_dir.segment_prefix) == []
    assert list(runtime_dir.path.iterdir()) == []
    assert client.do.digest() == digest_of(1, MIB)


@pytest.mark.slow
def test_a_signal_just_after_a_client_has_left_is_not_missed(runtime_dir: RuntimeDir) -> None:
    """One that comes between the last bytecode and the poll: a chance of one in ten, so often."""
    for _ in range(50):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                logging.disable()
                run(runtime_dir, ready_fd=write)
            finally:
                os._exit(0)
        os.close(write)
        assert os.read(read, 1) == b"\n"
        os.close(read)
        with connect(runtime_dir) as memory:
            memory.statistics()
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        ended, _, _ = select.select([pidfd], [], [], 5.0)
        os.close(pidfd)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert ended


def test_directories_are_private(start: Start, daemon: DaemonProcess) -> None:
    loaded(start())
    prefix = daemon.runtime_dir.segment_prefix.lstrip("/")
    files = [*daemon.runtime_dir.path.iterdir(), *SHM_ROOT.glob(f"{prefix}*")]
    assert len(files) == 6  # a lock, two sockets, a journal, a segment, whose it is
    assert [file for file in files if file.stat().st_mode & 0o077] == []


# --- limits


@pytest.fixture
def limited(start_daemon: StartDaemon) -> Iterator[ClientProcess]:
    """A client of a daemon that may use 4 MiB."""
    daemon = start_daemon("--memory-limit", str(4 * MIB))
    with ClientProcess(daemon.runtime_dir) as client:
        yield client


def keys(runtime_dir: RuntimeDir) -> set[str]:
    with connect(runtime_dir) as memory:
        return {s.key for s in memory.statistics().weight_sets}


def idle(client: ClientProcess, key: str) -> None:
    loaded(client, key)
    client.do.release()


def test_the_set_unused_for_longest_makes_room(
    limited: ClientProcess, runtime_dir: RuntimeDir
) -> None:
    for key in "abc":
        idle(limited, key)
    assert limited.do.load("a", MIB, 1) == "reader"  # used again: now "b" is the oldest
    limited.do.release()
    idle(limited, "d")
    assert keys(runtime_dir) == {"a", "c", "d"}
    assert limited.do.load("b", MIB, 9) == "writer"


def test_what_is_read_is_not_evicted_and_the_error_names_it(
    limited: ClientProcess, runtime_dir: RuntimeDir
) -> None:
    with ClientProcess(runtime_dir) as reader:
        loaded(reader, "held", 2 * MIB)
        idle(limited, "idle")
        with pytest.raises(Refused) as caught:
            limited.do.load("big", 3 * MIB, 1)
        assert caught.value.name == "OutOfDeviceMemory"
        assert re.search(
            r"3\.1 MB are needed.* 4\.2 MB.* 2\.1 MB .*held \(sealed, 2\.1 MB\).* --memory-limit",
            caught.value.message,
        )
        # In vain nothing is evicted, and the election can be given back and tried again.
        assert keys(runtime_dir) == {"held", "idle", "big"}
        limited.do.abandon()
        assert keys(runtime_dir) == {"held", "idle"}
    wait_until(
        lambda: not any(s.reader_pids for s in _sets(runtime_dir)), "the reader's session has ended"
    )
    assert limited.do.load("big", 3 * MIB, 1) == "writer"
    assert keys(runtime_dir) == {"big"}


def _sets(runtime_dir: RuntimeDir) -> Any:
    with connect(runtime_dir) as memory:
        return memory.statistics().weight_sets


def test_statistics_are_consistent(start: Start, daemon: DaemonProcess, memory: Client) -> None:
    started = time.monotonic()
    loaded(start(), "a", MIB)
    loaded(start(), "b", 2 * MIB)
    statistics = memory.statistics()
    assert statistics.pid == daemon.pid
    assert statistics.device == "host"
    assert statistics.num_sessions == 3
    assert statistics.used_bytes == 3 * MIB + 2 * 4096
    assert statistics.used_bytes == sum(s.num_bytes for s in statistics.weight_sets)
    device_bytes = os.statvfs(SHM_ROOT).f_blocks * os.statvfs(SHM_ROOT).f_frsize
    assert statistics.used_bytes < statistics.limit_bytes <= device_bytes
    assert 0 < statistics.uptime_s < time.monotonic() - started + TIMEOUT_S
    lock = json.loads((daemon.runtime_dir.path / "allocator.lock").read_text())
    assert lock["pid"] == daemon.pid
