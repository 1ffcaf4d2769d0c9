"""Files as segments: mapped where they lie, and only if they are what they were."""

import contextlib
import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from allocator import NotWriter, StaleGeneration
from allocator.backends import for_handle
from allocator.backends.file import FileBackend
from allocator.client.weights.tensor import as_bytes
from allocator.errors import InvalidMessage
from allocator.messages import Extent, Handle
from tests.allocator.processes import in_fork
from tests.leaks import Leaks, descriptors

CONTENT = bytes(range(256)) * 40 + b"tail"


@pytest.fixture
def path(tmp_path: Path, no_leaks: Leaks) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def handle_of(path: Path, num_bytes: int = len(CONTENT)) -> Handle:
    return Handle(
        backend="file",
        segment=str(path),
        num_bytes=num_bytes,
        generation=1,
        identity=FileBackend().identity(str(path)),
    )


def test_a_file_is_mapped_where_it_lies(path: Path) -> None:
    handle = handle_of(path)
    before = descriptors()
    with contextlib.closing(for_handle(handle).map(handle, writable=False)) as mapping:
        assert mapping.num_bytes == len(CONTENT)
        assert mapping.buffer == CONTENT
        out = bytearray(7)
        mapping.read(300, memoryview(out))
        assert out == CONTENT[300:307]
        (line,) = [m for m in Path("/proc/self/maps").read_text().splitlines() if str(path) in m]
        assert line.split()[1] == "r--s"
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert descriptors() == before


def test_the_kernel_shows_it_under_the_name_that_is_told(path: Path) -> None:
    handle = handle_of(path)
    before = descriptors()
    named = FileBackend().kernel_object(handle)
    with contextlib.closing(FileBackend().map(handle, writable=False)):
        (line,) = [m for m in Path("/proc/self/maps").read_text().splitlines() if str(path) in m]
    assert named == ":".join(line.split()[3:5])
    path.write_bytes(CONTENT + b"more")
    with pytest.raises(StaleGeneration, match="changed"):
        FileBackend().kernel_object(handle)
    assert descriptors() == before


def test_a_part_of_it_may_be_all_that_is_wanted(path: Path) -> None:
    handle = handle_of(path, 10)
    with contextlib.closing(for_handle(handle).map(handle, writable=False)) as mapping:
        assert mapping.buffer == CONTENT[:10]


def test_a_tensor_keeps_it_mapped(path: Path) -> None:
    mapping = FileBackend().map(handle_of(path), writable=False)
    tensor = as_bytes(mapping)[5:9]
    mapping.close()
    path.unlink()
    assert bytes(tensor) == CONTENT[5:9]


def test_who_writes_to_it_harms_itself_alone(path: Path) -> None:
    mapping = FileBackend().map(handle_of(path), writable=False)
    with pytest.raises(TypeError):
        mapping.buffer[0] = 1
    with pytest.raises(TypeError, match="read-only"):
        mapping.write(0, b"x")
    tensor = as_bytes(mapping)
    assert in_fork(lambda: str(tensor.fill_(7))).signal == signal.SIGSEGV
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(np.frombuffer(mapping.buffer, np.uint8).ctypes.data)
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mprotect(address, ctypes.c_size_t(len(CONTENT)), writable) == -1
    assert ctypes.get_errno() == errno.EACCES
    mapping.close()
    assert path.read_bytes() == CONTENT


def rewritten(path: Path) -> None:
    status = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """By a file of the same size and time."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def truncated(path: Path) -> None:
    status = path.stat()
    os.truncate(path, 10)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def linked(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    path.symlink_to(other)


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (rewritten, "has changed"),
        (replaced, "has changed"),
        (truncated, "has changed"),
        (made_a_folder, "has changed"),
        (made_a_pipe, "has changed"),
        (linked, "can't be opened any more"),
        (Path.unlink, "can't be opened any more"),
    ],
)
def test_a_file_that_changed_is_refused(
    path: Path, change: Callable[[Path], None], complaint: str
) -> None:
    handle, before = handle_of(path), descriptors()
    change(path)
    with pytest.raises(StaleGeneration, match=complaint):
        FileBackend().map(handle, writable=False)
    assert FileBackend().identity(str(path)) != handle.identity
    assert descriptors() == before


def test_a_handle_that_reaches_beyond_the_file_is_refused(path: Path) -> None:
    with pytest.raises(StaleGeneration, match="has changed"):
        FileBackend().map(handle_of(path, len(CONTENT) + 1), writable=False)


@pytest.mark.parametrize("change", [linked, made_a_folder, made_a_pipe, Path.unlink])
def test_what_is_no_file_has_no_identity_and_matches_none(
    path: Path, change: Callable[[Path], None]
) -> None:
    change(path)
    handle = handle_of(path, 1)
    assert handle.identity == ""
    with pytest.raises(StaleGeneration):
        FileBackend().map(handle, writable=False)


def test_an_empty_handle_is_refused(path: Path) -> None:
    with pytest.raises(InvalidMessage, match="nothing is to be mapped"):
        FileBackend().map(handle_of(path, 0), writable=False)


def test_nobody_owns_files(path: Path) -> None:
    backend, extent = FileBackend(), Extent(offset=0, num_bytes=1)
    with pytest.raises(NotWriter, match="only read"):
        backend.map(handle_of(path), writable=True)
    refused: list[Callable[[], object]] = [
        lambda: backend.reserve(str(path), 1, outstanding_bytes=0),
        lambda: backend.seal(str(path)),
        lambda: backend.free(str(path)),
        lambda: backend.free_extent(str(path), extent),
        lambda: backend.sweep(str(path)),
        lambda: backend.open_pool(handle_of(path)),
        lambda: backend.export(str(path)),
        lambda: backend.limit_bytes(),
        lambda: backend.default_limit_bytes(()),
    ]
    for attempt in refused:
        with pytest.raises(NotWriter, match="files are mapped by clients"):
            attempt()
    assert path.read_bytes() == CONTENT
