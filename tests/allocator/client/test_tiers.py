"""Weight sets that sleep in host memory or on disk: the same bytes afterwards, whatever happens."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from allocator import (
    Client,
    InvalidMessage,
    Manifest,
    OutOfDeviceMemory,
    RuntimeDir,
    TensorEntry,
    UnknownWeightSet,
    WaitTimeout,
    WeightSetBusy,
    WeightSetReader,
    WeightSetWriter,
)
from allocator.backends import for_handle
from allocator.backends.host import SHM_ROOT
from allocator.errors import DiskError
from allocator.images import write_image
from allocator.messages import (
    Done,
    Elected,
    Moved,
    Moving,
    Open,
    Progress,
    Reserve,
    Sleep,
    WeightSetStatistics,
)
from tests.allocator.client.tiers_on_small_disk import (
    on_small_disk,
    sleep_on_a_full_disk,
    use_a_read_only_disk,
)
from tests.allocator.daemon.raw_session import RawSession
from tests.allocator.processes import ClientProcess, Refused
from tests.daemon_process import DaemonProcess
from tests.leaks import segments, wait_until

MIB = 1 << 20
StartDaemon = Callable[..., DaemonProcess]
Start = Callable[[], ClientProcess]


@pytest.fixture
def start(daemon: DaemonProcess) -> Iterator[Start]:
    """Start client processes; they are stopped before the daemon is."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(ClientProcess(daemon.runtime_dir))


def load(memory: Client, key: str = "k", num_bytes: int = MIB) -> tuple[WeightSetReader, bytes]:
    """A set of random bytes in three tensors, one of them empty and two tied, and those bytes."""
    writer = memory.open_weight_set(key, {"made": "here"})
    assert isinstance(writer, WeightSetWriter)
    content = os.urandom(num_bytes)
    half = num_bytes // 2
    parts = {"a": (0, half), "b": (half, num_bytes - half), "none": (0, 0), "tied": (0, half)}
    entries = {
        name: TensorEntry(dtype="uint8", shape=(size,), stride=(1,), offset=offset, num_bytes=size)
        for name, (offset, size) in parts.items()
    }
    with writer:
        writer.reserve(num_bytes + 4096)[:num_bytes] = content
        reader = writer.seal(Manifest(version=1, tensors=entries, metadata={"a": "b"}), num_bytes)
    return reader, content


def idle(memory: Client, key: str = "k", num_bytes: int = MIB) -> bytes:
    reader, content = load(memory, key, num_bytes)
    reader.release()
    return content


def found(memory: Client, key: str = "k") -> WeightSetStatistics | None:
    return next((s for s in memory.statistics().weight_sets if s.key == key), None)


def where(memory: Client, key: str = "k") -> tuple[str, str]:
    """(state, tier)."""
    one = found(memory, key)
    return (one.state, one.tier) if one is not None else ("absent", "")


def opened(memory: Client, key: str = "k") -> WeightSetReader:
    reader = memory.open_weight_set(key, {"made": "here"})
    assert isinstance(reader, WeightSetReader), "it would have to be loaded anew"
    return reader


def check(memory: Client, content: bytes, key: str = "k") -> None:
    """Open the set, and compare each of its bytes."""
    reader = opened(memory, key)
    assert reader.damaged() == []
    tensors = {name: bytes(tensor.numpy()) for name, tensor in reader.tensors().items()}
    half = len(content) // 2
    assert tensors == {
        "a": content[:half],
        "b": content[half:],
        "none": b"",
        "tied": content[:half],
    }
    assert reader.manifest.metadata == {"a": "b"}
    reader.release()


def events(memory: Client, kind: str) -> int:
    return sum(event.kind == kind for event in memory.events())


