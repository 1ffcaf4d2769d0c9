"""The CUDA backend's calls and lifetimes, in real processes, against a simulated driver.

Shows that what we call, in which order, and what we give back when, keeps the driver's documented
rules (tests/allocator/backends/simulated_driver/libcuda.c checks them). It proves nothing about a
GPU: that is for tests/gpu.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from allocator.messages import Extent, Handle
from tests.allocator.backends.backend_peer import Died
from tests.allocator.backends.simulated_driver.build import GRANULARITY, build, environment
from tests.allocator.backends.simulated_driver.process import (
    Process,
    SimulatedProgram,
    content,
    imported,
)
from tests.allocator.processes import Refused
from tests.daemon_process import ROOT
from tests.leaks import Leaks
from tests.warm import Warm

pytestmark = pytest.mark.slow

SIZE = 11 * (1 << 20) + 5  # three staging buffers and a bit
ROUNDED = 6 * GRANULARITY
UUIDS = [f"cuda:GPU-{c * 4}-{c * 2}-{c * 2}-{c * 2}-{c * 6}" for c in ("d0", "d1")]
GARBAGE = b"\xa5"  # what new memory holds
NOTHING = {"handles": 0, "ranges": 0, "mappings": 0, "pinned": 0, "streams": 0, "pending": 0}

Start = Callable[..., Process]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("simulated_driver"))


@pytest.fixture(scope="session")
def warm(library: Path, adopted_orphans: None) -> Iterator[Warm]:
    with imported(environment(library, Path("/nowhere"))) as warm:
        yield warm


@pytest.fixture
def start(library: Path, warm: Warm, tmp_path: Path, no_leaks: Leaks) -> Iterator[Start]:
    """Start a process on the devices of this test; keywords are the driver's settings."""
    with ExitStack() as started:
        yield lambda **settings: started.enter_context(
            Process(environment(library, tmp_path / "state", **settings), warm)
        )


@pytest.fixture
def daemon(start: Start) -> Process:
    """The allocator's side, of the first device."""
    process = start()
    assert process.do.own("cuda:0") == [UUIDS[0], GRANULARITY, 256 << 20]
    return process


def handle(num_bytes: int = SIZE, segment: str = "a", device: str = UUIDS[0]) -> Handle:
    return Handle(backend="cuda", device=device, segment=segment, num_bytes=num_bytes, generation=1)


def map_segment(
    daemon: Process, client: Process, named: Handle | None = None, *, writable: bool = False
) -> None:
    """What happens between `Reserved` or `Sealed` and the mapping: a descriptor travels."""
    named = named or handle()
    descriptor = daemon.export(named.segment)
    try:
        client.given(descriptor).map(named, writable)
    finally:
        os.close(descriptor)


def map_extent(
    daemon: Process, client: Process, extent: Extent, *, writable: bool, pool: str = "pool"
) -> None:
    descriptor = daemon.export(pool, extent)
    try:
        place = (extent.offset, extent.num_bytes)
        client.given(descriptor).map_extent(*place, writable)
    finally:
        os.close(descriptor)


def open_pool(daemon: Process, *clients: Process, num_extents: int = 8) -> list[Extent]:
    """A pool, and three reserved extents of it, of which the first two are neighbours."""
    daemon.do.reserve_pool("pool", num_extents * GRANULARITY)
    extents = [Extent(offset=i * GRANULARITY, num_bytes=GRANULARITY) for i in (2, 3, 6)]
    for extent in extents:
        daemon.do.reserve_extent("pool", extent.offset, extent.num_bytes)
    for client in clients:
        client.do.open_pool(handle(num_extents * GRANULARITY, "pool"))
    return extents


def held(process: Process) -> dict[str, int]:
    counts = process.counts()
    assert counts.pop("faults") == 0
    counts.pop("contexts")
    return counts


def digest(num_bytes: int, seed: int) -> str:
    return hashlib.sha256(content(num_bytes, seed)).hexdigest()


# --- the sharing flow


