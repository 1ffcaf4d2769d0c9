"""The allocator's daemon and its clients with a GPU, on a simulated driver.

What travels and when, with descriptors over the lifeline. As for tests/allocator/
test_cuda_sequence.py: nothing here says anything about a real GPU.
"""

import hashlib
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from allocator import RuntimeDir
from allocator.client.session.connection import Connection
from allocator.lifeline import close_all
from allocator.messages import (
    PROTOCOL_VERSION,
    GetStatistics,
    Hello,
    Lease,
    Leased,
    Reply,
    Statistics,
)
from tests.allocator.backends.device_client import DeviceClient
from tests.allocator.backends.simulated_driver.build import GRANULARITY, build, environment
from tests.allocator.processes import Refused
from tests.daemon_process import TIMEOUT_S, DaemonProcess
from tests.leaks import wait_until

UUIDS = [f"cuda:GPU-{c * 4}-{c * 2}-{c * 2}-{c * 2}-{c * 6}" for c in ("d0", "d1")]
SIZE = 9 * (1 << 20) + 3

Start = Callable[..., DeviceClient]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("simulated_driver"))


@pytest.fixture
def driver(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of all processes that this test starts; its own was read at its start."""
    variables = environment(library, tmp_path / "state")
    for name in ("LD_LIBRARY_PATH", "SIMULATED_DRIVER_STATE"):
        monkeypatch.setenv(name, variables[name])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return variables


@pytest.fixture
def daemon(driver: dict[str, str], start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """With a limit beyond the devices' own memory, so that these say when they are full."""
    devices = ("--device", "cuda:0", "--device", "cuda:1", "--device", "host")
    return start_daemon(*devices, "--memory-limit", "1GiB")


@pytest.fixture
def start(daemon: DaemonProcess, runtime_dir: RuntimeDir) -> Iterator[Start]:
    """Start clients of the first device, or of another one."""
    with ExitStack() as started:
        yield lambda **options: started.enter_context(DeviceClient(runtime_dir, None, **options))


def digest_of(value: int, num_bytes: int = SIZE) -> str:
    return hashlib.sha256(bytes([value]) * num_bytes).hexdigest()


def used_bytes(daemon: DaemonProcess, device: str = "") -> int:
    with daemon.connect(device=device) as client:
        client.check_integrity()
        return client.statistics().used_bytes


def test_one_writes_and_all_read_one_copy(daemon: DaemonProcess, start: Start) -> None:
    clients = [start(), start(), start()]
    assert [client.do.device() for client in clients] == [UUIDS[0]] * 3
    assert [client.do.load("set", SIZE, 7) for client in clients] == [
        "writer",
        "reader",
        "reader",
    ]
    assert {client.do.digest() for client in clients} == {digest_of(7)}
    assert SIZE <= used_bytes(daemon) < SIZE + GRANULARITY
    clients[0].kill()
    assert clients[1].do.digest() == digest_of(7)


def test_devices_are_told_apart(daemon: DaemonProcess, start: Start) -> None:
    first, second, on_host = start(), start(device=UUIDS[1]), start(device="host")
    assert [c.do.device() for c in (first, second, on_host)] == [*UUIDS, "host"]
    assert first.do.load("set", SIZE, 1) == "writer"
    assert second.do.load("set", SIZE, 2) == "writer"
    assert on_host.do.load("set", SIZE, 3) == "writer"
    assert [c.do.digest() for c in (first, second, on_host)] == [
        digest_of(value) for value in (1, 2, 3)
    ]


def test_a_set_sleeps_and_wakes(daemon: DaemonProcess, start: Start) -> None:
    client = start()
    client.do.load("set", SIZE, 5)
    client.do.release()
    for level in (1, 2):
        client.do.sleep("set", level)
        assert used_bytes(daemon) == 0
        assert client.do.open("set", {}) == "reader"
        assert client.do.digest() == digest_of(5)
        client.do.release()


def test_the_next_writer_is_elected_when_one_dies(daemon: DaemonProcess, start: Start) -> None:
    clients = [start(), start()]
    assert clients[0].do.open("set", {}) == "writer"
    clients[0].do.reserve(SIZE)
    clients[1].begin.load("set", SIZE, 9)
    clients[0].kill()
    assert clients[1].receive() == "writer"
    assert clients[1].do.digest() == digest_of(9)
    wait_until(lambda: used_bytes(daemon) < SIZE + GRANULARITY, "the dead writer's segment freed")


def test_a_full_device_evicts_what_is_idle(daemon: DaemonProcess, start: Start) -> None:
    client = start()
    for number in range(3):
        client.do.load(f"set{number}", 100 << 20, number)
        client.do.release()
    with daemon.connect() as looking:
        kept = [s.key for s in looking.statistics().weight_sets if s.tier == "device"]
    assert kept == ["set1", "set2"]
    with pytest.raises(Refused) as refused:
        client.do.load("too large", 300 << 20, 1)
    assert refused.value.name == "OutOfDeviceMemory"


def test_part_of_a_device_stays_free_for_those_that_compute(
    driver: dict[str, str], runtime_dir: RuntimeDir, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """Half of one as small as this. What other programs have when the allocator starts is theirs,
    but not what its own clients still map of an earlier one's."""
    first = start_daemon("--device", "cuda:0")

    def limit(of: DaemonProcess) -> int:
        with of.connect() as looking:
            return looking.statistics().limit_bytes

    assert limit(first) == 128 << 20
    with DeviceClient(runtime_dir) as client:
        client.do.load("set", 100 << 20, 1)
        with pytest.raises(Refused, match=r"the limit is 134.2 MB, and 104.9 MB of it are in use"):
            client.do.load("other", 40 << 20, 1)
        first.kill()
        second = start_daemon("--device", "cuda:0")
        assert limit(second) == 128 << 20
        second.stop()  # in order: nobody knows of the client any more
        assert limit(start_daemon("--device", "cuda:0")) == 26 << 20


def test_leases_come_with_memory_of_their_own(daemon: DaemonProcess, start: Start) -> None:
    client = start()
    offsets = client.do.lease(GRANULARITY, 20)
    assert len(set(offsets)) == 20
    assert used_bytes(daemon) == 20 * GRANULARITY
    client.do.release_leases(offsets[:5])
    assert used_bytes(daemon) == 15 * GRANULARITY
    other = start()
    with pytest.raises(Refused, match="RoomTaken"):
        other.do.lease(GRANULARITY, 120)
    other.do.lease(GRANULARITY, 100)
    client.kill()
    wait_until(lambda: used_bytes(daemon) == 100 * GRANULARITY, "the dead client's leases")
    assert len(other.do.lease(GRANULARITY, 20)) == 20


def test_a_block_is_mapped_by_who_looks_it_up(daemon: DaemonProcess, start: Start) -> None:
    first, second = start(), start()
    (offset,) = first.do.lease(GRANULARITY)
    digest = "ab" * 16
    assert first.do.put([(digest, offset)]) == [True]
    assert second.do.look_up([digest, "cd" * 16]) == [offset]
    assert used_bytes(daemon) == GRANULARITY
    for client in (first, second):
        client.do.release_blocks([digest])


def test_what_a_block_holds_is_there_before_others_may_read_it(
    daemon: DaemonProcess, start: Start
) -> None:
    client = start()
    offsets = client.do.lease(GRANULARITY, 2)
    blocks = [(digest * 16, offset) for digest, offset in zip(("ab", "cd"), offsets, strict=True)]
    assert client.do.put_unwritten(blocks) == 0


def test_many_leases_at_once_do_not_run_out_of_descriptors(
    daemon: DaemonProcess, start: Start
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (256, limits[1]))
    before = len(os.listdir(f"/proc/{daemon.pid}/fd"))  # noqa: PTH208 - the names are numbers
    client = start()
    offsets = client.do.lease(GRANULARITY, 100)
    client.do.release_leases(offsets)
    wait_until(
        lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= before + 3,  # noqa: PTH208
        "the daemon's descriptors back",
    )


def test_what_the_driver_refuses_to_unmap_keeps_nothing_else_leased(
    daemon: DaemonProcess, start: Start
) -> None:
    client = start()
    offsets = client.do.lease(GRANULARITY, 5)
    for offset in offsets[1:3]:
        client.do.unmap_behind(offset)
    with pytest.raises(Refused, match=r"DriverError: .*cuMemUnmap"):
        client.do.release_leases(offsets)
    with daemon.connect(device=UUIDS[0]) as memory:
        assert memory.statistics().pool.num_leases == 2
        assert len(set(client.do.lease(GRANULARITY, 3)) & {offsets[0], *offsets[3:]}) == 3
        client.kill()
        wait_until(lambda: memory.statistics().pool.num_leases == 0, "all are back")


@pytest.fixture
def withholding(
    driver: dict[str, str], start_daemon: Callable[..., DaemonProcess]
) -> DaemonProcess:
    """A daemon that sends the first descriptors once it gets SIGUSR1, and says before that all
    connections began anew: as where that happens while a reply is on its way."""
    program = (
        "import runpy, signal\n"
        "import allocator.daemon.clients.exports as exports\n"
        "from allocator.lifeline import tell_to_ask_again\n"
        "send, held = exports.send_exports, []\n"
        "def withhold(*arguments):\n"
        "    if mappable(arguments[3]) and not held:\n"
        "        held.append(arguments)\n"
        "    else:\n"
        "        send(*arguments)\n"
        "def let_go(*_):\n"
        "    tell_to_ask_again(held[0][1])\n"
        "    send(*held[0])\n"
        "from allocator.requests import mappable\n"
        "exports.send_exports = withhold\n"
        "signal.signal(signal.SIGUSR1, let_go)\n"
        "runpy.run_module('allocator', run_name='__main__', alter_sys=True)\n"
    )
    return start_daemon("--device", "cuda:0", program=program)


def test_where_descriptors_may_be_lost_they_are_asked_for_again(
    withholding: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    hello = Hello(version=PROTOCOL_VERSION, device=UUIDS[0])
    session = Connection(runtime_dir, hello, TIMEOUT_S)
    answers: list[tuple[Reply, list[int]]] = []
    request = Lease(num_bytes=GRANULARITY, count=1)
    asking = threading.Thread(target=lambda: answers.append(session.exchange(request)))
    asking.start()
    wait_until(lambda: session._lifeline.connection.gettimeout(), "it waits for descriptors")
    withholding.process.send_signal(signal.SIGUSR1)
    asking.join()
    [(leased, descriptors)] = answers
    assert isinstance(leased, Leased)
    assert len(descriptors) == 1
    statistics = session.request(GetStatistics(), Statistics)
    assert statistics.pool.num_leases == 1
    close_all(descriptors)
    session.close()


def test_clients_go_on_when_the_daemon_is_killed(
    daemon: DaemonProcess, start: Start, start_daemon: Callable[..., DaemonProcess]
) -> None:
    client = start()
    client.do.load("set", SIZE, 7)
    daemon.kill()
    assert client.do.digest() == digest_of(7)
    successor = start_daemon("--device", "cuda:0")
    # What it did not make, it can't export: the next one loads anew, beside the old copy.
    assert used_bytes(successor) == 0
    other = start()
    assert other.do.load("set", SIZE, 7) == "writer"
    assert client.do.digest() == other.do.digest() == digest_of(7)
