"""What a reader and its threads say to each other.

    reader      opens files, checks what is asked for, and tells errors by name
    threads     take pieces of reads in order and fill memory: native ones, or the interpreter's

Invariant: both kinds of threads keep one contract. Knows no tensor.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Final, Literal, NamedTuple, Protocol

BLOCK: Final = 4096
"""What addresses and files are aligned to where a filesystem reads past the page cache."""
MAX_ENDED: Final = 4096
"""So many jobs that have ended are remembered."""
MAX_AGAIN: Final = 1000
"""So often in a row a file may say that it has nothing yet, a millisecond apart."""

AccessName = Literal["uncached", "direct", "buffered"]


class Access(IntEnum):
    """How a file is read."""

    UNCACHED = 0
    """By way of the page cache, where nothing of it stays (RWF_DONTCACHE)."""
    DIRECT = 1
    """Past the page cache, in whole blocks (O_DIRECT)."""
    BUFFERED = 2
    """By way of the page cache, which is told afterwards that nothing of it is needed."""


class Read(NamedTuple):
    """Bytes of a file that are wanted in memory."""

    file: int
    """As `Reader.open` gave it."""
    begin: int
    """The first byte in the file."""
    num_bytes: int
    address: int
    """Where they go."""
    in_blocks: bool = True
    """Whether that is as far into a block of BLOCK bytes as `begin` is, and the rest of the first
    and of the last block may be overwritten, and is mapped. Past the page cache nothing else is
    read."""


class State(IntEnum):
    """Of a job."""

    UNKNOWN = -1
    RUNNING = 0
    READ = 1
    FAILED = 2
    CANCELLED = 3


class Outcome(NamedTuple):
    """What became of a job. `error` is an errno, or 0 where the file ends before `begin`."""

    state: State
    error: int = 0
    file: int = 0
    begin: int = 0
    begin_ns: int = 0
    end_ns: int = 0


class ReadingThreads(Protocol):
    """Of one process, from the first job on: `pid`, None before. In a forked child nothing but
    `stop` may be called, which returns at once."""

    pid: int | None

    def add(self, descriptor: int, direct: int, access: Access, falls_back: bool) -> int:
        """A number for a file that stays open until `stop` has returned. `direct` is a descriptor
        with O_DIRECT, or -1. It `falls_back` to buffered where a read is refused after all."""

    def access(self, file: int) -> Access:
        """How it is read now."""

    def start(self, reads: Sequence[Read]) -> int:
        """A job's number, from 1 on; 0 if it came after `stop`. Raises OSError where no thread is
        to be had, MemoryError."""

    def wait(self, job: int, timeout_s: float) -> Outcome:
        """RUNNING if it has not ended by then."""

    def cancel(self, job: int) -> None:
        """No further piece of it begins; it ends with those under way."""

    def statistics(self) -> tuple[int, int]:
        """Bytes that were read, and nanoseconds that threads spent reading them."""

    def stop(self) -> None:
        """Cancels all jobs, and returns when all threads have ended."""
