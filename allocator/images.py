"""A weight set's image on disk: the lowest tier.

    [0, num_bytes)          the segment's bytes; the file can be mapped as the segment itself
    [.., next 4096)         zeros
    [.., + footer bytes)    msgpack of `ImageRecord`
    the last 24 bytes       footer's bytes (u64), its XXH3-64 (u64), magic (8); little-endian

Owns the names and the format of image files in a folder. Invariants: a file under an image's name
is whole, since it gets the name only once all of it is on the disk, and it is never written again;
no length is used before it has been checked against the file's own. Knows nothing of sessions, nor
of what a manifest says.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec
import xxhash

from allocator.digests import Digest, digest
from allocator.durable import sync_folder
from allocator.errors import AllocatorError, DiskError, DiskFull, ImageCorrupt
from allocator.messages import MAX_FRAME_BYTES, Bytes, Extent, Fields, Key, Word
from allocator.processes.identity import ProcessIdentity

log = logging.getLogger("onecopy.allocator")

SUFFIX: Final = ".weights"
_ALIGNMENT: Final = 4096
_TRAILER: Final = struct.Struct("<QQ8s")
_MAGIC: Final = b"1copyimg"
_MAX_FOOTER_BYTES: Final = 2 * MAX_FRAME_BYTES
"""The fingerprint, which is the bulk of a footer, came in one frame."""
_PIECE_BYTES: Final = 8 << 20
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEFTOVER: Final = re.compile(r"\.tmp-(\d{1,10})-(\d{1,20})-[0-9a-f]+")
"""pid and start of the writer: a file is a leftover once that very process is gone."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The footer: what a daemon needs to know of an image before it maps it."""

    version: Literal[1] = 1
    key: Key
    fingerprint: Fields
    num_bytes: Bytes
    manifest_offset: Bytes
    manifest_num_bytes: Bytes
    manifest_digest: Word

    @property
    def manifest(self) -> Extent:
        """Where in the segment the manifest lies."""
        return Extent(offset=self.manifest_offset, num_bytes=self.manifest_num_bytes)


_decoder: msgspec.msgpack.Decoder[ImageRecord] = msgspec.msgpack.Decoder(ImageRecord)


def image_name(key: str, fingerprint: Mapping[str, str]) -> str:
    """The one file name for a weight set; another key or fingerprint has another name."""
    identity = msgspec.msgpack.encode([key, sorted(fingerprint.items())])
    return hashlib.sha256(identity).hexdigest()[:32] + SUFFIX


def write_image(
    folder: Path,
    key: str,
    fingerprint: Mapping[str, str],
    source: memoryview,
    manifest: Extent,
    on_progress: Callable[[int], None],
) -> Path:
    """Write the segment `source`, whose manifest lies at `manifest`, and return the file's path.

    The folder is made (0700) where it is missing; an older image of the same name is replaced.
    `on_progress` gets the bytes written so far, after each 8 MiB. Blocks until all is on the disk.
    Raises DiskFull or DiskError, and then, as whenever it does not return, leaves no file behind.
    ValueError: the manifest lies outside `source`.
    """
    if manifest.offset + manifest.num_bytes > len(source):
        raise ValueError("the manifest lies outside the segment")
    with source[manifest.offset : manifest.offset + manifest.num_bytes] as view:
        record = ImageRecord(
            key=key,
            fingerprint=dict(fingerprint),
            num_bytes=len(source),
            manifest_offset=manifest.offset,
            manifest_num_bytes=manifest.num_bytes,
            manifest_digest=digest(view),
        )
    ending = _ending(record)
    total = _aligned(len(source)) + len(ending)
    path = folder / image_name(key, fingerprint)
    own = ProcessIdentity.own()
    temporary = folder / f".tmp-{own.pid}-{own.start_ticks}-{secrets.token_hex(8)}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(folder)
        _require_room(folder, total)
        try:
            _write(temporary, source, ending, on_progress)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise _disk_error(error, folder, total) from error
    return path


def read_record(path: Path) -> tuple[ImageRecord, str]:
    """What an image says of itself, and the identity of the file that said it, as
    "device:inode:bytes:mtime in ns".

    The footer and the manifest are checked against their digests, the tensors are not. Raises
    ImageCorrupt, DiskError where the file can't be read, FileNotFoundError where there is none.
    """
    try:
        # O_NONBLOCK: another's FIFO under this name must not hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise ImageCorrupt(f"{path} is not a regular file of ours")
            record = _read(fd, path, status.st_size)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link; a socket
            raise ImageCorrupt(f"{path} is not a regular file of ours") from error
        raise DiskError(f"the image {path} can't be read: {error.strerror}") from error
    identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    return record, identity


def list_images(folder: Path) -> list[tuple[Path, ImageRecord]]:
    """All good images of a folder, by name; of the others the log says why they are not. A folder
    that does not exist has none."""
    images: list[tuple[Path, ImageRecord]] = []
    for path in _listed(folder, f"*{SUFFIX}"):
        try:
            record, _ = read_record(path)
        except (ImageCorrupt, DiskError) as error:
            log.warning("ignoring an image: %s", error)
        except FileNotFoundError:
            continue  # removed since it was listed
        else:
            images.append((path, record))
    return images


