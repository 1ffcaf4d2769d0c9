"""What an instance shows of itself, and how it is ended: by memory and a pipe of its server's."""

import os
import signal
import threading
import time

import pytest

from tests.leaks import Leaks, wait_until
from workers.process import linux
from workers.process.pulse import Pulse, PulseReader


@pytest.fixture
def pair(no_leaks: Leaks):  # type: ignore[no-untyped-def]
    reader = PulseReader("i0")
    pulse = Pulse(os.dup(reader.descriptor))
    reader.handed_over()
    yield pulse, reader
    pulse._memory.close()
    reader.close()


def test_what_is_written_is_read(pair: tuple[Pulse, PulseReader]) -> None:
    pulse, reader = pair
    beat = reader.look()
    assert beat is not None
    assert (beat.num_read, beat.since, beat.silent_since) == (0, None, None)
    assert beat.names == frozenset()
    pulse.took(2)
    before = time.monotonic()
    pulse.begin(["a", "é" * 100])
    beat = reader.look()
    assert beat is not None
    assert beat.num_read == 2
    assert beat.since is not None
    assert before <= beat.since <= time.monotonic()
    assert beat.names == {"a", "é" * 100}
    pulse.works_on(["b"])
    pulse.end()
    pulse.allocator_silent_since(12.5)
    beat = reader.look()
    assert beat is not None
    assert (beat.since, beat.silent_since, beat.names) == (None, 12.5, {"b"})
    # Too many to be told: then nobody knows who they are.
    pulse.works_on([f"request-{number:060}" for number in range(2000)])
    beat = reader.look()
    assert beat is not None
    assert beat.names is None


def test_it_outlives_its_writer_and_nothing_is_there_before_the_first() -> None:
    reader = PulseReader("i0")
    assert reader.look() is None
    pid = os.fork()
    if pid == 0:
        pulse = Pulse(reader.descriptor)
        pulse.begin(["poison"])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    beat = reader.look()
    assert beat is not None
    assert beat.names == {"poison"}
    reader.close()


def test_no_look_sees_half_of_a_change(pair: tuple[Pulse, PulseReader]) -> None:
    pulse, reader = pair
    over = threading.Event()
    names = [[f"{letter}{number}" for number in range(50)] for letter in "ab"]

    def write() -> None:
        while not over.is_set():
            for some in names:
                pulse.begin(some)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: list[frozenset[str] | None] = []

        def seen_often() -> bool:
            looks = (reader.look() for _ in range(200))
            seen.extend(beat.names for beat in looks if beat is not None)
            return len(seen) > 100

        wait_until(seen_often, "looks between the changes")
    finally:
        over.set()
        writer.join()
    assert set(seen) <= {frozenset(), *map(frozenset, names)}


# --- a process and the pipe that it ends with


def child_that_dies_with(read: int, write: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.close(write)
        linux.die_with(read)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(7)
    os.close(read)
    return pid


def test_a_process_dies_with_its_pipe_even_while_it_is_stopped(no_leaks: Leaks) -> None:
    read, write = os.pipe()
    pid = child_that_dies_with(read, write)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_a_process_dies_at_once_where_nobody_holds_the_pipe(no_leaks: Leaks) -> None:
    read, write = os.pipe()
    held_read, held_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.close(held_write)
        os.read(held_read, 1)
        linux.die_with(read)
        os._exit(7)
    for fd in (read, write, held_read, held_write):
        os.close(fd)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_orphans_are_ours_to_wait_for(no_leaks: Leaks) -> None:
    linux.adopt_orphans()
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        orphan = child_that_dies_with(read, write)
        os.waitid(os.P_PID, orphan, os.WSTOPPED)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(read)
    os.waitpid(parent, 0)
    os.close(write)
    wait_until(lambda: os.waitpid(-1, os.WNOHANG)[0], "the orphan's end")
