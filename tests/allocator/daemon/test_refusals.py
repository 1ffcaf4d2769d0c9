"""A request that is refused changes nothing, and ends nobody: neither daemon nor session."""

import contextlib
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import AllocatorBusy, Client, Manifest, StaleGeneration, WeightSetWriter
from allocator.backends.host import SHM_ROOT
from allocator.lifeline import Lifeline
from allocator.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    BlocksPut,
    BlockToPut,
    Done,
    Elected,
    Extent,
    Handle,
    Hello,
    Lease,
    Leased,
    LeaseId,
    LookUpBlocks,
    Moved,
    Open,
    PutBlocks,
    Release,
    Reply,
    Return,
    Seal,
    Sleep,
    UnpinBlocks,
    encode,
)
from tests.allocator.daemon.raw_session import RawSession, commit
from tests.daemon_process import TIMEOUT_S, DaemonProcess
from tests.leaks import segments, wait_until

KIB = 1 << 10
GRANULE = 64 * KIB
NOTHING = Extent(offset=0, num_bytes=0)


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> DaemonProcess:
    """An allocator that may use 16 granules."""
    return start_daemon("--memory-limit", str(16 * GRANULE), "--image-dir", str(tmp_path))


@pytest.fixture
def good(daemon: DaemonProcess) -> Iterator[Client]:
    """A well-behaved client, which finds everything in order at the end."""
    with daemon.connect() as client:
        yield client
        client.check_integrity()
        assert daemon.process.poll() is None


@pytest.fixture
def raw(daemon: DaemonProcess, good: Client) -> Iterator[RawSession]:
    session = RawSession(daemon.runtime_dir)
    yield session
    session.close()


def expect(reply: Reply, kind: type) -> None:
    assert isinstance(reply, kind), reply


def leased(raw: RawSession, num_bytes: int) -> LeaseId:
    reply = raw.ask(Lease(num_bytes=num_bytes))
    assert isinstance(reply, Leased), reply
    return LeaseId(reply.extents[0].offset, reply.generation)


def fragment(raw: RawSession) -> list[LeaseId]:
    """Every other one of 12 granules leased; the free ones are in pieces of 1, and one of 4."""
    leases = [leased(raw, GRANULE) for _ in range(12)]
    expect(raw.ask(Return(leases=tuple(leases[1:-1:2]))), Done)
    return [*leases[::2], leases[-1]]


# --- what is in pieces


def test_a_lease_that_finds_no_extent_evicts_no_weight_set(
    raw: RawSession, good: Client, daemon: DaemonProcess
) -> None:
    handle = raw.idle("idle", 4 * GRANULE)
    fragment(raw)
    assert raw.code(Lease(num_bytes=8 * GRANULE)) == "out_of_device_memory"
    assert [one.state for one in good.statistics().weight_sets] == ["idle"]
    assert handle.segment.lstrip("/") in segments(daemon.runtime_dir.segment_prefix)
    assert isinstance(raw.ask(Lease(num_bytes=4 * GRANULE)), Leased)


def test_a_lease_that_finds_no_extent_evicts_no_block(raw: RawSession, good: Client) -> None:
    kept = fragment(raw)
    digests = tuple(bytes([n]) * 16 for n in range(3))
    blocks = tuple(
        BlockToPut(digest, lease.offset, lease.generation)
        for digest, lease in zip(digests, kept[:3], strict=True)
    )
    expect(raw.ask(PutBlocks(blocks=blocks)), BlocksPut)
    expect(raw.ask(UnpinBlocks(digests=digests)), Done)
    # With all blocks gone there would be 6 granules in a row at the start, and 4 at the end.
    assert raw.code(Lease(num_bytes=7 * GRANULE)) == "out_of_device_memory"
    assert raw.code(Lease(num_bytes=5 * GRANULE, count=2)) == "out_of_device_memory"
    assert good.statistics().pool.num_blocks == 3
    # What fits once they are gone is leased, and only then they go.
    assert isinstance(raw.ask(Lease(num_bytes=6 * GRANULE)), Leased)
    assert good.statistics().pool.num_blocks == 0


