"""The reader of files into memory, with both kinds of threads, on a disk and in shared memory."""

import ctypes
import errno
import gc
import json
import logging
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.allocator.processes import in_fork
from tests.daemon_process import ROOT
from tests.leaks import Leaks, descriptors, wait_until
from tests.workers.placement.memory import Memory, num_blocks
from tests.workers.placement.reading_threads import KINDS, loaded
from tests.workers.placement.rough_files import PIECE_BYTES
from workers.errors import ReadCancelled, ReaderClosed, ReadFailed, ReadTimedOut
from workers.model.native.library import Unavailable
from workers.placement import native_reading
from workers.placement.native_reading import NativeThreads
from workers.placement.reader import BLOCK, MAX_ENDED, Read, Reader

TIMEOUT_S = 300.0
MIB = 1 << 20
WAYS = ("uncached", "direct", "buffered")
HOURS = (1, 7200.0)
"""A delay for pieces that nobody lives to see read."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kind", "no_threads", "no_leaks")]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    try:
        monkeypatch.setattr(native_reading, "load", loaded(request.param))
    except Unavailable as reason:
        pytest.skip(f"native threads: {reason}")
    return str(request.param)


@pytest.fixture
def no_threads() -> Iterator[None]:
    """Fails at teardown where a thread that reads is left."""
    yield
    gc.collect()
    wait_until(lambda: not reading_threads(), "no thread of a reader is left")


def reading_threads() -> list[str]:
    """Directories in /proc of those of this process; the interpreter's have no name there."""
    own = {str(t.native_id) for t in threading.enumerate() if t.name == "onecopy:read"}
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name == "onecopy:read" or task.name in own:
            found.append(str(task))
    return found


def filesystem_of(folder: Path) -> str:
    """As the kernel calls it."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return "unknown"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that is not in memory."""
    for folder in (tmp_path, Path("/var/tmp"), Path.home()):
        if filesystem_of(folder) not in ("tmpfs", "ramfs") and os.access(folder, os.W_OK):
            with tempfile.TemporaryDirectory(prefix="onecopy-", dir=folder) as found:
                yield Path(found)
            return
    pytest.skip("every folder that may be written to is in memory")