def test_what_one_process_writes_others_read_from_the_same_memory(
    daemon: Process, start: Start
) -> None:
    writer, readers = start(), [start(), start()]
    daemon.do.reserve("a", SIZE)
    assert daemon.do.committed_bytes("a") == ROUNDED
    map_segment(daemon, writer, writable=True)
    writer.do.fill(SIZE, 1, SIZE, 1)
    writer.do.close()
    for reader in readers:
        map_segment(daemon, reader)
        assert reader.do.digest(0, SIZE) == digest(SIZE, 1)
        assert reader.do.digest(7, 5 << 20) == digest_of_part(7, 5 << 20)
        assert reader.peek(SIZE - 5, 5) == content(SIZE, 1)[-5:]
    # A device of exactly two such segments: had anybody a copy, there would be no room for this.
    daemon.do.reserve("b", (256 << 20) - ROUNDED)
    assert daemon.counts()["contexts"] == 0
    assert daemon.counts()["ranges"] == daemon.counts()["mappings"] == 0
    # Nobody but the daemon keeps a handle.
    assert [held(reader)["handles"] for reader in readers] == [0, 0]


def digest_of_part(start: int, num_bytes: int) -> str:
    return hashlib.sha256(content(SIZE, 1)[start : start + num_bytes]).hexdigest()


def test_threads_write_at_once(daemon: Process, start: Start) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, client, writable=True)
    client.do.fill(SIZE, 2, 1 << 20, 4)
    assert client.do.digest(0, SIZE) == digest(SIZE, 2)
    assert 2 <= client.counts()["pinned"] <= 8  # two a thread
    assert client.counts()["pinned"] == client.counts()["streams"]
    client.do.close()
    assert held(client) == NOTHING


def test_a_write_to_what_is_read_only_ends_the_writer_alone(daemon: Process, start: Start) -> None:
    readers = [start(), start(), start()]
    daemon.do.reserve("a", SIZE)
    writer = start()
    map_segment(daemon, writer, writable=True)
    writer.do.fill(SIZE, 1, SIZE, 1)
    writer.do.close()
    for reader in readers:
        map_segment(daemon, reader)
    with pytest.raises(Refused, match="TypeError: the mapping is read-only"):
        readers[0].do.write(0, "00")
    assert readers[0].do.is_well()
    illegal = "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert readers[0].do.write_as_a_kernel_would(0) == [illegal, illegal]
    assert not readers[0].do.is_well()
    with pytest.raises(Refused, match=f"DriverError.*{illegal}"):
        readers[0].do.digest(0, 3)
    assert readers[0].do.fault(UUIDS[0]) == f"cuCtxSynchronize: {illegal}"
    assert readers[1].do.fault(UUIDS[0]) is None
    with pytest.raises(Died) as died:
        readers[1].poke(0, b"x")
    assert died.value.signal == 11
    assert readers[2].do.digest(0, SIZE) == digest(SIZE, 1)


@pytest.mark.parametrize("device", ["host", "cuda:7", "cuda:0"])
def test_a_device_that_can_not_be_used_says_why(start: Start, device: str) -> None:
    """One that can has nothing to say, nor has host memory."""
    said = start().do.fault(device)
    assert said is None if device != "cuda:7" else said.startswith("there is no device 'cuda:7'")


def test_a_window_closes_though_its_context_is_spoilt(daemon: Process, start: Start) -> None:
    client = start()
    extents = open_pool(daemon, client)
    for extent in extents:
        map_extent(daemon, client, extent, writable=True)
    map_extent(daemon, client, extents[0], writable=False)
    assert client.do.write_as_a_kernel_would(extents[0].offset)[0] != "CUDA_SUCCESS"
    assert client.do.fault(UUIDS[0]) is not None
    client.do.close()
    with pytest.raises(Refused, match="AssertionError"):
        client.do.peek(0, 1)


# --- lifetimes


@pytest.mark.parametrize(
    "let_go",
    [lambda client: client.close(), lambda client: client.forget()],
    ids=["close", "forget"],
)
def test_teardown_leaves_nothing(
    daemon: Process, start: Start, let_go: Callable[[SimulatedProgram], None]
) -> None:
    client = start()
    client.do.devices()
    before = [daemon.do.num_descriptors(), client.do.num_descriptors()]
    daemon.do.reserve("a", SIZE)
    extents = open_pool(daemon, client)
    for extent in extents:
        map_extent(daemon, client, extent, writable=True)
    let_go(client.do)
    map_segment(daemon, client, writable=True)
    client.do.fill(SIZE, 1, SIZE, 1)
    let_go(client.do)
    assert held(client) == {**NOTHING, "streams": 1}  # the one that erases, for the next lease
    for extent in extents:
        daemon.do.free_extent("pool", extent.offset, extent.num_bytes)
    for segment in ("a", "pool", "a", "never"):
        daemon.do.free(segment)
    assert held(daemon) == NOTHING
    assert [daemon.do.num_descriptors(), client.do.num_descriptors()] == before


