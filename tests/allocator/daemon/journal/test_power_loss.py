"""What a new daemon does not take over: memory of another boot, damaged bytes, a journal that lies.

A daemon always starts, and what it starts with is in order, whatever it found.
"""

import contextlib
import os
import random
import resource
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest

from allocator import Client, Manifest, RuntimeDir, TensorEntry, WeightSetWriter
from allocator.backends.host import SHM_ROOT, HostBackend
from allocator.books import LeasesSealed, PinsChanged
from allocator.daemon.adoption import adopt
from allocator.daemon.device.budget import Holder
from allocator.daemon.journal.file import Journal, read_journal
from allocator.daemon.journal.records import (
    BlockGone,
    BlocksKept,
    QuotaKept,
    Record,
    RunBegan,
    SessionBegan,
    SessionChanged,
    SessionEnded,
    SetKept,
    decode_record,
    read_records,
)
from allocator.messages import Extent, Handle, Message, encode
from tests.allocator.backends.doomed import Doomed
from tests.allocator.processes import ClientProcess
from tests.daemon_process import DaemonProcess
from tests.leaks import segments, wait_until

KIB = 1 << 10
MIB = 1 << 20
EXTENT = 64 * KIB
TENSOR_BYTES = 8192
MANIFEST_AT = TENSOR_BYTES + 4096
"""Between the tensor and the manifest are bytes that mean nothing."""
SEGMENT_BYTES = MANIFEST_AT + 4096
NOTE = "nobody reads this, and it can be changed without a trace but for the manifest's digest"
DIGEST = b"block 0 of some text"
StartDaemon = Callable[..., DaemonProcess]


def seal_a_set(memory: Client, key: str) -> None:
    """An idle set of one tensor."""
    writer = memory.open_weight_set(key, {"made": "here"})
    assert isinstance(writer, WeightSetWriter)
    buffer = writer.reserve(SEGMENT_BYTES)
    buffer[:TENSOR_BYTES] = b"t" * TENSOR_BYTES
    del buffer
    entry = TensorEntry(
        dtype="uint8", shape=(TENSOR_BYTES,), stride=(1,), offset=0, num_bytes=TENSOR_BYTES
    )
    manifest = Manifest(version=1, tensors={"x": entry}, metadata={"note": NOTE})
    writer.seal(manifest, MANIFEST_AT).release()


def live_and_die(daemon: DaemonProcess) -> None:
    """A client's whole life, then a kill of the daemon: idle sets, one that is not finished, leases
    and blocks, some of them gone again."""

    def work(report: Callable[[int], None]) -> None:
        with daemon.connect(model="m", user="u") as memory:
            for key in ("a", "b"):
                seal_a_set(memory, key)
            memory.pin("a")
            memory.set_quota("model", "m", MIB)
            unfinished = memory.open_weight_set("c", {})
            assert isinstance(unfinished, WeightSetWriter)
            unfinished.reserve(SEGMENT_BYTES)
            leases = memory.lease_many(EXTENT, 4)
            for value, lease in enumerate(leases):
                lease.buffer[:] = bytes([value + 1]) * EXTENT
            memory.put_blocks([(DIGEST, leases[0]), (DIGEST[::-1], leases[1])])
            memory.look_up_blocks([DIGEST])
            leases[2].release()
            report(1)
            signal.pause()

    with Doomed(work) as client:
        assert client.read() == 1
        daemon.kill()


def records_of(runtime_dir: RuntimeDir) -> list[Record]:
    return [decode_record(payload) for payload in read_journal(runtime_dir.journal)]


def write_journal(runtime_dir: RuntimeDir, records: Iterable[Message]) -> None:
    Journal.create(runtime_dir.journal, map(encode, records)).close()


def segment_of(runtime_dir: RuntimeDir, key: str) -> Path:
    kept = [r for r in records_of(runtime_dir) if isinstance(r, SetKept) and r.key == key]
    return SHM_ROOT / kept[-1].copies["device"].handle.segment.lstrip("/")


def found_by(daemon: DaemonProcess) -> dict[str, str]:
    """The states of all weight sets; everything is in order, and others are served."""
    with daemon.connect() as memory:
        memory.check_integrity()
        lease = memory.lease(EXTENT)
        assert bytes(lease.buffer[:EXTENT]) == bytes(EXTENT)
        lease.release()
        statistics = memory.statistics()
        assert statistics.num_sessions == 1
        assert statistics.pool.leased_bytes == 0
        return {s.key: s.state for s in statistics.weight_sets}