def remove_leftovers(folder: Path, ending: ProcessIdentity | None = None) -> list[str]:
    """Delete the unfinished files whose writer is gone, or is `ending`; return their names. This
    process and those that write to the folder must see the same pids. What can't be deleted is
    logged."""
    removed: list[str] = []
    for path in _listed(folder, ".tmp-*"):
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        writer = ProcessIdentity(int(match[1]), int(match[2]))
        if writer == ending or not writer.is_alive():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("an unfinished image can't be deleted: %s", error)
            else:
                removed.append(path.name)
    return removed


def _listed(folder: Path, pattern: str) -> list[Path]:
    """By name; none where the folder can't be read, which the log says."""
    try:
        return sorted(path for path in folder.iterdir() if path.match(pattern))
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("the folder of images %s can't be read: %s", folder, error.strerror)
        return []


def _check_folder(folder: Path) -> None:
    """Raises DiskError where others could put files of theirs in the place of ours."""
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise DiskError(
            f"the folder of images {folder} belongs to user id {status.st_uid}: choose one of your "
            "own with --image-dir or ONECOPY_IMAGE_DIR"
        )
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise DiskError(
            f"everybody may write to the folder of images {folder}: run `chmod go-w {folder}`"
        )


# --- writing


def _ending(record: ImageRecord) -> bytes:
    """Footer and trailer. Raises ValueError for a record that `read_record` would refuse."""
    footer = msgspec.msgpack.encode(record)
    if len(footer) > _MAX_FOOTER_BYTES:
        raise ValueError(f"a footer of {len(footer)} bytes is too long")
    return footer + _TRAILER.pack(len(footer), xxhash.xxh3_64_intdigest(footer), _MAGIC)


def _write(
    path: Path, source: memoryview, ending: bytes, on_progress: Callable[[int], None]
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        for begin in range(0, len(source), _PIECE_BYTES):
            with source[begin : begin + _PIECE_BYTES] as piece:
                _write_at(fd, piece, begin)
                on_progress(begin + len(piece))
        _write_at(fd, memoryview(ending), _aligned(len(source)))
        os.fchmod(fd, 0o400)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    written = 0
    while written < len(view):  # a write may stop short, most of all on a disk that is nearly full
        with view[written:] as rest:
            written += os.pwrite(fd, rest, offset + written)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _require_room(folder: Path, num_bytes: int) -> None:
    """Raises what the write would raise later, after many gigabytes."""
    if num_bytes > _free_bytes(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    if not status.f_blocks:
        return 1 << 62  # a file system that does not tell
    return status.f_bavail * status.f_frsize


def _disk_error(error: OSError, folder: Path, num_bytes: int) -> AllocatorError:
    try:
        free = f"{_free_bytes(folder) / 1e6:.1f} MB are free"
    except OSError:
        free = "it is not known how much is free"
    cls = DiskFull if error.errno in _NO_ROOM else DiskError
    remedy = (
        "delete images or other files there, or choose a folder on a larger disk"
        if cls is DiskFull
        else "see that it can be written, or choose another folder"
    )
    return cls(
        f"an image of {num_bytes / 1e6:.1f} MB can't be written to {folder} "
        f"({error.strerror or error}), where {free}: {remedy}."
    )


# --- reading


def _read(fd: int, path: Path, size: int) -> ImageRecord:
    """`size` is the file's; every other length is compared with it before it is used."""

    def corrupt(what: str) -> ImageCorrupt:
        return ImageCorrupt(f"{path} is not a whole image: {what}")

    if size < _TRAILER.size:
        raise corrupt(f"it has only {size} bytes")
    trailer = os.pread(fd, _TRAILER.size, size - _TRAILER.size)
    if len(trailer) < _TRAILER.size or trailer[-len(_MAGIC) :] != _MAGIC:
        raise corrupt("it does not end in an image's trailer")
    footer_bytes, checksum, _ = _TRAILER.unpack(trailer)
    if footer_bytes > min(_MAX_FOOTER_BYTES, size - _TRAILER.size):
        raise corrupt(f"a footer of {footer_bytes} bytes does not fit")
    footer = os.pread(fd, footer_bytes, size - _TRAILER.size - footer_bytes)
    if xxhash.xxh3_64_intdigest(footer) != checksum:
        raise corrupt("its footer does not match its checksum")
    try:
        record = _decoder.decode(footer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise corrupt(f"its footer can't be read ({error})") from error
    if _aligned(record.num_bytes) + footer_bytes + _TRAILER.size != size:
        raise corrupt(f"a segment of {record.num_bytes} bytes does not fit a file of {size}")
    if record.manifest_offset + record.manifest_num_bytes > record.num_bytes:
        raise corrupt("its manifest lies outside the segment")
    if _digest_of(fd, record.manifest) != record.manifest_digest:
        raise corrupt("its manifest does not match its digest")
    return record


def _digest_of(fd: int, extent: Extent) -> str:
    """Of an extent of a file; a file that ends too early has another digest."""
    hashed = Digest()
    offset, end = extent.offset, extent.offset + extent.num_bytes
    while piece := os.pread(fd, min(_PIECE_BYTES, end - offset), offset):
        hashed.update(piece)
        offset += len(piece)
    return hashed.hexdigest()