def fits(daemon: Process, num_bytes: int) -> bool:
    """Whether the device has this much left."""
    try:
        daemon.do.reserve("probe", num_bytes)
    except Refused as refused:
        if refused.name != "OutOfDeviceMemory":
            raise
        return False
    daemon.do.free("probe")
    return True


def test_freed_memory_is_back_when_its_last_client_unmaps_it(daemon: Process, start: Start) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, client, writable=True)
    client.do.fill(SIZE, 1, SIZE, 1)
    daemon.do.free("a")
    assert client.do.digest(0, SIZE) == digest(SIZE, 1)
    assert not fits(daemon, 256 << 20)
    client.do.close()
    assert fits(daemon, 256 << 20)


def test_memory_outlives_its_clients_until_it_is_freed(daemon: Process, start: Start) -> None:
    clients = [start(), start()]
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, clients[0], writable=True)
    clients[0].do.fill(SIZE, 1, SIZE, 1)
    clients[0].do.close()
    clients[0].kill()
    map_segment(daemon, clients[1])
    assert clients[1].do.digest(0, SIZE) == digest(SIZE, 1)
    clients[1].kill()
    assert not fits(daemon, 256 << 20)
    daemon.do.free("a")
    assert fits(daemon, 256 << 20)


def test_clients_keep_what_they_map_when_the_daemon_is_killed(
    daemon: Process, start: Start
) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, client, writable=True)
    client.do.fill(SIZE, 1, SIZE, 1)
    daemon.kill()
    assert client.do.digest(0, SIZE) == digest(SIZE, 1)
    successor = start()
    successor.do.own("cuda:0")
    assert not fits(successor, 256 << 20)
    client.kill()
    assert fits(successor, 256 << 20)


def test_unmapping_waits_for_the_device(daemon: Process, start: Start) -> None:
    client, other = start(), start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, other)
    map_segment(daemon, client, writable=True)
    client.do.begin_copy(100)
    assert client.counts()["pending"] == 1
    assert other.peek(100, 4) == GARBAGE * 4
    client.do.close_keeping_a_view()  # what was begun is there for others from now on
    assert client.counts()["mappings"] == 1
    assert other.peek(100, 4) == b"late"
    extent, *_ = open_pool(daemon, client)
    map_extent(daemon, client, extent, writable=True)
    client.do.begin_copy(extent.offset)
    client.do.unmap_extent(extent.offset, extent.num_bytes, False)
    assert client.do.is_well()
    map_extent(daemon, client, extent, writable=False)
    assert client.peek(extent.offset, 4) == b"late"
    client.do.map_extent(extent.offset, extent.num_bytes, True)
    client.do.begin_copy(extent.offset + 8)
    client.do.forget()
    assert client.counts()["mappings"] == client.counts()["ranges"] == 1  # the view's
    assert client.do.is_well()


def test_reading_waits_for_the_device(daemon: Process, start: Start) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, client, writable=True)
    client.do.begin_copy(100)
    assert bytes.fromhex(client.do.read(99, 6)) == GARBAGE + b"late" + GARBAGE


def test_a_tensor_keeps_the_addresses_of_a_closed_mapping(daemon: Process, start: Start) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, client, writable=True)
    client.do.write(0, b"abcd".hex())
    with_tensor, seen, without = client.do.tensor_keeps_the_range(SIZE)
    assert bytes.fromhex(seen) == b"bcd"
    assert with_tensor[:5] == [0, 1, 1, 0, 0]
    assert without[:5] == [0, 0, 0, 0, 0]


