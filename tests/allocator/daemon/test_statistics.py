"""What the allocator tells of itself: statistics, regions and events, and that they agree."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import msgspec
import pytest

from allocator import (
    AllocatorError,
    Client,
    Manifest,
    RuntimeDir,
    Statistics,
    TensorEntry,
    UnknownWeightSet,
    WeightSetReader,
    WeightSetWriter,
)
from allocator.backends.host import SHM_ROOT, HostBackend
from allocator.messages import (
    Abandon,
    Evict,
    Lease,
    Leased,
    LeaseId,
    Moving,
    Region,
    Regions,
    Return,
    Sleep,
    WeightSetStatistics,
)
from tests.allocator.daemon.raw_session import RawSession
from tests.allocator.processes import ClientProcess
from tests.daemon_process import TIMEOUT_S, DaemonProcess
from tests.leaks import wait_until

MIB = 1 << 20
GRANULE = HostBackend.granularity
StartDaemon = Callable[..., DaemonProcess]
Connect = Callable[..., Client]


@pytest.fixture
def memory(connect: Connect) -> Client:
    return connect(label="looks")


@pytest.fixture
def raw(daemon: DaemonProcess) -> Iterator[RawSession]:
    session = RawSession(daemon.runtime_dir)
    yield session
    session.close()


def only(memory: Client) -> WeightSetStatistics:
    [one] = memory.statistics().weight_sets
    return one


def agree(statistics: Statistics) -> None:
    """What must hold in every picture, whenever it is taken."""
    pool = statistics.pool
    taken = pool.leased_bytes + pool.cached_bytes
    assert statistics.used_bytes == statistics.weights_bytes + taken
    assert statistics.used_bytes <= statistics.limit_bytes
    on_device = [one for one in statistics.weight_sets if one.tier == "device"]
    assert statistics.weights_bytes == sum(one.num_bytes for one in on_device)
    in_host_memory = [one for one in statistics.weight_sets if one.tier == "host"]
    assert statistics.host_tier_bytes == sum(one.num_bytes for one in in_host_memory)
    assert pool.leased_bytes == sum(one.leased_bytes for one in statistics.sessions)
    assert pool.num_leases == sum(one.num_leases for one in statistics.sessions)
    assert statistics.num_sessions == len(statistics.sessions)
    assert taken + pool.largest_free_bytes <= pool.total_bytes
    assert pool.evictable_bytes <= pool.cached_bytes
    free = pool.total_bytes - taken
    expected = 1 - pool.largest_free_bytes / free if free else 0.0
    assert pool.fragmentation == pytest.approx(expected)
    pids = {one.pid for one in statistics.sessions}
    for weight_set in statistics.weight_sets:
        assert (weight_set.state in ("loading", "moving")) == (weight_set.writer_pid is not None)
        assert (weight_set.state == "sealed") == (weight_set.reader_pids != ())
        assert {*weight_set.reader_pids, weight_set.writer_pid} - {None} <= pids


# --- statistics


def test_of_an_allocator_that_holds_nothing(memory: Client, daemon: DaemonProcess) -> None:
    statistics = memory.statistics()
    agree(statistics)
    device_bytes = os.statvfs(SHM_ROOT).f_blocks * os.statvfs(SHM_ROOT).f_frsize
    assert (statistics.pid, statistics.device) == (daemon.pid, "host")
    # Others use the device as well, and processes need some memory for themselves.
    assert 0 < statistics.limit_bytes <= statistics.host_tier_limit_bytes <= device_bytes
    assert (statistics.used_bytes, statistics.weight_sets, statistics.quotas) == (0, (), ())
    assert (statistics.num_evictions, statistics.num_adopted_sets) == (0, 0)
    pool = statistics.pool
    most = statistics.host_tier_limit_bytes
    assert pool.total_bytes == pool.largest_free_bytes == most // GRANULE * GRANULE
    assert (pool.num_leases, pool.num_blocks, pool.num_lookups, pool.fragmentation) == (0, 0, 0, 0)
    assert 0 < statistics.uptime_s < TIMEOUT_S
    assert memory.statistics().uptime_s > statistics.uptime_s


def test_limits_are_told_as_they_were_given(start_daemon: StartDaemon) -> None:
    limits = ("--memory-limit", "5MB", "--host-tier-limit", "7MB")
    quotas = ("--quota", "user:u=1GB", "--quota", "model:m=3MB")
    with start_daemon(*limits, *quotas).connect(model="m", user="u") as memory:
        memory.lease(GRANULE)
        statistics = memory.statistics()
        assert (statistics.limit_bytes, statistics.host_tier_limit_bytes) == (5_000_000, 7_000_000)
        assert statistics.pool.total_bytes == 5_000_000 // GRANULE * GRANULE
        assert [(q.kind, q.name, q.limit_bytes, q.used_bytes) for q in statistics.quotas] == [
            ("model", "m", 3_000_000, GRANULE),
            ("user", "u", 1_000_000_000, GRANULE),
        ]


def test_sessions_are_told_apart(connect: Connect, runtime_dir: RuntimeDir) -> None:
    memory = connect(label="looks", model="m", user="u")
    memory.lease_many(GRANULE, 3)
    memory.put_blocks([(b"d" * 16, memory.lease(2 * GRANULE))])
    memory.look_up_blocks([b"d" * 16])
    with ClientProcess(runtime_dir, label="other", model="", user="v") as other:
        other.do.lease(5 * GRANULE)
        statistics = memory.statistics()
        agree(statistics)
        told = {
            one.label: (one.pid, one.model, one.user, one.leased_bytes, one.num_leases)
            for one in statistics.sessions
        }
        assert told == {
            "looks": (os.getpid(), "m", "u", 3 * GRANULE, 3),
            "other": (other.pid, "", "v", 5 * GRANULE, 1),
        }
        assert [one.num_pinned_blocks for one in statistics.sessions] == [2, 0]
        assert not any(one.adopted for one in statistics.sessions)
        numbers = [one.number for one in statistics.sessions]
    wait_until(lambda: memory.statistics().num_sessions == 1, "the other session has ended")
    connect(label="third")
    assert memory.statistics().sessions[-1].number > max(numbers)  # never one that was there


def test_a_weight_set_in_each_of_its_states(
    memory: Client, connect: Connect, raw: RawSession
) -> None:
    loader = connect(label="loads", model="m", user="u")
    writer = loader.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    one = only(memory)
    assert (one.key, one.state, one.tier, one.generation) == (
        *("k", "loading", "device"),
        writer.generation,
    )
    assert (one.segment, one.num_bytes, one.written_bytes) == ("", 0, 0)
    assert (one.writer_pid, one.reader_pids) == (os.getpid(), ())
    assert (one.model, one.user, one.pinned, one.has_image) == ("m", "u", False, False)

    writer.reserve(3 * MIB)
    writer.progress(MIB)
    one = only(memory)
    assert (one.state, one.num_bytes, one.written_bytes) == ("loading", 3 * MIB, MIB)
    agree(memory.statistics())

    reader = writer.seal(Manifest(version=1, tensors={}, metadata={}), 0)
    again = loader.open_weight_set("k", {})
    assert isinstance(again, WeightSetReader)
    other = memory.open_weight_set("k", {})
    assert isinstance(other, WeightSetReader)
    one = only(memory)
    assert (one.state, one.written_bytes, one.segment) == ("sealed", 3 * MIB, reader.handle.segment)
    assert (one.writer_pid, one.reader_pids) == (None, (os.getpid(),) * 3)
    assert one.idle_s == 0
    agree(memory.statistics())

    for each in (reader, again, other):
        each.release()
    one = only(memory)
    assert (one.state, one.tier, one.reader_pids) == ("idle", "device", ())
    wait_until(lambda: only(memory).idle_s > one.idle_s > 0, "time passes")

    assert isinstance(raw.ask(Sleep(key="k", tier="disk", wait_ms=0)), Moving)
    one = only(memory)
    assert (one.state, one.tier, one.writer_pid) == ("moving", "device", os.getpid())
    agree(memory.statistics())
    raw.ask(Abandon(key="k", generation=one.generation))

    for level, tier in ((1, "host"), (2, "disk")):
        memory.sleep("k", level=level)
        one = only(memory)
        assert (one.state, one.tier, one.num_bytes) == ("asleep", tier, 3 * MIB)
        assert (one.has_image, one.idle_s) == (level == 2, 0)
        agree(memory.statistics())
    memory.wake("k")
    one = only(memory)
    assert (one.state, one.tier, one.has_image) == ("idle", "device", True)
    agree(memory.statistics())


def test_whenever_it_is_taken_a_picture_is_consistent(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    """While others lease, put, load, evict and sleep as fast as they can."""
    daemon = start_daemon("--memory-limit", str(24 * GRANULE))
    stop, rounds = Event(), [0, 0, 0]

    def work(number: int) -> None:
        with daemon.connect(model=f"m{number}") as client:
            while not stop.is_set():
                with contextlib.suppress(AllocatorError):
                    step(client, number, rounds[number])
                rounds[number] += 1

    pictures: list[Statistics] = []
    regions: list[Regions] = []
    with daemon.connect() as memory, ThreadPoolExecutor(3) as threads:
        working = [threads.submit(work, number) for number in range(3)]
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while min(rounds) < 40 or len(pictures) < 300:
                assert time.monotonic() < deadline, rounds
                pictures.append(memory.statistics())
                regions.append(memory.regions())
        finally:
            stop.set()
        for worker in working:
            worker.result(TIMEOUT_S)
        for statistics in pictures:
            agree(statistics)
        for seen in regions:
            covers(seen)
        # It was not always the same one.
        assert len({statistics.used_bytes for statistics in pictures}) > 5
        assert {one.state for picture in pictures for one in picture.weight_sets} >= {"idle"}
        memory.check_integrity()


def step(client: Client, number: int, round_: int) -> None:
    """Some of everything; what is refused is refused."""
    leases = client.lease_many(GRANULE, 1 + (round_ + number) % 3)
    put = client.put_blocks([(b"%16d" % (round_ % 5), leases[0])])
    client.release_blocks([block for block in put if block is not None])
    client.release_many(leases[1:] if put[0] is not None else leases)
    key = f"k{round_ % 2}"
    opened = client.open_weight_set(key, {}, timeout_s=1.0)
    if isinstance(opened, WeightSetWriter):
        with opened:
            opened.reserve(GRANULE * (1 + number))
            opened = opened.seal(Manifest(version=1, tensors={}, metadata={}), 0)
    opened.release()
    if round_ % 3 == 0:
        client.sleep(key, level=1, timeout_s=1.0)
    if round_ % 4 == 0:
        client.evict(key)


def test_looking_changes_nothing(start_daemon: Callable[..., DaemonProcess]) -> None:
    """Within a limit of its own: that of the machine is what others leave at this moment."""
    with start_daemon("--memory-limit", "64MB").connect() as memory:
        memory.put_blocks([(b"d" * 16, memory.lease(GRANULE))])
        before = memory.statistics()
        for _ in range(3):
            memory.regions()
            memory.events()
            memory.check_integrity()
            after = memory.statistics()
            assert msgspec.structs.replace(after, uptime_s=before.uptime_s) == before


# --- regions


def covers(regions: Regions) -> None:
    """The pool from end to end, in the longest pieces that there are."""
    end = 0
    for region in regions.regions:
        assert region.offset == end
        assert region.num_bytes > 0
        assert (region.kind == "leased") == (region.holder > 0)
        end += region.num_bytes
    assert end == regions.total_bytes
    assert not regions.truncated
    for one, other in itertools.pairwise(regions.regions):
        assert (one.kind, one.holder) != (other.kind, other.holder)


def test_regions_of_an_empty_pool(memory: Client) -> None:
    regions = memory.regions()
    covers(regions)
    assert regions.regions == (Region(0, regions.total_bytes, "free"),)


def test_regions_tell_who_holds_what(memory: Client, runtime_dir: RuntimeDir) -> None:
    with ClientProcess(runtime_dir) as other:
        mine = memory.lease_many(GRANULE, 2)
        other.do.lease(2 * GRANULE)
        [block] = memory.put_blocks([(b"d" * 16, memory.lease(GRANULE))])
        assert block is not None
        block.release()
        me, them = (one.number for one in memory.statistics().sessions)
        regions = memory.regions()
        covers(regions)
        assert regions.regions[:-1] == (
            Region(0, 2 * GRANULE, "leased", me, os.getpid()),
            Region(2 * GRANULE, 2 * GRANULE, "leased", them, other.pid),
            Region(4 * GRANULE, GRANULE, "cached"),
        )
        mine[0].release()
        assert memory.regions().regions[:2] == (
            Region(0, GRANULE, "free"),
            Region(GRANULE, GRANULE, "leased", me, os.getpid()),
        )


def test_more_regions_than_fit_are_cut_off_and_said_to_be(memory: Client, raw: RawSession) -> None:
    """Leased without a client's library, so that no memory is committed."""
    leases = []
    for _ in range(9):
        leased = raw.ask(Lease(num_bytes=GRANULE, count=1024))
        assert isinstance(leased, Leased)
        leases += [LeaseId(extent.offset, leased.generation) for extent in leased.extents]
    covers(memory.regions())
    pieces = sorted(leases, key=lambda lease: lease.offset)[::2]
    for begin in range(0, len(pieces), 1024):
        raw.ask(Return(leases=tuple(pieces[begin : begin + 1024])))
    regions = memory.regions()
    assert regions.truncated
    assert len(regions.regions) == 4096
    assert {region.num_bytes for region in regions.regions} == {GRANULE}
    assert memory.statistics().pool.num_leases == 4608