@pytest.mark.parametrize("count", [1, 1000])
def test_more_than_there_could_ever_be_is_leased_to_nobody(
    start_daemon: Callable[..., DaemonProcess], count: int
) -> None:
    """Of a device without a limit, too."""
    daemon = start_daemon()
    raw = RawSession(daemon.runtime_dir)
    lease = leased(raw, GRANULE)
    digest = b"d" * 16
    expect(
        raw.ask(PutBlocks(blocks=(BlockToPut(digest, lease.offset, lease.generation),))), BlocksPut
    )
    expect(raw.ask(UnpinBlocks(digests=(digest,))), Done)
    assert raw.code(Lease(num_bytes=1 << 62, count=count)) == "out_of_device_memory"
    reply = raw.ask(LookUpBlocks(digests=(digest,)))
    assert getattr(reply, "extents", None) == (Extent(offset=lease.offset, num_bytes=GRANULE),)
    raw.close()


# --- sealing and moving


def test_saying_moved_does_not_seal_what_is_being_loaded(raw: RawSession, good: Client) -> None:
    generation = raw.elected("k")
    handle = raw.reserved("k", generation, GRANULE)
    assert raw.code(Moved(key="k", generation=generation)) == "invalid_message"
    status = (SHM_ROOT / handle.segment.lstrip("/")).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600


def test_a_segment_that_somebody_removed_can_not_be_sealed(raw: RawSession, good: Client) -> None:
    """As systemd does with RemoveIPC=yes when a user logs out."""
    generation = raw.elected("k")
    handle = raw.reserved("k", generation, GRANULE)
    (SHM_ROOT / handle.segment.lstrip("/")).unlink()
    seal = Seal(key="k", generation=generation, manifest=NOTHING, manifest_digest="")
    assert raw.code(seal) == "stale_generation"
    assert good.statistics().weight_sets[0].state == "loading"


def test_a_sealed_segment_that_somebody_removed_does_not_block_its_key(
    good: Client, daemon: DaemonProcess
) -> None:
    def load() -> None:
        writer = good.open_weight_set("k", {})
        assert isinstance(writer, WeightSetWriter)
        writer.reserve(GRANULE)
        writer.seal(Manifest(version=1, tensors={}, metadata={}), 0).release()

    load()
    [name] = segments(daemon.runtime_dir.segment_prefix)
    (SHM_ROOT / name).unlink()
    with pytest.raises(StaleGeneration):
        good.open_weight_set("k", {})
    for level in (1, 2):
        with contextlib.suppress(StaleGeneration):
            good.sleep("k", level=level, timeout_s=TIMEOUT_S)
        assert good.statistics().weight_sets[0].state in ("idle", "asleep")
    good.evict("k")
    load()


def file_handle(path: str, num_bytes: int, identity: str = "") -> Handle:
    if not identity:
        status = os.lstat(path)
        identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    return Handle(
        backend="file", segment=path, num_bytes=num_bytes, generation=0, identity=identity
    )


def test_files_are_what_the_writer_says_or_are_refused(
    raw: RawSession, good: Client, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(1000))
    real = file_handle(str(path), 1000)
    generation = raw.elected("k")
    raw.reserved("k", generation, GRANULE)
    wrong = {
        "a zero in its name": file_handle("/tmp/\0", 1, "1:2:3:4"),
        "a relative name": file_handle(os.path.relpath(path), 1000),
        "no such file": file_handle(f"{path}x", 1, "1:2:3:4"),
        "another file": file_handle(str(path), 1000, "1:2:3:4"),
        "no identity": Handle(backend="file", segment=str(path), num_bytes=1, generation=0),
        "more than there is": file_handle(str(path), 1001),
        "far more": file_handle(str(path), 1 << 62),
        "a folder": file_handle(str(tmp_path), 1),
        "a segment": Handle(backend="host", segment="/x", num_bytes=1, generation=0, identity="x"),
        "unknown": Handle(backend="tape", segment="/x", num_bytes=1, generation=0, identity="x"),
    }
    for what, handle in wrong.items():
        seal = Seal(
            key="k",
            generation=generation,
            manifest=NOTHING,
            manifest_digest="",
            files=(real, handle),
        )
        assert raw.code(seal) == "invalid_message", what