def test_a_forked_child_leaves_its_parents_mapping_alone(daemon: Process, start: Start) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, client, writable=True)
    client.do.fill(SIZE, 1, SIZE, 1)
    before = client.counts()
    answer = client.do.child_after_fork("cuda:0")
    assert answer.startswith("InvalidSetting: CUDA was used before this process was forked")
    assert client.counts() == before
    assert client.do.digest(0, SIZE) == digest(SIZE, 1)


def test_the_threads_own_context_is_left_alone(daemon: Process, start: Start) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    map_segment(daemon, client, writable=True)
    client.do.fill(SIZE, 1, SIZE, 1)
    assert client.do.context_of_thread() == 0
    assert client.counts()["contexts"] == 1


# --- room


def test_exhaustion_names_who_could_free(daemon: Process, start: Start) -> None:
    daemon.do.reserve("a", 200 << 20)
    with pytest.raises(Refused) as refused:
        daemon.do.reserve("b", 60 << 20)
    assert refused.value.name == "OutOfDeviceMemory"
    assert "Simulated device 0" in refused.value.message
    assert "holds 268.4 MB in all, of which 209.7 MB are this allocator's" in refused.value.message
    assert "nvidia-smi" in refused.value.message
    assert daemon.counts()["handles"] == 1
    with pytest.raises(Refused, match="StaleGeneration: the segment b is gone"):
        daemon.export("b")
    # Another program's memory counts as well.
    other = start()
    other.do.own(UUIDS[0])
    other.do.reserve("theirs", 50 << 20)
    assert not fits(daemon, 8 << 20)
    other.kill()
    daemon.do.reserve("b", 50 << 20)


def test_extents_take_memory_one_by_one(daemon: Process, start: Start) -> None:
    num_extents = 128  # exactly the device
    extents = open_pool(daemon, num_extents=num_extents + 2)
    assert daemon.do.committed_bytes("pool") == 3 * GRANULARITY
    daemon.do.reserve("a", (num_extents - 4) * GRANULARITY)
    daemon.do.reserve_extent("pool", 0, GRANULARITY)
    with pytest.raises(Refused, match=r"OutOfDeviceMemory: 2\.1 MB"):
        daemon.do.reserve_extent("pool", 4 * GRANULARITY, GRANULARITY)
    daemon.do.free_extent("pool", extents[0].offset, extents[0].num_bytes)
    daemon.do.reserve_extent("pool", 4 * GRANULARITY, GRANULARITY)
    with pytest.raises(Refused, match="StaleGeneration: the extent at 4194304 of pool is gone"):
        daemon.export("pool", extents[0])
    assert daemon.counts()["contexts"] == 0


# --- the pool's window


def test_extents_lie_in_one_window_at_their_offsets(daemon: Process, start: Start) -> None:
    writer, reader = start(), start()
    extents = open_pool(daemon, writer, reader)
    assert writer.counts()["ranges"] == 1
    for number, extent in enumerate(extents):
        map_extent(daemon, writer, extent, writable=True)
        writer.poke(extent.offset, bytes([number]) * 3)
        writer.poke(extent.offset + GRANULARITY - 3, bytes([number]) * 3)
    map_extent(daemon, reader, extents[1], writable=False)
    assert reader.peek(extents[1].offset + GRANULARITY - 3, 3) == bytes([1]) * 3
    assert held(reader)["mappings"] == 1
    # One kernel could reach from one neighbour to the other.
    border = extents[1].offset
    assert writer.peek(border - 2, 4) == bytes([0, 0, 1, 1])
    with pytest.raises(Died):
        writer.peek(extents[1].offset + GRANULARITY, 1)
    with pytest.raises(Died):
        reader.poke(extents[1].offset, b"x")


def test_a_lease_is_zero_at_first_and_keeps_its_bytes(daemon: Process, start: Start) -> None:
    client, reader = start(), start()
    extent, *_ = open_pool(daemon, client, reader)
    map_extent(daemon, reader, extent, writable=False)
    assert reader.peek(extent.offset, 3) == GARBAGE * 3
    map_extent(daemon, client, extent, writable=True)
    assert reader.peek(extent.offset, 3) == bytes(3)
    assert client.peek(extent.offset + GRANULARITY - 3, 3) == bytes(3)
    client.poke(extent.offset, b"abc")
    for writable in (True, False, True):
        map_extent(daemon, client, extent, writable=writable)
        assert client.peek(extent.offset, 3) == b"abc"


