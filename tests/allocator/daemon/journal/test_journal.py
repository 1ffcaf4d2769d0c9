"""The journal: whatever happens to the file, a prefix of what was appended is read."""

import contextlib
import itertools
import logging
import os
import resource
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.daemon.journal.file import MAX_RECORD_BYTES, Journal, Written, read_journal
from allocator.errors import JournalError
from tests.allocator.backends.doomed import Doomed, Report
from tests.allocator.processes import in_fork
from tests.leaks import Leaks

RECORDS = [b"one", b"", b"three" * 10, bytes(9), b"\xff" * 5]
NOBODY = 65534
pytestmark = pytest.mark.usefixtures("no_leaks")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@contextlib.contextmanager
def closing(journal: Journal) -> Iterator[Journal]:
    try:
        yield journal
    finally:
        journal.close()


def written(path: Path, records: list[bytes]) -> bytes:
    """The file's bytes, after half of the records were there at first and half appended."""
    with closing(Journal.create(path, records[: len(records) // 2])) as journal:
        for record in records[len(records) // 2 :]:
            journal.append(record)
    return path.read_bytes()


def is_prefix(found: list[bytes], records: list[bytes]) -> bool:
    return found == records[: len(found)]


# --- what was written is read


@pytest.mark.parametrize("sync", [False, True])
def test_round_trip(path: Path, sync: bool, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Journal.create(path, RECORDS[:2])) as journal:
        assert read_journal(path) == RECORDS[:2]
        for record in RECORDS[2:]:
            journal.append(record, sync=sync)
        assert read_journal(path) == RECORDS  # while it is open
        assert journal.num_bytes == path.stat().st_size
    assert read_journal(path) == RECORDS
    assert not caplog.records
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["journal"]


def test_the_format(path: Path) -> None:
    expected = b"1copyjnl" + struct.pack("<I", 1)
    assert written(path, []) == expected
    first = xxhash.xxh32_intdigest(bytes(4))
    assert first != 0  # a run of zeros is no record
    second = xxhash.xxh32_intdigest(b"\3\0\0\0abc", seed=first)
    expected += struct.pack("<II", 0, first) + struct.pack("<II", 3, second) + b"abc"
    assert written(path, [b"", b"abc"]) == expected


def test_a_rewritten_journal(path: Path) -> None:
    with closing(Journal.create(path, [])) as journal:
        for _ in range(10):
            for record in RECORDS:
                journal.append(record)
        before = journal.num_bytes_at_rewrite, journal.num_bytes
        assert before[0] < before[1] == path.stat().st_size
        journal.rewrite([b"what is left"])
        assert journal.num_bytes == journal.num_bytes_at_rewrite == path.stat().st_size < before[1]
        journal.append(b"more")
        assert journal.num_bytes > journal.num_bytes_at_rewrite
        assert read_journal(path) == [b"what is left", b"more"]
    assert [p.name for p in path.parent.iterdir()] == ["journal"]


def test_create_replaces(path: Path) -> None:
    written(path, RECORDS)
    path.with_name("journal.new").write_bytes(b"left by a killed writer")
    assert written(path, [b"new"])
    assert read_journal(path) == [b"new"]
    assert [p.name for p in path.parent.iterdir()] == ["journal"]


@settings(deadline=None)  # the disk is shared
@given(st.lists(st.binary(max_size=2000), max_size=20), st.data())
def test_any_records_and_any_damage(records: list[bytes], draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        data = written(path, records)
        assert read_journal(path) == records
        begin = draw.draw(st.integers(0, len(data)), "from")
        end = draw.draw(st.integers(begin, len(data)), "to")
        garbage = draw.draw(st.binary(max_size=50), "garbage")
        path.write_bytes(data[:begin] + garbage + data[end:])
        found = read_journal(path)
        assert is_prefix(found, records)
        # What lies wholly before the damage is there.
        ends = itertools.accumulate((8 + len(record) for record in records), initial=12)
        assert len(found) >= sum(end <= begin for end in ends) - 1


@settings(deadline=None)  # the disk is shared
@given(st.lists(st.binary(min_size=1, max_size=20), min_size=2, max_size=8), st.data())
def test_a_record_counts_only_behind_those_before_it(
    records: list[bytes], draw: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        data = written(path, records)
        ends = list(itertools.accumulate((8 + len(record) for record in records), initial=12))
        frames = [data[begin:end] for begin, end in itertools.pairwise(ends)]
        order = draw.draw(st.lists(st.integers(0, len(frames) - 1), max_size=10))
        path.write_bytes(data[:12] + b"".join(frames[n] for n in order))
        expected = list(itertools.takewhile(lambda n: order[n] == n, range(len(order))))
        assert read_journal(path) == [records[n] for n in expected]


# --- damage


def test_cut_off_anywhere(path: Path) -> None:
    data = written(path, RECORDS)
    seen = set()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        found = read_journal(path)
        assert is_prefix(found, RECORDS), length
        seen.add(len(found))
    assert seen == set(range(len(RECORDS)))


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_any_single_byte_flipped(path: Path, flip: int) -> None:
    data = bytearray(written(path, RECORDS))
    for at in range(len(data)):
        data[at] ^= flip
        path.write_bytes(data)
        found = read_journal(path)
        assert is_prefix(found, RECORDS), at
        assert len(found) < len(RECORDS), at
        data[at] ^= flip


def test_zeros_behind_the_records_are_none(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = written(path, RECORDS)
    path.write_bytes(data + bytes(4096))  # what a crash leaves where a file had been extended
    assert read_journal(path) == RECORDS
    [logged] = caplog.records
    assert logged.levelno == logging.WARNING
    assert "5 records are good, 4096 bytes are dropped" in logged.getMessage()


def test_a_length_that_lies(path: Path) -> None:
    data = written(path, [b"a"])
    for length in (2, 1 << 20, (1 << 32) - 1):
        path.write_bytes(data + struct.pack("<II", length, 0) + b"b")
        assert read_journal(path) == [b"a"]


def test_no_more_than_asked_is_read(path: Path) -> None:
    data = written(path, RECORDS)
    for max_bytes in range(len(data) + 1):
        found = read_journal(path, max_bytes)
        assert is_prefix(found, RECORDS)
        assert 12 + sum(8 + len(record) for record in found) <= max(12, max_bytes)
    assert found == RECORDS


@pytest.mark.parametrize(
    "content", [b"", b"x", b"1copyjnl", b"1copyjnl\2\0\0\0abcd", b"#!/bin/sh\n" * 100, bytes(4096)]
)
def test_foreign_files(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(content)
    assert read_journal(path) == []
    assert len(caplog.records) == (1 if content else 0)


def test_no_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_journal(path) == []
    assert not caplog.records


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "of another user"])
def test_not_a_file_of_ours(path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    other = path.with_name("other")
    written(other, RECORDS)
    match kind:
        case "link":
            path.symlink_to(other)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            if os.geteuid() != 0:
                pytest.skip("giving a file away needs root")
            other.rename(path)
            os.chown(path, NOBODY, NOBODY)
    assert read_journal(path) == []
    assert len(caplog.records) == 1


# --- kills


def nth(number: int, num_bytes: int) -> bytes:
    """The record that a killed writer appended as its `number`th."""
    return struct.pack("<Q", number) * (num_bytes // 8 + number % 13)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize(("num_bytes", "acknowledged"), [(8, 1), (8, 3000), (3 << 20, 4)])
def test_a_killed_writer(path: Path, num_bytes: int, acknowledged: int, sync: bool) -> None:
    def append(report: Report) -> None:
        journal = Journal.create(path, [])
        number = 0
        while True:
            journal.append(nth(number, num_bytes), sync=sync)
            report(number)
            number += 1

    if sync:
        acknowledged = min(acknowledged, 50)
    with Doomed(append) as writer:
        for number in range(acknowledged):
            assert writer.read() == number
        last = writer.kill()
    found = read_journal(path)
    assert len(found) > (acknowledged - 1 if last is None else last)
    assert found == [nth(number, num_bytes) for number in range(len(found))]
    # The next one goes on from there.
    with closing(Journal.create(path, found)) as journal:
        journal.append(b"after")
    assert read_journal(path) == [*found, b"after"]


@pytest.mark.parametrize("acknowledged", [1, 2, 5, 20])
def test_a_rewrite_is_whole_or_has_not_been(path: Path, acknowledged: int) -> None:
    def rewrite(report: Report) -> None:
        journal = Journal.create(path, [nth(0, 1000)] * 100)
        number = 0
        while True:
            report(number)
            number += 1
            journal.rewrite([nth(number, 1000)] * (100 + number))

    with Doomed(rewrite) as writer:
        for number in range(acknowledged):
            assert writer.read() == number
        last = writer.kill()
    acknowledged_last = acknowledged - 1 if last is None else last
    found = read_journal(path)
    number = len(found) - 100
    assert number in (acknowledged_last, acknowledged_last + 1)
    assert found == [nth(number, 1000)] * (100 + number)


# --- what can't be written


def test_too_long_a_record(path: Path) -> None:
    with closing(Journal.create(path, RECORDS)) as journal:
        with pytest.raises(JournalError, match="longer than"):
            journal.append(bytes(MAX_RECORD_BYTES + 1))
        journal.append(bytes(MAX_RECORD_BYTES))
        assert [len(r) for r in read_journal(path)[len(RECORDS) :]] == [MAX_RECORD_BYTES]


@pytest.mark.parametrize("room", [0, 1, 7, 8, 500])
def test_a_torn_record_is_taken_back(path: Path, room: int) -> None:
    """By a limit on the file's size: as on a full disk, the last write stops short."""
    written(path, RECORDS)

    def reach_the_limit() -> str:
        journal = Journal.create(path, RECORDS)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.num_bytes + room, hard))
        with pytest.raises(JournalError, match=r"can't take a record"):
            journal.append(b"x" * 500)
        assert path.stat().st_size == journal.num_bytes
        assert read_journal(path) == RECORDS
        with pytest.raises(JournalError, match=r"can't be written: File too large"):
            journal.rewrite([bytes(1000)])
        assert read_journal(path) == RECORDS
        assert [p.name for p in path.parent.iterdir()] == ["journal"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        journal.append(b"more")
        return "done"

    assert in_fork(reach_the_limit).text == "done"
    assert read_journal(path) == [*RECORDS, b"more"]


def test_after_a_failed_sync_only_a_rewrite_helps(path: Path) -> None:
    """A descriptor that can be written but not synced: a pipe's, put in the place of the file's."""
    read, write = os.pipe()
    whole = written(path, RECORDS)
    with closing(Journal(path, Written(write, len(whole), 0))) as journal:
        with pytest.raises(JournalError, match=r"can't be synced: Invalid argument"):
            journal.append(b"x", sync=True)
        with pytest.raises(JournalError, match=r"takes no records: an earlier sync failed"):
            journal.append(b"x")
        journal.rewrite(RECORDS)
        journal.append(b"more")
    os.close(read)
    assert read_journal(path) == [*RECORDS, b"more"]


def test_a_torn_record_that_stays_ends_the_journal(path: Path) -> None:
    """A descriptor that takes half a record and can't be cut back: a full pipe's."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    whole = written(path, RECORDS)
    with closing(Journal(path, Written(write, len(whole), 0))) as journal:
        with pytest.raises(JournalError, match=r"only \d+ could be written. Is the disk full?"):
            journal.append(bytes(1 << 20))
        with pytest.raises(JournalError, match=r"takes no records: a torn record could not be"):
            journal.append(b"x")
        journal.rewrite(RECORDS)
        journal.append(b"more")
    os.close(read)
    assert read_journal(path) == [*RECORDS, b"more"]


def test_records_that_raise(path: Path, no_leaks: Leaks) -> None:
    def some() -> Iterator[bytes]:
        yield b"a"
        raise ZeroDivisionError

    written(path, RECORDS)
    with pytest.raises(ZeroDivisionError):
        Journal.create(path, some())
    with closing(Journal.create(path, RECORDS)) as journal:
        with pytest.raises(ZeroDivisionError):
            journal.rewrite(some())
        journal.append(b"more")
    assert read_journal(path) == [*RECORDS, b"more"]
    assert [p.name for p in path.parent.iterdir()] == ["journal"]
    no_leaks.check()


def test_where_nothing_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"can't be written: No such file"):
        Journal.create(tmp_path / "missing" / "journal", [])
    (tmp_path / "taken").mkdir()
    with pytest.raises(JournalError, match=r"taken can't be written: Is a directory"):
        Journal.create(tmp_path / "taken", [])
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_closed_journal(path: Path) -> None:
    journal = Journal.create(path, RECORDS)
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="it is closed"):
        journal.append(b"x")
    with pytest.raises(JournalError, match="is closed"):
        journal.rewrite([])
    assert read_journal(path) == RECORDS
