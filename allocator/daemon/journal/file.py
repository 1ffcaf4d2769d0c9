"""An append-only journal: records that outlive a kill of their writer, and a crash where asked.

    header      magic (8), version (u32)
    record      payload's bytes (u32), checksum (u32), payload; little-endian, any number of them

A checksum is the XXH32 of the four bytes before it and of the payload, seeded with the checksum of
the record before (0 for the first), so that a record counts only behind those it was written after.

Owns one file and its format. Invariants: what is read is always a prefix of what was appended,
whatever happened to the file; under the journal's name there is always a whole one, the old or the
new, also while it is rewritten. Knows nothing of what the records say. One process writes a
journal, one thread at a time.
"""

import contextlib
import logging
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import xxhash

from allocator.durable import sync_folder
from allocator.errors import JournalError

log = logging.getLogger("onecopy.allocator")

_HEADER: Final = struct.Struct("<8sI").pack(b"1copyjnl", 1)
_U32: Final = struct.Struct("<I")
_FRAME: Final = struct.Struct("<II")
MAX_RECORD_BYTES: Final = 16 << 20


class Written(NamedTuple):
    """A whole journal: a descriptor that appends to it, its length, its last record's checksum."""

    fd: int
    num_bytes: int
    checksum: int


class Journal:
    """A journal that is open for appending."""

    _fd: int
    _num_bytes: int
    _num_bytes_at_rewrite: int
    _checksum: int
    _refuses: str
    """Why nothing can be appended; "" where it can."""

    def __init__(self, path: Path, written: Written):
        """See `create`. Owns the descriptor."""
        self._path = path
        self._adopt(written)

    @classmethod
    def create(cls, path: Path, records: Iterable[bytes]) -> "Journal":
        """A new journal that holds `records`, on the disk when this returns. It takes the place of
        whatever has this name, in one step. Raises JournalError; under the name is then what was
        there, or, where only the folder could not be synced, the new journal."""
        journal = cls(path, _write_anew(path, records))
        try:
            sync_folder(path.parent)
        except OSError as error:
            journal.close()
            raise _failed("be written", path, error) from error
        return journal

    def rewrite(self, records: Iterable[bytes]) -> None:
        """As `create`, in the place of this journal: so it is compacted. Raises JournalError; this
        journal then goes on with what it held, or, as there, with `records`."""
        if self._fd < 0:
            raise JournalError(f"the journal {self._path} is closed")
        written = _write_anew(self._path, records)
        # The new file has the name now: from here on, to append to the old one would be to lose.
        self.close()
        self._adopt(written)
        try:
            sync_folder(self._path.parent)
        except OSError as error:
            raise _failed("be written", self._path, error) from error

    @property
    def num_bytes(self) -> int:
        """The file's length."""
        return self._num_bytes

    @property
    def num_bytes_at_rewrite(self) -> int:
        """The file's length when it was last written anew."""
        return self._num_bytes_at_rewrite

    def append(self, record: bytes, *, sync: bool = False) -> None:
        """Add a record. Without `sync` it outlives this process, with it the machine's crash, too.

        Raises JournalError, and then the record is not in the journal. Where the file can't be put
        right again, further records are refused until `rewrite`.
        """
        if self._refuses:
            raise JournalError(f"the journal {self._path} takes no records: {self._refuses}")
        frame, checksum = _frame(record, self._checksum)
        try:
            written = os.write(self._fd, frame)
        except OSError as error:
            self._take_back()
            raise _failed("take a record", self._path, error) from error
        if written < len(frame):
            self._take_back()
            raise JournalError(
                f"the journal {self._path} can't take a record: of its {len(frame)} bytes only "
                f"{written} could be written. Is the disk full?"
            )
        if sync:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._take_back()
                # After a failed sync the kernel forgets what it could not write: earlier records
                # may be missing on the disk, too, and only writing all of them anew helps.
                self._refuses = "an earlier sync failed; it must be rewritten"
                raise _failed("be synced", self._path, error) from error
        self._num_bytes += len(frame)
        self._checksum = checksum

    def close(self) -> None:
        """Idempotent. Nothing can be written any more."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._refuses = "it is closed"

    def _adopt(self, written: Written) -> None:
        self._fd = written.fd
        self._num_bytes = self._num_bytes_at_rewrite = written.num_bytes
        self._checksum = written.checksum
        self._refuses = ""

    def _take_back(self) -> None:
        """Cut off a torn record, which would hide all that came after it."""
        try:
            os.ftruncate(self._fd, self._num_bytes)
        except OSError as error:
            log.warning("the journal %s could not be cut back: %s", self._path, error)
            self._refuses = "a torn record could not be removed; it must be rewritten"


def read_journal(path: Path, max_bytes: int = 256 << 20) -> list[bytes]:
    """The records up to the first one that is torn or damaged, or ends beyond `max_bytes`.

    None where there is no file, or none of ours. Never raises for what it finds; the log says what
    was dropped.
    """
    records: list[bytes] = []
    try:
        # O_NONBLOCK: another's FIFO under this name must not hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                log.warning("ignoring the journal %s: it is not a regular file of ours", path)
                return []
            with os.fdopen(fd, "rb", closefd=False) as file:
                good = _read(file, min(status.st_size, max_bytes), records)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("the journal %s can't be read: %s", path, error)
        return records
    if good < status.st_size:
        log.warning(
            "the journal %s is damaged or too long: %d records are good, %d bytes are dropped",
            *(path, len(records), status.st_size - good),
        )
    return records


def _read(file: BinaryIO, end: int, records: list[bytes]) -> int:
    """Add the good records of [0, end) to `records`; return where the last one ends."""
    if end < len(_HEADER) or file.read(len(_HEADER)) != _HEADER:
        return 0
    good, before = len(_HEADER), 0
    while good + _FRAME.size <= end:
        frame = file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            break  # the file has become shorter
        num_bytes, checksum = _FRAME.unpack(frame)
        if num_bytes > end - good - _FRAME.size:
            break
        payload = file.read(num_bytes)
        if _checksum(frame[: _U32.size], payload, before) != checksum:
            break
        records.append(payload)
        good += _FRAME.size + num_bytes
        before = checksum
    return good


def _frame(record: bytes, before: int) -> tuple[bytes, int]:
    """What is appended for a record, and its checksum. `before` is that of the one before it."""
    if len(record) > MAX_RECORD_BYTES:
        raise JournalError(f"a record of {len(record)} bytes is longer than {MAX_RECORD_BYTES}")
    length = _U32.pack(len(record))
    checksum = _checksum(length, record, before)
    return length + _U32.pack(checksum) + record, checksum


def _checksum(length: bytes, payload: bytes, before: int) -> int:
    # The length is part of it, so that a run of zeros, which a crash may leave, is no record.
    hashed = xxhash.xxh32(length, seed=before)
    hashed.update(payload)
    return hashed.intdigest()


def _write_anew(path: Path, records: Iterable[bytes]) -> Written:
    """Write a whole journal aside, sync it and give it the name. Raises JournalError, and then
    nothing has changed."""
    # One name, not a new one each time: what a killed writer leaves, the next one removes.
    aside = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        aside.unlink(missing_ok=True)
        with contextlib.ExitStack() as undo:
            fd = os.open(aside, flags, 0o600)
            undo.callback(os.close, fd)
            undo.callback(aside.unlink)
            num_bytes, checksum = _write_all(fd, _HEADER), 0
            for record in records:
                frame, checksum = _frame(record, checksum)
                num_bytes += _write_all(fd, frame)
            os.fsync(fd)
            aside.replace(path)
            undo.pop_all()
    except OSError as error:
        raise _failed("be written", path, error) from error
    return Written(fd, num_bytes, checksum)


def _write_all(fd: int, data: bytes) -> int:
    written = 0
    while written < len(data):
        written += os.write(fd, data[written:])
    return written


def _failed(what: str, path: Path, error: OSError) -> JournalError:
    return JournalError(f"the journal {path} can't {what}: {error.strerror or error}")