# --- events


def test_events_tell_what_happened_in_its_order(start_daemon: StartDaemon) -> None:
    began = time.time()
    with start_daemon("--memory-limit", str(2 * MIB)).connect() as memory:
        assert memory.events() == ()
        for key in ("a", "b"):
            writer = memory.open_weight_set(key, {})
            assert isinstance(writer, WeightSetWriter)
            with writer:
                writer.reserve(3 * MIB // 2)
                writer.seal(Manifest(version=1, tensors={}, metadata={}), 0).release()
        memory.sleep("b", level=2)
        memory.wake("b")
        memory.evict("b", image=True)
        events = memory.events()
        assert [(event.kind, event.text.split(",")[0].split(" for ")[-1]) for event in events] == [
            ("reserved", "a"),
            ("sealed", "a"),
            ("evicted", "a"),
            ("reserved", "b"),
            ("sealed", "b"),
            ("asleep", "b"),
            ("woken", "b"),
            ("discarded", events[7].text),
            ("evicted", "b"),
        ]
        assert events[0].text == f"1.6 MB for a, written by process {os.getpid()}"
        assert events[2].text == "a, 1.6 MB, to make room"
        assert events[-1].text == "b, as asked"
        assert [event.number for event in events] == list(range(1, 10))
        times = [began, *(event.time_s for event in events), time.time()]
        assert times == sorted(times)
        assert memory.statistics().num_events == 9
        assert memory.events(after=7) == events[7:]
        assert memory.events(after=9) == memory.events(after=1 << 40) == ()


def test_the_history_keeps_the_latest_thousand(memory: Client, raw: RawSession) -> None:
    for number in range(350):
        raw.idle(f"k{number}", 1)
        raw.ask(Evict(key=f"k{number}"))
    assert memory.statistics().num_events == 1050
    latest = memory.events()
    assert [event.number for event in latest] == list(range(851, 1051))
    assert memory.events(after=1000) == latest[-50:]
    assert latest[-1].text == "k349, as asked"


# --- damage


def loaded(memory: Client) -> WeightSetReader:
    """The set "k": two tensors, and one that is tied to the first."""
    writer = memory.open_weight_set("k", {})
    assert isinstance(writer, WeightSetWriter)
    half = MIB // 2
    entries = {
        name: TensorEntry(dtype="uint8", shape=(half,), stride=(1,), offset=offset, num_bytes=half)
        for name, offset in (("a", 0), ("b", half), ("tied", 0))
    }
    with writer:
        writer.reserve(MIB + 4096)[:MIB] = os.urandom(MIB)
        return writer.seal(Manifest(version=1, tensors=entries, metadata={}), MIB)


def damage(memory: Client, offset: int) -> None:
    """Change one bit of the sealed memory, as only somebody who means to can."""
    path = SHM_ROOT / only(memory).segment.lstrip("/")
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    path.chmod(0o400)


def test_damaged_tensors_are_named(memory: Client) -> None:
    loaded(memory).release()
    assert memory.damaged("k") == []
    damage(memory, MIB - 1)
    assert memory.damaged("k") == ["b"]
    damage(memory, MIB // 2 - 1)
    assert memory.damaged("k") == ["a", "b", "tied"]
    damage(memory, MIB - 1)  # the same bit again: "b" is whole
    assert memory.damaged("k") == ["a", "tied"]
    assert (only(memory).state, only(memory).reader_pids) == ("idle", ())


def test_damage_is_found_while_others_read(connect: Connect, memory: Client) -> None:
    reader = loaded(connect())
    damage(memory, 0)
    assert memory.damaged("k") == reader.damaged() == ["a", "tied"]
    assert only(memory).reader_pids == (os.getpid(),)
    reader.release()


@pytest.mark.parametrize("level", [1, 2])
def test_to_be_looked_through_a_set_is_woken(memory: Client, level: int) -> None:
    loaded(memory).release()
    memory.sleep("k", level=level)
    assert memory.damaged("k") == []
    assert (only(memory).state, only(memory).tier) == ("idle", "device")


def test_what_there_is_not_cannot_be_looked_through(memory: Client) -> None:
    with pytest.raises(UnknownWeightSet, match="'k'"):
        memory.damaged("k")
    assert memory.statistics().weight_sets == ()
