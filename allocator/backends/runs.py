"""The runs that segments belong to: one for each life of an allocator, locked as long as it lives.

    onecopy-HASH-RUN-owner      locked by the allocator of that run for as long as it lives

Owns these files, and what becomes of the segments of allocators that are gone. Invariant: of a run
that nobody owns only that is removed of which it is proven that nobody uses it: whoever has a
segment open or mapped holds a lock on it (`backends.segments`).
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec

from allocator.backends.numa import SHM_ROOT
from allocator.backends.segments import (
    FLAGS,
    LOCK_PATIENCE_S,
    OWNER,
    PAUSE_S,
    READ_WRITE,
    is_ours,
    listed,
    path_of,
    remove,
    status_of,
    try_lock,
)
from allocator.errors import DeviceError

log = logging.getLogger("onecopy.allocator")

_NAME: Final = re.compile(r"(onecopy-[0-9a-f]{12}-[0-9a-f]{8})-(.+)")
_MAX_RECORD_BYTES: Final = 16384


class RunOwner(msgspec.Struct, frozen=True):
    """What an allocator writes into its run's file: the runtime directory, and what tells it from
    any other that ever had this path."""

    directory: str
    device: int
    inode: int

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Of a directory that exists."""
        status = directory.stat()
        return cls(str(directory), status.st_dev, status.st_ino)

    @property
    def is_here(self) -> bool:
        """Whether that very directory can be seen from here: then its own next allocator takes
        over, or clears up."""
        try:
            status = Path(self.directory).lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


# --- one allocator's run


class RunLock:
    """That this process is the owner of a run's segments."""

    def __init__(self, run: str, descriptor: int) -> None:
        """See `take`."""
        self.run = run
        self._descriptor = descriptor

    @classmethod
    def take(cls, run: str, owner: RunOwner) -> Self:
        """Make the run's file, or take over that of an allocator that is gone. `run` is the common
        beginning of its segments' names, without the last dash. Raises DeviceError."""
        path = SHM_ROOT / f"{run.removeprefix('/')}-{OWNER}"
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | FLAGS, READ_WRITE)
            except OSError as error:
                raise DeviceError(f"{path} can't be made: {error.strerror}") from error
            if not is_ours(os.fstat(descriptor)):
                os.close(descriptor)
                raise DeviceError(f"{path} is no file of ours: remove it")
            if try_lock(descriptor, fcntl.LOCK_EX):
                if os.fstat(descriptor).st_nlink:
                    break
            elif time.monotonic() > deadline:
                os.close(descriptor)
                raise DeviceError(f"another allocator owns {path}")
            else:
                time.sleep(PAUSE_S)
            os.close(descriptor)  # removed by one who cleared up, between our open and our lock
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, msgspec.json.encode(owner), 0)
        except OSError as error:  # a full /dev/shm: the lock alone is what counts
            log.warning("%s can't be written: %s", path, error.strerror)
        return cls(run, descriptor)

    def release(self) -> None:
        """The run has ended and nothing of it is left."""
        remove(f"{self.run}-{OWNER}")
        os.close(self._descriptor)

    def leave(self) -> None:
        """What is left of the run is for another allocator to take."""
        os.close(self._descriptor)


def run_of(segment: str) -> str:
    """The run that a segment belongs to; "" for a name that is none of ours."""
    match = _NAME.fullmatch(segment.removeprefix("/"))
    return f"/{match[1]}" if match else ""


def runs_of(prefix: str) -> list[str]:
    """All runs of ours whose names begin so."""
    return [run for run in _by_run() if run.startswith(prefix)]


def new_run(prefix: str) -> str:
    """One that nobody can guess: else another user could take its names before we do."""
    return f"{prefix}{secrets.token_hex(4)}"


# --- what allocators that are gone have left


@dataclass(frozen=True)
class AbandonedRun:
    """Segments of ours that no allocator owns. `owner` is None where the run's file does not say
    whose they were."""

    run: str
    segments: tuple[str, ...]
    num_bytes: int
    owner: RunOwner | None
    takes_locks: bool
    """Whether the run has its file. Without it, those who map them may be of a version that takes
    no locks."""
    in_use: bool
    """Whether a process still has one of them open or mapped."""

    @property
    def may_be_removed(self) -> bool:
        """Whether it is proven that nobody uses them."""
        return self.takes_locks and not self.in_use


def abandoned_runs(but: str = "") -> list[AbandonedRun]:
    """All of our user's, by name, but those that begin with `but`. Looks, and changes nothing."""
    found = []
    for run, segments in _by_run().items():
        if but and run.startswith(but):
            continue
        with _held(run) as held:
            if held is not None:
                found.append(_abandoned(run, segments, held))
    return found


def remove_abandoned(run: str) -> AbandonedRun | None:
    """Remove a run's segments where it is proven that nobody uses them; None where it is not, or
    not any more."""
    with _held(run) as held, contextlib.ExitStack() as locks:
        segments = _by_run().get(run, [])
        if held is None or not held.is_locked or not segments:
            return None
        abandoned = _abandoned(run, segments, held)
        for segment in abandoned.segments:  # held until all are gone: nobody can open one meanwhile
            if not _lock_against_all(segment, locks):
                return None
        if not abandoned.may_be_removed:
            return None
        for segment in abandoned.segments:
            remove(segment)
        remove(f"{run}-{OWNER}")
        return abandoned


@dataclass(frozen=True)
class _Held:
    """A run whose allocator is gone. `is_locked`: its file is there, and ours for the moment."""

    owner: RunOwner | None
    is_locked: bool


@contextlib.contextmanager
def _held(run: str) -> Iterator[_Held | None]:
    """None where its allocator lives."""
    try:
        descriptor = os.open(path_of(f"{run}-{OWNER}"), os.O_RDONLY | FLAGS)
    except OSError:
        yield _Held(None, is_locked=False)
        return
    try:
        if not is_ours(os.fstat(descriptor)):
            yield _Held(None, is_locked=False)
        elif not try_lock(descriptor, fcntl.LOCK_EX):
            yield None
        else:
            yield _Held(_decoded(os.pread(descriptor, _MAX_RECORD_BYTES, 0)), is_locked=True)
    finally:
        os.close(descriptor)


def _abandoned(run: str, segments: Sequence[str], held: _Held) -> AbandonedRun:
    num_bytes, in_use = 0, False
    for segment in segments:
        status = status_of(segment)
        num_bytes += status.st_blocks * 512 if status is not None else 0
        with contextlib.ExitStack() as lock:
            in_use = in_use or not _lock_against_all(segment, lock)
    own = tuple(one for one in segments if not one.endswith(f"-{OWNER}"))
    return AbandonedRun(run, own, num_bytes, held.owner, held.is_locked, in_use)


def _lock_against_all(segment: str, locks: contextlib.ExitStack) -> bool:
    """Whether nobody has it open or mapped; if so nobody can until the locks are given up. True for
    one that is gone."""
    if segment.endswith(f"-{OWNER}"):
        return True
    try:
        descriptor = os.open(path_of(segment), os.O_RDONLY | FLAGS)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    locks.callback(os.close, descriptor)
    return is_ours(os.fstat(descriptor)) and try_lock(descriptor, fcntl.LOCK_EX)


def _by_run() -> dict[str, list[str]]:
    """Run → names of its files, the owner's among them."""
    runs: dict[str, list[str]] = {}
    for name in sorted(listed(with_owners=True)):
        if run := run_of(name):
            runs.setdefault(run, []).append(f"/{name}")
    return runs


def _decoded(text: bytes) -> RunOwner | None:
    try:
        return msgspec.json.decode(text, type=RunOwner)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