def test_what_is_counted_can_always_be_told(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    """Files with holes can be larger, all together, than a number on the wire."""
    daemon = start_daemon()
    raw = RawSession(daemon.runtime_dir)
    path = SHM_ROOT / daemon.runtime_dir.segment_prefix.lstrip("/").replace("onecopy", "sparse")
    path.touch()
    try:
        os.truncate(path, (1 << 61) + 1)
        handle = file_handle(str(path), (1 << 61) + 1)
        codes = []
        for key in ("a", "b"):
            generation = raw.elected(key)
            commit(raw.reserved(key, generation, GRANULE))
            seal = Seal(
                key=key,
                generation=generation,
                manifest=NOTHING,
                manifest_digest="",
                files=(handle,),
            )
            codes.append(getattr(raw.ask(seal), "code", ""))
        assert codes == ["", "out_of_device_memory"]
        with daemon.connect() as good:
            assert good.statistics().used_bytes == (1 << 61) + 1 + 2 * GRANULE
    finally:
        path.unlink()
        raw.close()


def test_whoever_is_refused_can_go_on(raw: RawSession, good: Client) -> None:
    generation = raw.elected("k")
    raw.reserved("k", generation, GRANULE)
    beyond = Extent(offset=GRANULE, num_bytes=1)
    seal = Seal(key="k", generation=generation, manifest=beyond, manifest_digest="")
    assert raw.code(seal) == "invalid_message"
    reply = raw.ask(Open(key="other", fingerprint={}, wait_ms=0))
    assert isinstance(reply, Elected)


# --- answers that would not fit


def test_statistics_fit_whatever_names_clients_have(good: Client, daemon: DaemonProcess) -> None:
    """The lists end where the frame does; the counts are whole."""
    long = "\N{SNOWMAN}" * 256
    hello = Hello(version=PROTOCOL_VERSION, model=long, user=long, label=long)
    lifelines = [Lifeline.connect(daemon.runtime_dir.lifeline, 20.0, hello) for _ in range(600)]
    statistics = good.statistics()
    assert statistics.num_sessions == 601
    assert 100 < len(statistics.sessions) < 600
    for lifeline in lifelines:
        lifeline.close()


def test_statistics_fit_however_often_a_set_is_read(raw: RawSession, good: Client) -> None:
    raw.sealed("k", GRANULE)
    request = encode(Open(key="k", fingerprint={}, wait_ms=0))
    for _ in range(100):
        for _ in range(12):
            raw.send(request)
        for _ in range(12):
            raw.receive()
    assert len(good.statistics().weight_sets[0].reader_pids) == 1000


def test_an_answer_that_would_not_fit_is_an_error(raw: RawSession, good: Client) -> None:
    """A fingerprint may fill a request; the answer to Sleep has more beside it."""
    fingerprint = {f"{n:03}": "x" * 4096 for n in range(255)}
    request = Open(key="k", fingerprint=fingerprint, wait_ms=0)
    fingerprint["255"] = "x" * (MAX_FRAME_BYTES - len(encode(request)) - 20)
    handle = raw.sealed("k", GRANULE, fingerprint)
    expect(raw.ask(Release(key="k", generation=handle.generation)), Done)
    assert raw.code(Sleep(key="k", tier="disk", wait_ms=0)) == "invalid_message"


# --- more clients than there are descriptors


def test_clients_without_number_are_refused_and_the_rest_is_served(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (160, 160))
    hello = Hello(version=PROTOCOL_VERSION)
    lifelines: list[Lifeline] = []

    def connect_many() -> None:
        while len(lifelines) < 200:
            lifelines.append(Lifeline.connect(daemon.runtime_dir.lifeline, 2.0, hello))

    with daemon.connect() as good:
        with pytest.raises(AllocatorBusy, match="no descriptors for more clients"):
            connect_many()
        good.lease(GRANULE).release()
        assert good.statistics().num_sessions == 1 + len(lifelines) == (160 - 64) // 2
        lifelines.pop().close()
        wait_until(
            lambda: good.statistics().num_sessions == 1 + len(lifelines), "one session has ended"
        )
        Lifeline.connect(daemon.runtime_dir.lifeline, 20.0, hello).close()
        good.check_integrity()
    for lifeline in lifelines:
        lifeline.close()