def images(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


# --- down and up again


@pytest.mark.parametrize("how", ["wake", "open"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_set_sleeps_and_wakes_with_the_same_bytes(
    memory: Client, runtime_dir: RuntimeDir, image_folder: Path, level: int, how: str
) -> None:
    content = idle(memory)
    before = found(memory)
    assert before is not None
    memory.sleep("k", level=level)
    statistics = memory.statistics()
    [asleep] = statistics.weight_sets
    assert (asleep.state, asleep.tier) == ("asleep", "host" if level == 1 else "disk")
    assert (statistics.used_bytes, statistics.weights_bytes) == (0, 0)
    assert statistics.host_tier_bytes == (before.num_bytes if level == 1 else 0)
    assert asleep.has_image == (level == 2)
    # The only copy is where it should be, and nowhere else.
    assert len(segments(runtime_dir.segment_prefix)) == (1 if level == 1 else 0)
    assert len(images(image_folder)) == (0 if level == 1 else 1)
    if how == "wake":
        memory.wake("k")
        assert where(memory) == ("idle", "device")
    check(memory, content)
    assert where(memory) == ("idle", "device")
    assert memory.statistics().host_tier_bytes == 0
    assert memory.statistics().used_bytes == before.num_bytes
    assert (events(memory, "asleep"), events(memory, "woken")) == (1, 1)


def test_in_host_memory_nothing_is_copied(memory: Client) -> None:
    """There the device's memory is the host's own: the set only counts for the other tier."""
    idle(memory)
    before = found(memory)
    memory.sleep("k", level=1)
    asleep = found(memory)
    memory.wake("k")
    after = found(memory)
    assert before is not None
    assert asleep is not None
    assert after is not None
    assert before.segment == asleep.segment == after.segment


def test_an_image_is_mapped_as_it_is(
    memory: Client, runtime_dir: RuntimeDir, image_folder: Path
) -> None:
    idle(memory)
    memory.sleep("k", level=2)
    [image] = images(image_folder)
    assert image.stat().st_mode & 0o777 == 0o400
    assert image_folder.stat().st_mode & 0o777 == 0o700
    reader = opened(memory)
    assert (reader.handle.backend, reader.handle.segment) == ("file", str(image))
    maps = Path("/proc/self/maps").read_text()
    [line] = [line.split() for line in maps.splitlines() if line.endswith(str(image))]
    assert (line[1], int(line[4])) == ("r--s", image.stat().st_ino)
    assert segments(runtime_dir.segment_prefix) == []
    reader.release()
    # To sleep again takes no writing: the image is still good.
    before = image.stat()
    memory.sleep("k", level=2)
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_lower_and_lower(memory: Client, image_folder: Path) -> None:
    content = idle(memory)
    for level, tier in ((1, "host"), (1, "host"), (2, "disk"), (2, "disk"), (1, "disk")):
        memory.sleep("k", level=level)
        assert where(memory) == ("asleep", tier)
    assert memory.statistics().host_tier_bytes == 0
    assert len(images(image_folder)) == 1
    check(memory, content)


@pytest.mark.parametrize("level", [1, 2])
def test_many_who_wait_wake_a_set_once(start: Start, memory: Client, level: int) -> None:
    loader, others = start(), [start() for _ in range(4)]
    assert loader.do.load("k", 8 * MIB, 7) == "writer"
    digest = loader.do.digest()
    loader.do.release()
    memory.sleep("k", level=level)
    for client in others:
        client.begin.open("k", {})
    assert [client.receive() for client in others] == ["reader"] * 4
    assert {client.do.digest() for client in others} == {digest}
    assert all(client.do.damaged() == [] for client in others)
    assert events(memory, "woken") == 1
    one = found(memory)
    assert one is not None
    assert sorted(one.reader_pids) == sorted(client.pid for client in others)


@pytest.mark.parametrize("level", [1, 2])
def test_two_who_ask_at_once_put_it_to_sleep_once(
    start: Start, memory: Client, image_folder: Path, level: int
) -> None:
    content = idle(memory, num_bytes=16 * MIB)
    clients = [start(), start(), start()]
    for client in clients:
        client.begin.sleep("k", level)
    for client in clients:
        client.receive()
    assert where(memory) == ("asleep", "host" if level == 1 else "disk")
    assert events(memory, "asleep") == 1
    assert len(images(image_folder)) == level - 1
    check(memory, content)


def test_a_sleeping_set_can_be_evicted_and_its_image_only_if_asked(
    memory: Client, runtime_dir: RuntimeDir, image_folder: Path
) -> None:
    idle(memory, "a")
    memory.sleep("a", level=1)
    memory.evict("a")
    assert where(memory, "a") == ("absent", "")
    assert segments(runtime_dir.segment_prefix) == []
    content = idle(memory, "b")
    memory.sleep("b", level=2)
    memory.evict("b")
    assert where(memory, "b") == ("asleep", "disk")
    check(memory, content, "b")
    memory.evict("b")  # what was mapped of the image is let go
    assert where(memory, "b") == ("asleep", "disk")
    memory.evict("b", image=True)
    assert (where(memory, "b"), images(image_folder)) == (("absent", ""), [])
    with pytest.raises(UnknownWeightSet):
        memory.wake("b")


def test_pinned_sets_can_sleep_and_stay_pinned(memory: Client) -> None:
    idle(memory)
    memory.pin("k")
    memory.sleep("k", level=2)
    memory.wake("k")
    one = found(memory)
    assert one is not None
    assert one.pinned


# --- what is refused


@pytest.mark.parametrize("level", [1, 2])
def test_what_is_used_does_not_sleep(memory: Client, image_folder: Path, level: int) -> None:
    reader, content = load(memory)
    with pytest.raises(WeightSetBusy, match="'k' is sealed: stop its readers first"):
        memory.sleep("k", level=level)
    reader.release()
    writer = memory.open_weight_set("other", {})
    with pytest.raises(WeightSetBusy, match="'other' is loading: stop its writer first"):
        memory.sleep("other", level=level)
    assert isinstance(writer, WeightSetWriter)
    writer.abandon()
    assert images(image_folder) == []
    check(memory, content)


def test_what_there_is_not_does_not_sleep_or_wake(memory: Client) -> None:
    for call in (memory.sleep, memory.wake):
        with pytest.raises(UnknownWeightSet, match="no weight set is called 'k'"):
            call("k")
    idle(memory)
    with pytest.raises(InvalidMessage, match="level 3 is neither 1"):
        memory.sleep("k", level=3)
    memory.wake("k")  # it is awake already
    assert where(memory) == ("idle", "device")


def test_who_wakes_what_is_being_loaded_waits_and_loads_nothing(
    daemon: DaemonProcess, memory: Client
) -> None:
    with daemon.connect() as other:
        writer = other.open_weight_set("k", {"made": "here"})
        assert isinstance(writer, WeightSetWriter)
        with pytest.raises(WaitTimeout):
            memory.wake("k", timeout_s=0.05)
        writer.abandon()
        with pytest.raises(UnknownWeightSet):
            memory.wake("k", timeout_s=0.05)
    assert where(memory) == ("absent", "")


def test_the_host_tier_has_a_limit(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--host-tier-limit", str(3 * MIB))
    with daemon.connect() as memory:
        contents = {key: idle(memory, key, 2 * MIB) for key in "ab"}
        memory.sleep("a", level=1)
        with pytest.raises(OutOfDeviceMemory, match=r"2\.1 MB are to sleep.* --host-tier-limit"):
            memory.sleep("b", level=1)
        assert where(memory, "b") == ("idle", "device")
        memory.sleep("b", level=2)
        assert where(memory, "b") == ("asleep", "disk")
        memory.wake("a")
        assert memory.statistics().host_tier_limit_bytes == 3 * MIB
        for key, content in contents.items():
            check(memory, content, key)


@pytest.mark.parametrize("level", [1, 2])
def test_what_finds_no_room_to_wake_sleeps_on(start_daemon: StartDaemon, level: int) -> None:
    with start_daemon("--memory-limit", str(3 * MIB)).connect() as memory:
        content = idle(memory, "k", 2 * MIB - 4096)
        memory.sleep("k", level=level)
        reader, _ = load(memory, "held", 2 * MIB - 4096)
        for call in (memory.wake, lambda key: memory.open_weight_set(key, {"made": "here"})):
            with pytest.raises(OutOfDeviceMemory, match=r"held \(sealed, 2\.1 MB\)"):
                call("k")
            assert where(memory) == ("asleep", "host" if level == 1 else "disk")
        reader.release()
        check(memory, content)  # "held" goes for it
        assert where(memory, "held") == ("absent", "")


# --- what gives way to others


def test_what_gives_way_is_the_least_recently_used_and_keeps_its_image(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir, image_folder: Path
) -> None:
    with start_daemon("--memory-limit", str(4 * MIB)).connect() as memory:
        contents = {key: idle(memory, key, MIB) for key in "abc"}
        memory.sleep("b", level=2)
        memory.wake("b")
        opened(memory, "a").release()  # now "c" is what nobody used for longest, then "b"
        contents["d"] = idle(memory, "d", MIB)
        assert (where(memory, "c"), where(memory, "b")) == (("absent", ""), ("idle", "device"))
        contents["e"] = idle(memory, "e", MIB)
        assert where(memory, "b") == ("asleep", "disk")
        assert {where(memory, key) for key in "ade"} == {("idle", "device")}
        assert memory.statistics().num_evictions == 2
        assert memory.statistics().used_bytes == 3 * (MIB + 4096)
        assert len(segments(runtime_dir.segment_prefix)) == 3
        check(memory, contents["b"], "b")  # from its image, and now "a" goes for it
        assert where(memory, "a") == ("absent", "")
        for key in "de":
            check(memory, contents[key], key)
        assert len(images(image_folder)) == 1


def test_what_is_pinned_or_asleep_gives_way_to_nobody(start_daemon: StartDaemon) -> None:
    with start_daemon("--memory-limit", str(3 * MIB)).connect() as memory:
        contents = {key: idle(memory, key, MIB) for key in ("pinned", "asleep")}
        memory.pin("pinned")
        memory.sleep("asleep", level=1)
        idle(memory, "other", MIB)
        for number in range(3):
            contents[f"{number}"] = idle(memory, f"{number}", MIB)
        with pytest.raises(OutOfDeviceMemory, match=r"pinned \(idle, pinned, 1\.1 MB\).*Unpin"):
            memory.lease(2 * MIB)
        assert where(memory, "pinned") == ("idle", "device")
        assert where(memory, "asleep") == ("asleep", "host")
        check(memory, contents["pinned"], "pinned")
        check(memory, contents["asleep"], "asleep")
        check(memory, contents["pinned"], "pinned")
        memory.pin("pinned", False)
        memory.lease(2 * MIB)
        assert where(memory, "pinned") == ("absent", "")


# --- what fails on the way


def test_a_full_disk_leaves_the_set_where_it_was(runtime_dir: RuntimeDir) -> None:
    outcome = on_small_disk(sleep_on_a_full_disk, runtime_dir)
    assert "an image of 4.2 MB can't be written" in outcome["too_large"]
    assert "delete images or other files there" in outcome["too_large"]
    assert outcome["state_then"] == ["idle", "device"]
    assert outcome["left_then"] == ["another program's"]
    assert outcome["damaged_then"] == []
    assert outcome["state_with_room"] == ["asleep", "disk"]
    assert outcome["damaged_at_last"] == []


def test_a_disk_that_can_not_be_written_is_an_error_of_who_needs_it(
    runtime_dir: RuntimeDir,
) -> None:
    """The image can be read all the same, and nobody loses anything."""
    outcome = on_small_disk(use_a_read_only_disk, runtime_dir)
    assert "can't be deleted: Read-only file system" in outcome["evict"]
    assert outcome["state_then"] == ["asleep", "disk"]
    assert outcome["damaged"] == []
    assert outcome["state_awake"] == ["idle", "device"]
    assert outcome["evicted"] == ["asleep", "disk"]
    assert outcome["had_sources"] == [True, False]
    assert outcome["same_files"]
    assert outcome["lease"]
    assert outcome["same_daemon"]


def test_an_image_whose_writer_ends_before_it_says_so_is_there(
    memory: Client, runtime_dir: RuntimeDir
) -> None:
    """Nobody else would find it, and nobody would remove it."""
    content = idle(memory)
    session = RawSession(runtime_dir)
    moving = session.ask(Sleep(key="k", tier="disk", wait_ms=0))
    assert isinstance(moving, Moving)
    with contextlib.closing(for_handle(moving.handle).map(moving.handle, writable=False)) as source:
        write_image(
            Path(moving.image_folder),
            *("k", moving.fingerprint, source.buffer, moving.manifest, lambda _: None),
        )
    assert where(memory, "k") == ("moving", "device")
    session.close()
    wait_until(lambda: where(memory, "k") == ("idle", "device"), "it is where it was")
    memory.evict("k")
    assert where(memory, "k") == ("asleep", "disk")
    check(memory, content)
    memory.evict("k", image=True)
    assert where(memory, "k") == ("absent", "")
    assert list(Path(moving.image_folder).iterdir()) == []


def test_a_folder_that_is_none_leaves_the_set_where_it_was(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "images"
    with start_daemon("--image-dir", str(folder)).connect() as memory:
        content = idle(memory)
        with pytest.raises(DiskError, match="Not a directory"):
            memory.sleep("k", level=2)
        assert where(memory) == ("idle", "device")
        check(memory, content)


def test_a_mover_that_is_killed_leaves_the_set_where_it_was(
    start: Start, memory: Client, image_folder: Path
) -> None:
    """In the middle of the image, while another process waits to open the set."""
    content = idle(memory, num_bytes=64 * MIB)
    mover, waiter = start(), start()
    mover.begin.sleep("k", 2)
    wait_until(lambda: images(image_folder), "the image is begun")
    mover.pause()
    assert where(memory) == ("moving", "device")
    assert not images(image_folder)[0].name.endswith(".weights")
    waiter.begin.open("k", {"made": "here"})
    mover.kill()
    assert waiter.receive() == "reader"
    wait_until(lambda: not images(image_folder), "nothing is left of the image")
    one = found(memory)
    assert one is not None
    assert (one.state, one.reader_pids) == ("sealed", (waiter.pid,))
    waiter.do.release()
    assert where(memory) == ("idle", "device")
    memory.sleep("k", level=2)
    check(memory, content)


@pytest.mark.parametrize("says", ["nothing", "progress", "moved too early"])
def test_a_mover_that_does_not_do_it_is_not_believed(
    daemon: DaemonProcess, memory: Client, image_folder: Path, says: str
) -> None:
    content = idle(memory)
    raw = RawSession(daemon.runtime_dir)
    moving = raw.ask(Sleep(key="k", tier="disk", wait_ms=0))
    assert isinstance(moving, Moving)
    assert moving.image_folder == str(image_folder)
    if says == "progress":
        num_bytes = moving.handle.num_bytes
        done = raw.ask(Progress(key="k", generation=moving.generation, num_bytes=num_bytes))
        assert isinstance(done, Done)
    if says == "moved too early":
        assert raw.code(Moved(key="k", generation=moving.generation)) == "invalid_message"
    with pytest.raises(WaitTimeout, match=f"process {os.getpid()} has been at work on 'k'"):
        memory.sleep("k", timeout_s=0.05)
    assert where(memory) == ("moving", "device")
    raw.close()
    wait_until(lambda: where(memory) == ("idle", "device"), "the mover is gone")
    check(memory, content)


def test_who_is_to_wake_a_set_and_goes_leaves_it_asleep(
    daemon: DaemonProcess, memory: Client
) -> None:
    content = idle(memory)
    memory.sleep("k", level=2)
    raw = RawSession(daemon.runtime_dir)
    elected = raw.ask(Open(key="k", fingerprint=None, wait_ms=0))
    assert isinstance(elected, Elected)
    assert elected.source is not None
    assert elected.source.tier == "disk"
    raw.ask(Reserve(key="k", generation=elected.generation, num_bytes=2 * MIB))
    assert where(memory) == ("moving", "disk")
    raw.close()
    wait_until(lambda: where(memory) == ("asleep", "disk"), "it sleeps on")
    assert memory.statistics().used_bytes == 0
    check(memory, content)


# --- images that outlive their daemon, or rot


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_image_outlives_the_daemon(
    start_daemon: StartDaemon, image_folder: Path, end: signal.Signals
) -> None:
    daemon = start_daemon()
    with daemon.connect() as memory:
        content = idle(memory)
        memory.sleep("k", level=2)
    daemon.process.send_signal(end)
    daemon.process.wait(60)
    [image] = images(image_folder)
    with start_daemon().connect() as memory:
        assert where(memory) == ("asleep", "disk")
        assert memory.statistics().used_bytes == 0
        reader = opened(memory)
        assert reader.handle.segment == str(image)
        reader.release()
        check(memory, content)


def test_a_set_that_is_awake_when_the_daemon_ends_is_woken_from_its_image(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    with daemon.connect() as memory:
        content = idle(memory)
        memory.sleep("k", level=2)
        memory.wake("k")
    daemon.stop()
    with start_daemon().connect() as memory:
        check(memory, content)


def test_an_image_of_another_fingerprint_is_no_hindrance(
    start_daemon: StartDaemon, image_folder: Path
) -> None:
    daemon = start_daemon()
    with daemon.connect() as memory:
        content = idle(memory)
        memory.sleep("k", level=2)
        other = memory.open_weight_set("k", {"made": "elsewhere"})
        assert isinstance(other, WeightSetWriter)
        other.abandon()
        check(memory, content)  # found again, by its name
    assert len(images(image_folder)) == 1


def damage(image: Path, offset: int, *, unnoticed: bool) -> None:
    """Change one byte; `unnoticed` as a disk does, without a trace in the file's times."""
    before = image.stat()
    image.chmod(0o600)
    with image.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    image.chmod(0o400)
    if unnoticed:
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte of the first tensor": lambda image: damage(image, 5, unnoticed=True),
    "the last byte of the last tensor": lambda image: damage(image, MIB - 1, unnoticed=True),
    "a byte of the manifest": lambda image: damage(image, MIB + 3, unnoticed=True),
    "a byte of the footer": lambda image: damage(image, -30, unnoticed=True),
    "written to": lambda image: damage(image, 5, unnoticed=False),
    "cut off": lambda image: (image.chmod(0o600), os.truncate(image, MIB)),
    "empty": lambda image: (image.chmod(0o600), os.truncate(image, 0)),
    "gone": lambda image: image.unlink(),
    "a folder": lambda image: (image.unlink(), image.mkdir()),
}


@pytest.mark.parametrize("restarted", [False, True], ids=["same daemon", "next daemon"])
@pytest.mark.parametrize("what", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_image_is_given_up_and_the_set_loaded_anew(
    start_daemon: StartDaemon, image_folder: Path, what: Callable[[Path], object], restarted: bool
) -> None:
    daemon = start_daemon()
    with daemon.connect() as memory:
        idle(memory)
        memory.sleep("k", level=2)
    [image] = images(image_folder)
    if restarted:
        daemon.stop()
    what(image)
    if restarted:
        daemon = start_daemon()
    with daemon.connect() as memory:
        with pytest.raises(UnknownWeightSet):
            memory.wake("k")
        assert where(memory) == ("absent", "")
        content = idle(memory)  # its writer finds nothing to wake it from
        if not image.is_dir():
            memory.sleep("k", level=2)
        check(memory, content)


def test_one_who_waits_loads_what_could_not_be_woken(
    daemon: DaemonProcess, memory: Client, image_folder: Path, start: Start
) -> None:
    idle(memory)
    memory.sleep("k", level=2)
    raw = RawSession(daemon.runtime_dir)
    assert isinstance(raw.ask(Open(key="k", fingerprint=None, wait_ms=0)), Elected)
    waiter = start()
    waiter.begin.open("k", {"made": "here"})
    damage(images(image_folder)[0], 9, unnoticed=True)
    raw.close()  # now the one who waits is to wake it, and finds what has become of it
    assert waiter.receive() == "writer"
    waiter.do.reserve(MIB)
    waiter.do.fill(3)
    waiter.do.seal()
    assert waiter.do.damaged() == []
    assert events(memory, "discarded") == 1
    assert images(image_folder) == []


def test_a_client_process_says_by_name_why_a_set_cannot_sleep(start: Start) -> None:
    client = start()
    with pytest.raises(Refused, match="UnknownWeightSet"):
        client.do.sleep("k", 2)
    assert client.do.load("k", MIB, 1) == "writer"
    with pytest.raises(Refused, match="WeightSetBusy"):
        client.do.sleep("k", 2)
    client.do.release()
    client.do.sleep("k", 2)
    client.do.wake("k")
    assert client.do.load("k", MIB, 2) == "reader"
    assert client.do.damaged() == []


def test_shared_memory_of_a_sleeping_set_is_free(memory: Client, runtime_dir: RuntimeDir) -> None:
    def shared_bytes() -> int:
        names = segments(runtime_dir.segment_prefix)
        return sum((SHM_ROOT / name).stat().st_blocks * 512 for name in names)

    content = idle(memory, num_bytes=8 * MIB)
    assert shared_bytes() >= 8 * MIB
    memory.sleep("k", level=2)
    assert shared_bytes() == 0
    check(memory, content)
    assert shared_bytes() == 0  # the page cache holds the one copy