def test_access_changes_without_a_descriptor(daemon: Process, start: Start) -> None:
    client = start()
    extent, other, _ = open_pool(daemon, client)
    map_extent(daemon, client, extent, writable=True)
    client.poke(extent.offset, b"abc")
    client.do.map_extent(extent.offset, extent.num_bytes, False)
    assert client.peek(extent.offset, 3) == b"abc"
    client.do.map_extent(extent.offset, extent.num_bytes, True)
    client.poke(extent.offset, b"xyz")
    with pytest.raises(Refused, match=r"InvalidMessage: .* takes its descriptor"):
        client.do.map_extent(other.offset, other.num_bytes, True)
    client.do.map_extent(extent.offset, extent.num_bytes, False)
    with pytest.raises(Died):
        client.poke(extent.offset, b"bad")


def test_a_new_lease_of_an_offset_is_new_memory(daemon: Process, start: Start) -> None:
    stale, fresh = start(), start()
    extent, neighbour, _ = open_pool(daemon, stale, fresh)
    for each in (extent, neighbour):
        map_extent(daemon, stale, each, writable=True)
        stale.poke(each.offset, b"old")
    for each in (extent, neighbour):
        daemon.do.free_extent("pool", each.offset, each.num_bytes)
    whole = Extent(offset=extent.offset, num_bytes=2 * GRANULARITY)
    daemon.do.reserve_extent("pool", whole.offset, whole.num_bytes)
    map_extent(daemon, fresh, whole, writable=True)
    fresh.poke(whole.offset, b"new")
    assert stale.peek(extent.offset, 3) == b"old"  # and no other client's bytes
    map_extent(daemon, stale, whole, writable=False)
    assert stale.peek(whole.offset, 3) == b"new"
    assert held(stale)["mappings"] == 1
    stale.do.unmap_extent(extent.offset, extent.num_bytes, False)
    assert held(stale)["mappings"] == 0


# --- devices


def test_a_device_is_found_by_its_uuid(start: Start) -> None:
    daemon = start()
    assert daemon.do.devices() == UUIDS
    assert daemon.do.own("cuda:1")[0] == UUIDS[1]
    daemon.do.reserve("a", SIZE)
    client, everywhere = start(CUDA_VISIBLE_DEVICES="1"), start(CUDA_VISIBLE_DEVICES="1,0")
    named = handle(device=UUIDS[1])
    map_segment(daemon, client, named, writable=True)
    client.do.fill(SIZE, 1, SIZE, 1)
    map_segment(daemon, everywhere, named)
    assert everywhere.do.digest(0, SIZE) == digest(SIZE, 1)
    assert client.do.ordinal() == everywhere.do.ordinal() == 0
    assert everywhere.do.devices() == UUIDS[::-1]


def test_a_device_that_is_not_visible_is_named(start: Start) -> None:
    blind = start(CUDA_VISIBLE_DEVICES="0")
    with pytest.raises(Refused) as refused:
        blind.do.open_named(UUIDS[1])
    assert refused.value.name == "InvalidSetting"
    assert UUIDS[1] in refused.value.message
    assert "CUDA_VISIBLE_DEVICES='0' may hide it" in refused.value.message
    with pytest.raises(Refused, match="InvalidSetting: there is no device 'cuda:1', only cuda:GPU"):
        blind.do.open_named("cuda:1")
    hidden = start(CUDA_VISIBLE_DEVICES="")
    with pytest.raises(Refused, match=r"InvalidSetting: .*finds no GPU.*CUDA_VISIBLE_DEVICES=''"):
        hidden.do.open_named("cuda:0")


@pytest.mark.parametrize("name", ["cuda:", "cuda:-1", "cuda:2", "cuda:GPU-", "cuda:x", "cudax"])
def test_what_is_no_device_is_refused(start: Start, name: str) -> None:
    with pytest.raises(Refused, match="InvalidSetting: there is no device"):
        start().do.own(name)


