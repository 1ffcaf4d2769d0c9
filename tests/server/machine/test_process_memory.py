"""What is read from the kernel, of real processes that map, write and end."""

import mmap
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.machine.process_memory import HandedOut, ProcessMemory, SegmentMapping, object_of, read

NUM_BYTES = 4 << 20

PROGRAM = """
import mmap, os, sys

kept = []
for order in sys.stdin:
    path, how, touched = order.split()
    if path == "anonymous":
        mapping = mmap.mmap(-1, int(touched), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.write(b"x" * int(touched))
    else:
        fd = os.open(path, os.O_RDWR if how != "read" else os.O_RDONLY)
        flags = mmap.MAP_PRIVATE if how == "private" else mmap.MAP_SHARED
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if how != "read" else 0)
        mapping = mmap.mmap(fd, 0, flags, prot)
        os.close(fd)
        for at in range(0, int(touched), 4096):
            if how == "read":
                mapping[at]
            else:
                mapping[at] = 1
    kept.append(mapping)
    print("done", flush=True)
"""


class Process:
    """Maps what it is told to."""

    def __init__(self) -> None:
        self._segments: dict[str, str] = {}
        self._handed_out = HandedOut()
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def map(
        self,
        path: object,
        how: str = "read",
        touched: int = NUM_BYTES,
        *,
        pool: Path | None = None,
        foreign: Path | None = None,
    ) -> ProcessMemory:
        """Map it, touch so many bytes of it, and see what the kernel says then. Every path that was
        mapped before was handed out as a segment, but for the `pool` and what is `foreign`."""
        if isinstance(path, Path) and path not in (pool, foreign):
            self._segments[object_of(path.stat())] = f"/{path.name}"
        pools = frozenset([object_of(pool.stat())] if pool is not None else [])
        self._handed_out = HandedOut(self._segments, pools | self._handed_out.pools)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(path, how, touched, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n"
        return self.memory()

    def memory(self) -> ProcessMemory:
        """What the kernel says now."""
        found = read(self.pid, self._handed_out)
        assert found is not None
        return found

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture
def process() -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start() -> Process:
        started.append(Process())
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture
def make_segment() -> Iterator[Callable[[], Path]]:
    made: list[Path] = []

    def make() -> Path:
        path = Path(f"/dev/shm/test-{secrets.token_hex(4)}")
        made.append(path)
        path.write_bytes(bytes(NUM_BYTES))
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def segment(make_segment: Callable[[], Path]) -> Path:
    return make_segment()


def only(memory: ProcessMemory) -> SegmentMapping:
    (found,) = memory.segments
    return found


def test_a_segment_that_two_processes_map_is_one_object_and_counted_half(
    segment: Path, process: Callable[[], Process]
) -> None:
    first, second = process(), process()
    alone = only(first.map(segment))
    assert (alone.name, alone.inode.split(":")[-1]) == (
        f"/{segment.name}",
        str(segment.stat().st_ino),
    )
    assert alone.mapped_bytes == alone.resident_bytes == alone.pss_bytes == NUM_BYTES
    assert (alone.writable, alone.shared) == (False, True)
    seen = only(second.map(segment)), only(first.memory())
    assert seen[0] == seen[1]
    assert seen[0].inode == alone.inode
    assert (seen[0].resident_bytes, seen[0].pss_bytes) == (NUM_BYTES, NUM_BYTES // 2)


def test_only_what_was_touched_is_resident(segment: Path, process: Callable[[], Process]) -> None:
    memory = process().map(segment, touched=0)
    assert (only(memory).mapped_bytes, only(memory).resident_bytes) == (NUM_BYTES, 0)
    assert memory.shared_bytes == 0


@pytest.mark.parametrize(
    ("how", "writable", "shared"), [("write", True, True), ("private", True, False)]
)
def test_a_mapping_that_could_be_written_or_copied_says_so(
    segment: Path, process: Callable[[], Process], how: str, writable: bool, shared: bool
) -> None:
    found = only(process().map(segment, how, touched=0))
    assert (found.writable, found.shared) == (writable, shared)


def test_one_sound_mapping_does_not_hide_another(
    segment: Path, process: Callable[[], Process]
) -> None:
    one = process()
    one.map(segment, "read")
    found = only(one.map(segment, "private", touched=0))
    assert found.mapped_bytes == 2 * NUM_BYTES
    assert (found.writable, found.shared) == (True, False)


def test_two_segments_of_one_name_are_two(segment: Path, process: Callable[[], Process]) -> None:
    one = process()
    one.map(segment)
    segment.unlink()
    segment.write_bytes(bytes(NUM_BYTES))
    memory = one.map(segment)
    assert [found.name for found in memory.segments] == [f"/{segment.name}"] * 2
    assert len({found.inode for found in memory.segments}) == 2
    assert memory.shared_bytes == 2 * NUM_BYTES


def test_each_kind_of_memory_goes_where_it_belongs(
    make_segment: Callable[[], Path], process: Callable[[], Process]
) -> None:
    one = process()
    segment, pool, foreign = make_segment(), make_segment(), make_segment()
    start = one.map(segment, touched=0)
    weights = one.map(segment)
    assert weights.private_bytes - start.private_bytes < 1 << 20
    assert weights.pss_bytes - start.pss_bytes > NUM_BYTES - (1 << 20)
    kv = one.map(pool, "write", touched=1 << 20, pool=pool)
    assert (start.kv_bytes, kv.kv_bytes) == (0, 1 << 20)
    assert kv.private_bytes - weights.private_bytes < 1 << 20
    copied = one.map("anonymous", "write")
    assert copied.private_bytes - kv.private_bytes >= NUM_BYTES
    assert copied.kv_bytes == kv.kv_bytes
    # What was not handed out is its own, though another process maps it as well.
    other = process()
    other.map(foreign, "write", foreign=foreign)
    after = one.map(foreign, "read", foreign=foreign)
    assert after.private_parts[str(foreign)] == NUM_BYTES
    assert after.private_bytes - copied.private_bytes >= NUM_BYTES
    assert {found.name for found in after.segments} == {f"/{segment.name}"}


def test_a_program_is_its_own_only_where_it_was_written_to(process: Callable[[], Process]) -> None:
    """The interpreter and its libraries are read from their files, and shared by all who run."""
    one = process()
    memory = one.memory()
    program = str(Path(f"/proc/{one.pid}/exe").readlink())
    assert memory.private_parts.get(program, 0) < Path(program).stat().st_size // 2
    assert memory.private_bytes < 64 << 20


def test_a_process_that_is_gone_has_no_memory() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert read(child.pid) is None


def test_what_is_read_agrees_with_the_kernels_own_sum() -> None:
    held = mmap.mmap(-1, NUM_BYTES)
    held.write(b"x" * NUM_BYTES)
    memory = read(os.getpid())
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    assert memory is not None
    assert abs(memory.pss_bytes - pss) < 8 << 20
    held.close()