@pytest.fixture
def dead(start_daemon: StartDaemon, runtime_dir: RuntimeDir) -> Iterator[RuntimeDir]:
    """A runtime directory all of whose processes are gone. What they left lies there."""
    daemon = start_daemon()
    live_and_die(daemon)
    assert len(segments(runtime_dir.segment_prefix)) == 4
    yield runtime_dir
    if runtime_dir.owner("allocator") is None:
        start_daemon()  # it removes what is left


def test_what_was_sealed_is_there_and_nothing_else(
    dead: RuntimeDir, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon()
    with daemon.connect() as memory:
        pool = memory.statistics().pool
        assert (pool.num_blocks, pool.evictable_bytes, pool.leased_bytes) == (2, 2 * EXTENT, 0)
        assert [bytes(b.buffer[:1]) for b in memory.look_up_blocks([DIGEST])] == [b"\1"]
    assert found_by(daemon) == {"a": "idle", "b": "idle"}
    assert len(segments(dead.segment_prefix)) == 3


# --- power loss


def nothing_is_left(daemon: DaemonProcess, runtime_dir: RuntimeDir) -> None:
    """Nothing was adopted; what was there before is removed. `found_by` makes a new pool."""
    assert segments(runtime_dir.segment_prefix) == []
    assert found_by(daemon) == {}
    [pool] = segments(runtime_dir.segment_prefix)
    assert (SHM_ROOT / pool).stat().st_blocks == 0


def of_another_boot(runtime_dir: RuntimeDir) -> None:
    first, *others = records_of(runtime_dir)
    assert isinstance(first, RunBegan)
    other = RunBegan(version=first.version, boot_id="00000000-0000-4000-8000-000000000000")
    write_journal(runtime_dir, [other, *others])


def of_another_version(runtime_dir: RuntimeDir) -> None:
    first, *others = records_of(runtime_dir)
    assert isinstance(first, RunBegan)
    write_journal(
        runtime_dir, [RunBegan(version=first.version + 1, boot_id=first.boot_id), *others]
    )


def without_its_beginning(runtime_dir: RuntimeDir) -> None:
    write_journal(runtime_dir, records_of(runtime_dir)[1:])


def with_a_strange_record(runtime_dir: RuntimeDir) -> None:
    payloads = read_journal(runtime_dir.journal)
    Journal.create(runtime_dir.journal, [*payloads, b"\x81\xa4type\xa7unknown"]).close()


def as_a_symbolic_link(runtime_dir: RuntimeDir) -> None:
    moved = runtime_dir.path / "elsewhere"
    runtime_dir.journal.rename(moved)
    runtime_dir.journal.symlink_to(moved)


def as_a_pipe(runtime_dir: RuntimeDir) -> None:
    runtime_dir.journal.unlink()
    os.mkfifo(runtime_dir.journal)


def of_another_user(runtime_dir: RuntimeDir) -> None:
    os.chown(runtime_dir.journal, 65534, 65534)


JOURNALS: dict[str, Callable[[RuntimeDir], object]] = {
    "of another boot": of_another_boot,
    "of another version": of_another_version,
    "without its beginning": without_its_beginning,
    "with a strange record": with_a_strange_record,
    "missing": lambda runtime_dir: runtime_dir.journal.unlink(),
    "empty": lambda runtime_dir: runtime_dir.journal.write_bytes(b""),
    "garbage": lambda runtime_dir: runtime_dir.journal.write_bytes(bytes(range(256)) * 100),
    "as a symbolic link": as_a_symbolic_link,
    "as a pipe": as_a_pipe,
}


@pytest.mark.parametrize("spoil", JOURNALS.values(), ids=JOURNALS.keys())
def test_with_such_a_journal_nothing_is_taken_over(
    dead: RuntimeDir, start_daemon: StartDaemon, spoil: Callable[[RuntimeDir], object]
) -> None:
    spoil(dead)
    nothing_is_left(start_daemon(), dead)
    (dead.path / "elsewhere").unlink(missing_ok=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_another_users_journal_is_not_believed(dead: RuntimeDir, start_daemon: StartDaemon) -> None:
    of_another_user(dead)
    nothing_is_left(start_daemon(), dead)


def test_clients_that_live_on_without_a_journal_keep_their_bytes_and_begin_anew(
    runtime_dir: RuntimeDir, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon()
    with ClientProcess(runtime_dir) as client:
        assert client.do.load("k", MIB, 1) == "writer"
        [offset] = client.do.lease(EXTENT)
        client.do.fill_leases([(offset, 2)])
        digests = client.do.digest(), client.do.lease_digest(offset)
        daemon.kill()
        runtime_dir.journal.unlink()
        with start_daemon().connect() as memory:
            assert segments(runtime_dir.segment_prefix) == []
            assert (client.do.digest(), client.do.lease_digest(offset)) == digests
            assert memory.statistics().num_sessions == 1
            # Its next request begins a new session; the set has to be loaded for others.
            assert client.do.load("k", MIB, 3) == "writer"
            assert memory.statistics().num_sessions == 2
            memory.check_integrity()


# --- bytes that are not what was sealed


def tamper(path: Path, offset: int) -> None:
    """As the file's owner can, whatever its mode says."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o400)


@pytest.mark.parametrize("offset", [0, TENSOR_BYTES // 2, TENSOR_BYTES - 1, MANIFEST_AT + 5])
def test_a_set_with_another_bit_is_not_taken_over(
    dead: RuntimeDir, start_daemon: StartDaemon, offset: int
) -> None:
    path = segment_of(dead, "a")
    tamper(path, offset)
    assert found_by(start_daemon()) == {"b": "idle"}
    assert not path.exists()


def test_a_set_whose_manifest_says_something_else_is_not_taken_over(
    dead: RuntimeDir, start_daemon: StartDaemon
) -> None:
    path = segment_of(dead, "a")
    tamper(path, path.read_bytes().index(NOTE.encode()))
    assert found_by(start_daemon()) == {"b": "idle"}


def test_bytes_that_mean_nothing_do_not_matter(dead: RuntimeDir, start_daemon: StartDaemon) -> None:
    tamper(segment_of(dead, "a"), TENSOR_BYTES)
    assert found_by(start_daemon()) == {"a": "idle", "b": "idle"}


def replaced(path: Path) -> None:
    """By one of the same name, size, mode and bytes."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o400)


def shorter(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, SEGMENT_BYTES - 4096)
    path.chmod(0o400)


SEGMENTS: dict[str, Callable[[Path], object]] = {
    "replaced": replaced,
    "shorter": shorter,
    "writable": lambda path: path.chmod(0o600),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_a_segment_that_is_not_the_one_that_was_sealed_is_removed(
    dead: RuntimeDir, start_daemon: StartDaemon, spoil: Callable[[Path], object]
) -> None:
    path = segment_of(dead, "a")
    spoil(path)
    assert found_by(start_daemon()) == {"b": "idle"}
    assert not path.exists()


def test_the_pool_that_was_replaced_is_another(dead: RuntimeDir, start_daemon: StartDaemon) -> None:
    [path] = [
        SHM_ROOT / name
        for name in segments(dead.segment_prefix)
        if (SHM_ROOT / name).stat().st_size > MIB
    ]
    size = path.stat().st_size
    path.unlink()
    path.touch(mode=0o600)
    os.truncate(path, size)
    daemon = start_daemon()
    with daemon.connect() as memory:
        assert memory.statistics().pool.num_blocks == 0
    assert not path.exists()
    assert found_by(daemon) == {"a": "idle", "b": "idle"}


def test_a_set_with_files_is_taken_over_while_they_are_what_they_were(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(5000))
    daemon = start_daemon()
    status = path.lstat()
    file = Handle(
        backend="file",
        segment=str(path),
        num_bytes=5000,
        generation=0,
        identity=f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}",
    )
    with daemon.connect() as memory:
        writer = memory.open_weight_set("k", {})
        assert isinstance(writer, WeightSetWriter)
        writer.reserve(4096)
        writer.seal(Manifest(version=1, tensors={}, metadata={}), 0, [file]).release()
        daemon.kill()
    daemon = start_daemon()
    with daemon.connect() as memory:
        assert [s.state for s in memory.statistics().weight_sets] == ["idle"]
    daemon.kill()
    os.utime(path, ns=(0, 0))
    with start_daemon().connect() as memory:
        assert memory.statistics().weight_sets == ()


# --- journals that end anywhere, or lie


def adopted_from(runtime_dir: RuntimeDir, payloads: Sequence[bytes]) -> tuple[int, int, int]:
    """(weight sets, leases, blocks) that would be taken over, all of it in order."""
    kept = read_records(payloads)
    holders = {number: Holder() for number in kept.sessions}
    with contextlib.closing(HostBackend()) as backend:
        adopted = adopt(
            kept.device("host"),
            kept.books,
            holders,
            backend,
            backend,
            limit_bytes=None,
            quotas={},
            now=0.0,
        )
    adopted.memory.check()
    for session in kept.sessions:
        adopted.memory.end_session(session, 0.0)
    adopted.memory.check()
    pool = adopted.memory.pool.statistics()
    assert pool.leased_bytes == 0
    assert pool.cached_bytes == pool.evictable_bytes
    assert adopted.pool is not None or not pool.num_blocks
    return adopted.num_sets, pool.num_leases, pool.num_blocks


def test_a_journal_may_end_anywhere(dead: RuntimeDir, tmp_path: Path) -> None:
    whole = dead.journal.read_bytes()
    cut = tmp_path / "journal"
    sets, blocks = set(), set()
    for length in range(0, len(whole) + 1, 7):
        cut.write_bytes(whole[:length])
        num_sets, _, num_blocks = adopted_from(dead, read_journal(cut))
        sets.add(num_sets)
        blocks.add(num_blocks)
    assert (sets, blocks) == ({0, 1, 2}, {0, 2})


def test_a_journal_may_have_a_wrong_bit_anywhere(dead: RuntimeDir, tmp_path: Path) -> None:
    whole = bytearray(dead.journal.read_bytes())
    spoiled = tmp_path / "journal"
    chance = random.Random(7)
    for _ in range(300):
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        whole[place] ^= bit
        spoiled.write_bytes(whole)
        whole[place] ^= bit
        adopted_from(dead, read_journal(spoiled))


def test_records_in_any_order_do_no_harm(dead: RuntimeDir) -> None:
    """Left out, repeated, exchanged: their checksums are right, and together they make no sense."""
    first, *others = read_journal(dead.journal)
    chance = random.Random(11)
    for _ in range(400):
        records = [one for one in others if chance.random() > 0.1]
        for _ in range(chance.randrange(3)):
            records.insert(chance.randrange(len(records)), chance.choice(others))
        if chance.random() < 0.5:
            i, j = (chance.randrange(len(records)) for _ in range(2))
            records[i], records[j] = records[j], records[i]
        adopted_from(dead, [first, *records])


def test_a_daemon_starts_with_a_journal_that_contradicts_itself(
    dead: RuntimeDir, start_daemon: StartDaemon
) -> None:
    records = records_of(dead)
    sealed = next(
        record
        for record in records
        if isinstance(record, SessionChanged) and isinstance(record.changes[0], LeasesSealed)
    )
    write_journal(dead, [*records, sealed])
    nothing_is_left(start_daemon(), dead)


TWICE: Final = tuple(
    BlocksKept(device="host", blocks=((name, Extent(offset=0, num_bytes=2 * EXTENT)),))
    for name in (b"one", b"other")
)
LIES: Final[dict[str, tuple[Record, ...]]] = {
    "in what it tells one after another": (BlockGone(device="host", digest=b"unknown"),),
    "in what it tells together": TWICE,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_quotas_are_kept_whatever_else_a_journal_says(
    dead: RuntimeDir, start_daemon: StartDaemon, lie: tuple[Record, ...]
) -> None:
    """They were set by a person, and are about no memory."""
    before, after = (
        QuotaKept(device="host", kind="user", name=name, num_bytes=MIB) for name in ("ada", "bob")
    )
    write_journal(dead, [*records_of(dead), before, *lie, after])
    with start_daemon().connect() as memory:
        assert {(q.kind, q.name, q.limit_bytes) for q in memory.statistics().quotas} == {
            ("model", "m", MIB),  # as it was before
            ("user", "ada", MIB),
            ("user", "bob", MIB),
        }
        assert memory.statistics().weight_sets == ()


def test_the_end_of_a_writer_is_known_before_the_end_of_what_it_wrote(
    dead: RuntimeDir, start_daemon: StartDaemon
) -> None:
    """A daemon that is killed between the two notes leaves a set whose writer nobody knows."""
    records = records_of(dead)
    [session] = [r.number for r in records if isinstance(r, SessionBegan)]
    [(writer, target)] = {
        (r.writer, r.target.segment)
        for r in records
        if isinstance(r, SetKept) and r.key == "c" and r.target
    }
    assert writer == session
    write_journal(dead, [*records, SessionEnded(number=session)])
    assert found_by(start_daemon()) == {"a": "idle", "b": "idle"}
    assert target.lstrip("/") not in segments(dead.segment_prefix)


def test_another_process_with_the_same_pid_gets_nothing(
    dead: RuntimeDir, start_daemon: StartDaemon
) -> None:
    """Pids come again: this process lives, but it started at another time than the journal says."""
    write_journal(
        dead,
        [
            msgspec.structs.replace(record, pid=os.getpid())
            if isinstance(record, SessionBegan)
            else record
            for record in records_of(dead)
        ],
    )
    assert found_by(start_daemon()) == {"a": "idle", "b": "idle"}


def test_memory_that_was_to_be_freed_is_freed(dead: RuntimeDir, start_daemon: StartDaemon) -> None:
    """A daemon that is killed after it has noted the end of a session, and before it has taken
    the extents' memory back."""
    records = records_of(dead)
    [session] = [r.number for r in records if isinstance(r, SessionBegan)]
    pinned = PinsChanged(digests=(DIGEST,), pinned=True)
    made = SessionChanged(session=session, changes=(pinned,))
    write_journal(dead, [*records, made, SessionEnded(number=session)])
    start_daemon()
    [pool] = [
        path
        for name in segments(dead.segment_prefix)
        if (path := SHM_ROOT / name).stat().st_size > MIB
    ]
    assert pool.stat().st_blocks * 512 == 2 * EXTENT  # the blocks'; the leases' is gone


# --- a journal that there is no room for


def limit_files(daemon: DaemonProcess, num_bytes: int) -> None:
    """Nothing that the daemon writes gets longer: to the journal it is as if the disk were full."""
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def seal_with_long_fingerprint(memory: Client, key: str) -> None:
    writer = memory.open_weight_set(key, {f"{n:03}": "x" * 4000 for n in range(100)})
    assert isinstance(writer, WeightSetWriter)
    writer.reserve(4096)
    writer.seal(Manifest(version=1, tensors={}, metadata={}), 0).release()


def test_a_journal_that_can_not_grow_is_written_anew(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    daemon = start_daemon("--memory-limit", str(MIB))
    limit_files(daemon, MIB)
    with daemon.connect() as memory:
        seal_with_long_fingerprint(memory, "k")
        sizes = []
        for number in range(10):
            memory.pin("k", pinned=number % 2 == 0)
            wait_until(runtime_dir.journal.exists, "there is a journal again")
            sizes.append(runtime_dir.journal.stat().st_size)
        assert max(sizes) <= MIB
        assert sorted(sizes) != sizes
        daemon.kill()
    daemon = start_daemon("--memory-limit", str(MIB))
    with daemon.connect() as memory:
        assert [(s.key, s.pinned) for s in memory.statistics().weight_sets] == [("k", False)]


def test_without_a_journal_all_go_on_and_nothing_is_taken_over(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    """A journal that lacks the latest leases would let a successor lease them once more."""
    daemon = start_daemon("--memory-limit", str(MIB))
    limit_files(daemon, MIB)
    with daemon.connect() as memory:
        for key in ("a", "b", "c"):
            seal_with_long_fingerprint(memory, key)
        assert not runtime_dir.journal.exists()
        assert "journal" in {event.kind for event in memory.events()}
        lease = memory.lease(EXTENT)
        lease.buffer[:] = b"\5" * EXTENT
        memory.check_integrity()
        daemon.kill()
        daemon = start_daemon("--memory-limit", str(MIB))
        with daemon.connect() as other:
            assert other.statistics().weight_sets == ()
            assert bytes(other.lease(EXTENT).buffer) == bytes(EXTENT)
            assert bytes(lease.buffer) == b"\5" * EXTENT