@pytest.fixture(params=["disk", "shared memory"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    if request.param == "disk":
        yield request.getfixturevalue("disk")
        return
    with tempfile.TemporaryDirectory(prefix="onecopy-", dir="/dev/shm") as found:
        yield Path(found)


def written(path: Path, num_bytes: int) -> bytes:
    """Random bytes, which lie there on the disk afterwards."""
    content = random.Random(num_bytes).randbytes(num_bytes)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    return content


def opened_or_skipped(reader: Reader, path: Path) -> int:
    try:
        return reader.open(path)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("access", [*WAYS, "auto"])
def test_bytes_arrive_where_they_are_wanted_and_nothing_else_is_written(
    folder: Path, access: str
) -> None:
    content = written(folder / "file", 3 * MIB + 1)
    end = len(content)
    memory = Memory(4 * MIB)
    with Reader(4, 1 << 16, access=access) as reader:
        file = opened_or_skipped(reader, folder / "file")
        used = reader.access(file)
        assert used in (WAYS if access == "auto" else [access])
        for begin, num_bytes in (
            *((0, end), (0, 1), (1, 1), (0, BLOCK), (BLOCK - 1, 2), (5, BLOCK), (BLOCK, 0)),
            *((0, 0), (0, 1 << 16), (1, 1 << 16), (12345, 2 * MIB), (end - 1, 1), (end, 0)),
            *((end - BLOCK, BLOCK), (end - 70_000, 70_000), (end - 2, 1), (MIB, MIB)),
        ):
            memory.wipe()
            read = memory.read(file, begin, num_bytes, block=3)
            reader.wait(reader.start([read]), TIMEOUT_S)
            assert memory.read_by(read) == content[begin : begin + num_bytes]
            around = memory.around(read, blocks=used == "direct")
            assert around == bytes([0xA5]) * len(around)
        assert reader.access(file) == used


def test_the_best_way_that_a_file_allows_is_taken(folder: Path) -> None:
    written(folder / "file", MIB)
    allowed: list[str] = []
    refused: dict[str, OSError] = {}
    for access in WAYS:
        with Reader(access=access) as reader:
            try:
                reader.open(folder / "file")
            except OSError as error:
                refused[access] = error
            else:
                allowed.append(access)
    assert "buffered" in allowed
    for error in refused.values():
        assert (error.errno, error.filename) == (errno.EOPNOTSUPP, str(folder / "file"))
    with Reader() as reader:
        assert reader.access(reader.open(folder / "file")) == allowed[0]


def test_an_empty_file_has_nothing_to_read(folder: Path) -> None:
    written(folder / "file", 0)
    memory = Memory(BLOCK)
    with Reader() as reader:
        file = reader.open(folder / "file")
        reader.wait(reader.start([memory.read(file, 0, 0)]), TIMEOUT_S)
        reader.wait(reader.start([]), TIMEOUT_S)
        assert reader.statistics().bytes_read == 0
    assert memory.is_untouched


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_jobs_all_at_once(tmp_path: Path, data: st.DataObject) -> None:
    contents = []
    for index, num_bytes in enumerate(data.draw(st.lists(st.integers(1, 200_000), max_size=3))):
        contents.append(written(tmp_path / str(index), num_bytes))
    num_threads = data.draw(st.integers(1, 8))
    piece_bytes = BLOCK * data.draw(st.sampled_from([1, 2, 5, 16, 1024]))
    delay = data.draw(st.sampled_from([None, (1, 0.0005)]))
    with Reader(num_threads, piece_bytes, delay=delay) as reader:
        files = [reader.open(tmp_path / str(index)) for index in range(len(contents))]
        jobs, num_taken = [], 0
        memory = Memory(16 * MIB)
        for _ in range(data.draw(st.integers(0, 12))):
            reads = []
            for _ in range(data.draw(st.integers(0, 4)) if files else 0):
                file = data.draw(st.sampled_from(files))
                begin = data.draw(st.integers(0, len(contents[file])))
                num_bytes = data.draw(st.integers(0, len(contents[file]) - begin))
                reads.append(memory.read(file, begin, num_bytes, block=num_taken))
                num_taken += num_blocks(begin, num_bytes)
            jobs.append((reader.start(reads), reads))
        for job, reads in data.draw(st.permutations(jobs)):
            reader.wait(job, TIMEOUT_S)
            assert reader.done(job)
            for read in reads:
                expected = contents[read.file][read.begin : read.begin + read.num_bytes]
                assert memory.read_by(read) == expected
        wanted = sum(read.num_bytes for _, reads in jobs for read in reads)
        assert reader.statistics().bytes_read == wanted


def test_jobs_are_read_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    content = written(tmp_path / "file", MIB)
    memory = Memory(MIB)
    with Reader(1, BLOCK, delay=(1, 0.0002)) as reader:
        file = reader.open(tmp_path / "file")
        size = len(content) // 16
        jobs = [
            reader.start([memory.read(file, at, size, block=at // BLOCK)])
            for at in range(0, len(content), size)
        ]
        reader.wait(jobs[-1], TIMEOUT_S)
        assert all(reader.done(job) for job in jobs)
        times = [reader.times(job) for job in jobs]
        reading_s = reader.statistics().reading_s
    assert all(begin <= end for begin, end in times)
    assert all(before[1] <= after[0] for before, after in pairwise(times))
    assert 0 < reading_s <= times[-1][1] - times[0][0]
    assert memory.bytes.tobytes() == content


def test_a_cancelled_job_leaves_its_addresses_alone(tmp_path: Path) -> None:
    content = written(tmp_path / "file", 2 * MIB)
    memory, other = Memory(2 * MIB), Memory(2 * MIB)
    with Reader(3, BLOCK, delay=(5, 0.002)) as reader:
        file = reader.open(tmp_path / "file")
        job = reader.start([memory.read(file, 0, len(content))])
        behind = reader.start([memory.read(file, 0, len(content))])
        after = reader.start([other.read(file, 0, 64 * BLOCK)])
        wait_until(lambda: reader.statistics().bytes_read, "a piece has been read")
        reader.cancel(behind)
        reader.cancel(job)
        memory.wipe()
        reader.cancel(job)
        assert reader.done(job)
        for cancelled in (job, behind):
            with pytest.raises(ReadCancelled, match=f"job {cancelled} was cancelled"):
                reader.wait(cancelled)
        reader.wait(after, TIMEOUT_S)
        assert other.bytes[: 64 * BLOCK].tobytes() == content[: 64 * BLOCK]
        reader.cancel(after)
        reader.wait(after)  # it stays what it was
        assert reader.statistics().bytes_read < len(content)
        begin_s, end_s = reader.times(behind)
        assert begin_s <= end_s <= reader.times(job)[1]
    assert memory.is_untouched


def test_a_file_that_becomes_shorter(folder: Path) -> None:
    content = written(folder / "file", MIB)
    memory = Memory(MIB)
    for access in WAYS:
        with Reader(2, 1 << 16, access=access) as reader:
            try:
                file = reader.open(folder / "file")
            except OSError:
                continue
            os.truncate(folder / "file", 600_001)
            job = reader.start([memory.read(file, 7, 600_001 - 7)])
            reader.wait(job, TIMEOUT_S)
            assert memory.bytes[7:600_001].tobytes() == content[7:600_001]
            for begin, num_bytes in ((7, 700_000), (600_001, 1), (650_000, 300_000)):
                job = reader.start([memory.read(file, begin, num_bytes)])
                with pytest.raises(ReadFailed, match="became shorter while it was read") as failed:
                    reader.wait(job, TIMEOUT_S)
                assert failed.value.errno == 0
                assert failed.value.path == folder / "file"
                assert 600_001 <= failed.value.begin <= begin + num_bytes
            with (folder / "file").open("wb") as again:
                again.write(content)
            reader.wait(reader.start([memory.read(file, 0, MIB)]), TIMEOUT_S)
            assert memory.bytes.tobytes() == content


def test_a_file_that_is_deleted_is_read_to_its_end(folder: Path) -> None:
    content = written(folder / "file", MIB)
    memory = Memory(MIB)
    with Reader() as reader:
        file = reader.open(folder / "file")
        (folder / "file").unlink()
        reader.wait(reader.start([memory.read(file, 0, MIB)]), TIMEOUT_S)
    assert memory.bytes.tobytes() == content


def test_what_is_no_regular_file_is_refused(tmp_path: Path, no_leaks: Leaks) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    with Reader() as reader:
        with pytest.raises(IsADirectoryError):
            reader.open(tmp_path)
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(OSError, match="Not a regular file") as refused:
                reader.open(path)
            assert refused.value.filename == str(path)
        for path in (tmp_path / "nothing", tmp_path / "link"):
            with pytest.raises(FileNotFoundError):
                reader.open(path)
        no_leaks.check()


def test_any_number_of_threads_wait_for_one_job(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    memory = Memory(2 * MIB)
    told: list[str] = []
    with Reader(2, BLOCK, delay=(1, 0.001)) as reader:
        file = reader.open(tmp_path / "file")

        def wait(job: int) -> None:
            try:
                reader.wait(job, TIMEOUT_S)
            except ReadFailed as error:
                told.append(type(error).__name__)
            else:
                told.append("read")

        for num_bytes in (MIB, MIB + 1):
            job = reader.start([memory.read(file, 0, num_bytes)])
            waiting = [threading.Thread(target=wait, args=(job,)) for _ in range(3)]
            for thread in waiting:
                thread.start()
            for thread in waiting:
                thread.join(TIMEOUT_S)
    assert told == ["read"] * 3 + ["ReadFailed"] * 3


def test_a_wait_has_its_time_and_the_job_goes_on(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    memory = Memory(MIB)
    with Reader(delay=HOURS) as reader:
        job = reader.start([memory.read(reader.open(tmp_path / "file"), 0, MIB)])
        for timeout_s in (0, 0.01, 0.15):
            with pytest.raises(ReadTimedOut, match=f"after {timeout_s} s job {job} has not been"):
                reader.wait(job, timeout_s)
        assert not reader.done(job)
        with pytest.raises(ValueError, match=f"job {job} has not ended"):
            reader.times(job)
        reader.cancel(job)
    assert memory.is_untouched


def test_closing_ends_all_jobs_and_threads(tmp_path: Path, kind: str, no_leaks: Leaks) -> None:
    written(tmp_path / "file", MIB)
    memory = Memory(MIB)
    reader = Reader(3, BLOCK, delay=HOURS)
    file = reader.open(tmp_path / "file")
    jobs = [reader.start([memory.read(file, 0, MIB)]) for _ in range(3)]
    told: list[str] = []

    def wait() -> None:
        with pytest.raises(ReadCancelled):
            reader.wait(jobs[1], TIMEOUT_S)
        told.append("cancelled")

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: len(reading_threads()) == 3, "all threads have begun")
    if kind == "native":
        for task in reading_threads():
            status = Path(task, "status").read_text()
            blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
            assert blocked >> (signal.SIGTERM - 1) & blocked >> (signal.SIGINT - 1) & 1
    reader.close()
    waiting.join(TIMEOUT_S)
    assert told == ["cancelled"]
    assert not reading_threads()
    assert memory.is_untouched
    no_leaks.check()
    reader.close()
    with pytest.raises(ReaderClosed, match="this reader is closed"):
        reader.open(tmp_path / "file")
    with pytest.raises(ReaderClosed, match="this reader is closed"):
        reader.start([])
    with pytest.raises(ReadCancelled):
        reader.wait(jobs[0])


def test_a_reader_that_is_forgotten_is_closed(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    memory = Memory(MIB)
    reader = Reader(delay=HOURS)
    reader.start([memory.read(reader.open(tmp_path / "file"), 0, MIB)])
    del reader  # and the fixtures look for what is left


def test_a_program_ends_with_jobs_under_way(tmp_path: Path, kind: str) -> None:
    written(tmp_path / "file", MIB)
    program = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from tests.workers.placement.memory import Memory\n"
        "from tests.workers.placement.reading_threads import use\n"
        "from workers.placement.reader import Reader\n"
        "use(sys.argv[1])\n"
        "reader, memory = Reader(delay=(1, 7200.0)), Memory(1 << 20)\n"
        "job = reader.start([memory.read(reader.open(Path(sys.argv[2])), 0, 1 << 20)])\n"
        "threading.Thread(target=reader.wait, args=(job,), daemon=True).start()\n"
    )
    command = [sys.executable, "-c", program, kind, str(tmp_path / "file")]
    ended = subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_forked_child_closes_what_it_inherited(tmp_path: Path) -> None:
    content = written(tmp_path / "file", 4 * MIB)
    memory = Memory(4 * MIB)
    with Reader(4, BLOCK) as reader:
        file = reader.open(tmp_path / "file")
        inherited = {fd for fd, path in descriptors().items() if path == str(tmp_path / "file")}

        def child() -> str:
            for call in (
                lambda: reader.start([]),
                lambda: reader.open(tmp_path / "file"),
                *(lambda: reader.wait(job), lambda: reader.done(job), lambda: reader.cancel(job)),
                *(lambda: reader.times(job), reader.statistics, lambda: reader.access(file)),
            ):
                with pytest.raises(ReaderClosed, match="make a reader in each process"):
                    call()
            reader.close()
            assert not inherited & descriptors().keys()
            with Reader() as own:
                there = Memory(4 * MIB)
                own.wait(own.start([there.read(own.open(tmp_path / "file"), 0, 4 * MIB)]))
                assert there.bytes.tobytes() == content
            return "closed"

        for _ in range(10):  # a fork finds the threads, and their lock, in any state
            job = reader.start([memory.read(file, 0, 4 * MIB)])
            assert in_fork(child).text == "closed"
            reader.wait(job, TIMEOUT_S)
            assert memory.bytes.tobytes() == content
            memory.wipe()


def test_a_forked_child_forgets_what_it_inherited(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    memory = Memory(MIB)
    readers = [Reader(delay=HOURS)]
    file = readers[0].open(tmp_path / "file")
    readers[0].start([memory.read(file, 0, MIB)])

    def child() -> str:
        readers.clear()
        gc.collect()
        return str(sorted(path for path in descriptors().values() if path.endswith("/file")))

    assert in_fork(child).text == "[]"
    readers[0].close()


def test_a_reader_made_before_a_fork_works_on_both_sides(tmp_path: Path) -> None:
    content = written(tmp_path / "file", MIB)
    with Reader() as reader:
        file = reader.open(tmp_path / "file")

        def read() -> str:
            memory = Memory(MIB)
            with reader:
                reader.wait(reader.start([memory.read(file, 0, MIB)]), TIMEOUT_S)
            return str(memory.bytes.tobytes() == content)

        assert in_fork(read).text == "True"
        assert read() == "True"


def num_cached_bytes(path: Path) -> int:
    """Of the file, in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        num_pages = -(-len(mapped) // mmap.PAGESIZE)
        pages, there = (ctypes.c_ubyte * num_pages)(), np.frombuffer(mapped, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        wrong = libc.mincore(
            ctypes.c_void_p(there.ctypes.data), ctypes.c_size_t(len(mapped)), pages
        )
        assert not wrong, os.strerror(ctypes.get_errno())
        del there
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("access", WAYS)
def test_what_is_read_does_not_stay_in_the_page_cache(disk: Path, access: str) -> None:
    size = 24 * MIB
    content = written(disk / "file", size)
    memory = Memory(size)
    with Reader(4, MIB, access=access) as reader, (disk / "file").open("rb") as same:
        file = opened_or_skipped(reader, disk / "file")

        def is_dropped() -> bool:
            os.posix_fadvise(same.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return num_cached_bytes(disk / "file") == 0

        wait_until(is_dropped, "nothing of the file is cached")
        same.read()
        assert num_cached_bytes(disk / "file") > size * 3 // 4  # as it is with any other reader
        wait_until(is_dropped, "nothing of the file is cached")
        for begin, num_bytes in ((0, size), (777, size - 5000)):
            read = memory.read(file, begin, num_bytes)
            reader.wait(reader.start([read]), TIMEOUT_S)
            assert memory.read_by(read) == content[begin : begin + num_bytes]
        # What was read ahead for a piece that another thread had by then is left at times: as much
        # as the device reads ahead, 8 MiB here.
        assert num_cached_bytes(disk / "file") <= size // 2


def test_reads_go_on_while_the_interpreters_lock_is_held(tmp_path: Path, kind: str) -> None:
    if kind != "native":
        pytest.skip("the interpreter's own threads take its lock")
    content = written(tmp_path / "file", 8 * MIB)
    memory = Memory(8 * MIB)
    with Reader(2, 1 << 16, delay=(1, 0.001)) as reader:
        threads = reader._threads
        assert isinstance(threads, NativeThreads)
        job = reader.start([memory.read(reader.open(tmp_path / "file"), 0, 8 * MIB)])
        holding = ctypes.PyDLL(str(native_reading.FILE))  # its calls keep the lock
        ended = native_reading._Outcome()
        timeout_ns = ctypes.c_int64(int(TIMEOUT_S * 1e9))
        holding.onecopy_reader_wait(
            threads.handle, ctypes.c_int64(job), timeout_ns, ctypes.byref(ended)
        )
        assert ended.state == 1
        assert memory.bytes.tobytes() == content


def test_waiting_lets_other_threads_compute(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    with Reader(delay=HOURS) as reader:
        memory = Memory(MIB)
        job = reader.start([memory.read(reader.open(tmp_path / "file"), 0, MIB)])
        # Cancelled by a thread that would not get on if the wait held the lock.
        canceller = threading.Thread(target=reader.cancel, args=(job,))
        canceller.start()
        with pytest.raises(ReadCancelled):
            reader.wait(job, TIMEOUT_S)
        canceller.join(TIMEOUT_S)


def test_a_signal_is_handled_while_one_waits(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    memory = Memory(MIB)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with Reader(delay=HOURS) as reader:
            job = reader.start([memory.read(reader.open(tmp_path / "file"), 0, MIB)])
            main = threading.main_thread().ident
            assert main is not None
            sender = threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGUSR1))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - whenever it comes
                sender.start()
                reader.wait(job, TIMEOUT_S)
            sender.join(TIMEOUT_S)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_memory_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    with mmap.mmap(-1, MIB, prot=mmap.PROT_READ) as mapped:
        there = np.frombuffer(mapped, np.uint8)
        for access in ("auto", "buffered"):
            with Reader(access=access) as reader:
                file = reader.open(tmp_path / "file")
                job = reader.start([Read(file, 0, MIB, there.ctypes.data)])
                with pytest.raises(ReadFailed, match="mapped for writing") as failed:
                    reader.wait(job, TIMEOUT_S)
                assert failed.value.errno == errno.EFAULT
        del there


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "file", MIB)
    memory = Memory(MIB)
    for wrong in ({"num_threads": 0}, {"num_threads": 65}, {"piece_bytes": 4095}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Reader(**wrong)
    for piece_bytes in (0, -BLOCK, 2 << 30):
        with pytest.raises(ValueError, match="piece_bytes must be"):
            Reader(piece_bytes=piece_bytes)
    with pytest.raises(ValueError, match="access must be one of auto, uncached, direct, buffered"):
        Reader(access="fast")
    with Reader() as reader:
        file = reader.open(tmp_path / "file")
        good = memory.read(file, 5, 100)
        for read, complaint in (
            (good._replace(begin=6), "as far into a block"),
            (good._replace(address=good.address + 1), "as far into a block"),
            (good._replace(begin=-1), "below 0"),
            (good._replace(num_bytes=-1), "below 0"),
            (good._replace(address=-4091), "below 0"),
            (good._replace(num_bytes=1 << 63), "beyond all there are"),
            (good._replace(begin=(1 << 63) - 1), "beyond all there are"),
            (good._replace(file=file + 1), "there is no file 1"),
            (good._replace(file=-1), "there is no file -1"),
        ):
            with pytest.raises(ValueError, match=complaint):
                reader.start([good, read])
        for call in (reader.wait, reader.done, reader.cancel, reader.times):
            for job in (0, 1, -1, 1 << 40):
                with pytest.raises(ValueError, match=f"there is no job {job}"):
                    call(job)
        with pytest.raises(ValueError, match="there is no file 7"):
            reader.access(7)
        assert reader.statistics().bytes_read == 0


def test_the_last_jobs_are_remembered() -> None:
    with Reader() as reader:
        jobs = [reader.start([]) for _ in range(MAX_ENDED + 10)]
        for job in jobs[:10]:
            with pytest.raises(ValueError, match=f"only the last {MAX_ENDED} that ended"):
                reader.times(job)
        times = [reader.times(job) for job in jobs[10:]]
    assert times == sorted(times)


def test_without_a_compiler_it_says_what_is_lost(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Reader():
        pass
    assert ("install a C++ compiler" in caplog.text) == (kind == "python")


@pytest.fixture(scope="session")
def rough_preadv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler cc")
    library = tmp_path_factory.mktemp("rough") / "rough_preadv.so"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = str(Path(__file__).with_name("rough_preadv.c"))
    command = [compiler, *flags, "-o", str(library), source, "-ldl", "-lpthread"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return library


class Rough:
    """Reads of one file in a process in which they go as `way` says."""

    def __init__(self, kind: str, library: Path, path: Path) -> None:
        self._kind, self._library, self._path = kind, library, path

    def read(self, way: str, access: str = "auto", gate: Path | None = None) -> dict[str, object]:
        """What `rough_files` prints."""
        more = [] if gate is None else [str(gate)]
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "tests.workers.placement.rough_files"),
                *(self._kind, access, str(self._path), *more),
            ],
            cwd=ROOT,
            env=os.environ
            | {"LD_PRELOAD": str(self._library), "ROUGH": way, "ROUGH_GATE": str(gate)}
            | {"ROUGH_INODE": str(self._path.stat().st_ino)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        found: dict[str, object] = json.loads(ended.stdout)
        return found


@pytest.fixture
def rough(kind: str, rough_preadv: Path, disk: Path) -> Rough:
    written(disk / "file", 2 * MIB + 77)
    return Rough(kind, rough_preadv, disk / "file")


@pytest.mark.parametrize("access", WAYS)
def test_interruptions_and_short_reads_are_made_good(rough: Rough, access: str, disk: Path) -> None:
    with Reader(access=access) as reader:
        opened_or_skipped(reader, disk / "file")
    assert rough.read("halting", access) == {"opened": access, "read": access, "is_equal": True}


@pytest.mark.parametrize("access", ["uncached", "direct"])
def test_a_way_that_is_refused_after_all(rough: Rough, access: str, disk: Path) -> None:
    with Reader(access=access) as reader:
        opened_or_skipped(reader, disk / "file")
    with Reader() as reader:
        best = reader.access(reader.open(disk / "file"))
    assert rough.read("refusing") == {"opened": best, "read": "buffered", "is_equal": True}
    found = rough.read("refusing", access)
    assert found["errno"] in (errno.EOPNOTSUPP, errno.EINVAL)
    assert (found["opened"], found["read"]) == (access, access)


def test_an_error_of_the_disk_says_where(rough: Rough, disk: Path) -> None:
    found = rough.read("broken")
    assert found["errno"] == errno.EIO
    assert found["path"] == str(disk / "file")
    assert found["begin"] in range(MIB, 2 * MIB + 77, PIECE_BYTES)


def test_a_file_that_never_has_anything_is_given_up(rough: Rough) -> None:
    assert rough.read("hung")["errno"] == errno.EAGAIN


def test_several_pieces_are_under_way_at_once(rough: Rough) -> None:
    assert rough.read("meeting")["is_equal"]


def test_a_cancelled_job_ends_with_the_pieces_that_are_under_way(rough: Rough, disk: Path) -> None:
    gate = disk / "gate"
    gate.touch()
    found = rough.read("gated", gate=gate)
    assert found["ended at the gate"] is False
    assert found["is_untouched"] is True
    assert 0 < found["bytes_read"] <= 4 * PIECE_BYTES