@pytest.mark.parametrize(
    ("lacks", "words"), [("vmm", "virtual memory management"), ("fd", "file descriptors")]
)
def test_a_device_that_can_not_share_memory_is_refused(
    start: Start, lacks: str, words: str
) -> None:
    with pytest.raises(Refused) as refused:
        start(SIMULATED_DRIVER_LACKS=lacks).do.own("cuda:0")
    assert refused.value.name == "InvalidSetting"
    assert words in refused.value.message
    assert "use the device host" in refused.value.message


def test_a_device_that_another_process_has_to_itself_is_told_so(start: Start) -> None:
    """The allocator makes no context, so it does not notice; who maps does."""
    owner, reader = start(), start(SIMULATED_DRIVER_LACKS="context")
    owner.do.own("cuda:0")
    owner.do.reserve("a", SIZE)
    descriptor = owner.export("a")
    with pytest.raises(Refused, match=r"InvalidSetting: .*exclusive.*nvidia-smi -c DEFAULT"):
        reader.given(descriptor).map(handle(), False)
    os.close(descriptor)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sys.modules['cuda.bindings'] = None", "pip install 'onecopy[cuda]'"),
        ("pass", "libcuda.so.1 can't be loaded"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, program: str, words: str) -> None:
    # An empty libcuda.so.1 stands for a machine without the driver, also where there is one.
    (tmp_path / "libcuda.so.1").touch()
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}\n" + _OPEN],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert ended.stdout.startswith("InvalidSetting")
    assert words in ended.stdout


_OPEN = """
from allocator.backends import open_device
from allocator.errors import InvalidSetting
try:
    open_device("cuda:0")
except InvalidSetting as error:
    print(type(error).__name__, error)
"""


# --- wrong descriptors


@pytest.mark.parametrize(
    "named", [handle(SIZE + GRANULARITY), handle(GRANULARITY), handle(device=UUIDS[1])]
)
def test_a_descriptor_of_something_else_is_stale(
    daemon: Process, start: Start, named: Handle
) -> None:
    client = start()
    daemon.do.reserve("a", SIZE)
    with pytest.raises(Refused, match="StaleGeneration: the descriptor is not that of"):
        map_segment(daemon, client, named)
    assert held(client) == NOTHING


def test_what_is_no_device_memory_can_not_be_mapped(start: Start, tmp_path: Path) -> None:
    client = start()
    with pytest.raises(Refused, match="InvalidMessage: to map a takes its descriptor"):
        client.do.map(handle(), False)
    with (tmp_path / "file").open("wb") as file, pytest.raises(Refused, match="StaleGeneration"):
        client.given(file.fileno()).map(handle(), False)
    assert held(client) == NOTHING


@pytest.mark.parametrize(
    "ask",
    [
        lambda daemon: daemon.reserve("a", GRANULARITY),
        lambda daemon: daemon.reserve_pool("a", GRANULARITY),
        lambda daemon: daemon.reserve_extent("pool", 2 * GRANULARITY, GRANULARITY),
        lambda daemon: daemon.reserve_extent("pool", 1, GRANULARITY),
        lambda daemon: daemon.reserve_extent("pool", 0, GRANULARITY + 1),
        lambda daemon: daemon.reserve_extent("pool", 0, 0),
    ],
)
def test_the_daemon_refuses_what_can_not_be(
    daemon: Process, ask: Callable[[SimulatedProgram], None]
) -> None:
    daemon.do.reserve("a", GRANULARITY)
    open_pool(daemon)
    with pytest.raises(Refused, match="InvalidMessage"):
        ask(daemon.do)
    assert daemon.counts()["handles"] == 4


# --- the contract, and the simulation itself


def run_under_simulation(library: Path, tmp_path: Path, *arguments: str) -> str:
    """Run pytest itself on the simulated driver, and take what it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment(library, tmp_path / "state"),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_backend_keeps_the_contract(library: Path, tmp_path: Path) -> None:
    said = run_under_simulation(
        library, tmp_path, "-q", "tests/allocator/backends/simulated_driver/contract.py"
    )
    assert " passed" in said
    assert "skipped" not in said


def test_the_simulated_driver_keeps_the_documented_rules(library: Path, tmp_path: Path) -> None:
    said = run_under_simulation(
        library, tmp_path, "-q", "tests/allocator/backends/simulated_driver/rules.py"
    )
    assert " passed" in said
    assert "skipped" not in said
