"""The contract of every backend. A further device is one more entry of `BACKENDS`."""

import ctypes
import errno
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allocator import OutOfDeviceMemory, RuntimeDir, StaleGeneration
from allocator.backends import Backend, by_name
from allocator.backends.host import SHM_ROOT
from allocator.messages import Handle
from allocator.tensor import as_bytes
from tests.allocator.processes import in_fork
from tests.daemon_process import ROOT

BACKENDS = ["host"]
SIZE = 3 * mmap.PAGESIZE + 5
PATTERN = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return by_name(request.param)


@pytest.fixture
def prefix(backend: Backend, runtime_dir: RuntimeDir) -> Iterator[str]:
    yield runtime_dir.segment_prefix
    backend.sweep(runtime_dir.segment_prefix)


@pytest.fixture
def handle(backend: Backend, prefix: str) -> Handle:
    """A reserved segment."""
    backend.reserve(f"{prefix}1", SIZE)
    return Handle(backend=backend.name, segment=f"{prefix}1", num_bytes=SIZE, generation=1)


@pytest.fixture
def sealed(backend: Backend, handle: Handle) -> Handle:
    """A sealed segment that holds PATTERN."""
    mapping = backend.map(handle, writable=True)
    mapping.buffer[:] = PATTERN
    mapping.close()
    backend.seal(handle.segment)
    return handle


class TestContract:
    def test_what_was_written_is_read_after_the_seal(
        self, backend: Backend, sealed: Handle
    ) -> None:
        mapping = backend.map(sealed, writable=False)
        assert mapping.num_bytes == SIZE
        assert mapping.buffer == PATTERN
        mapping.close()

    def test_a_new_segment_is_zero(self, backend: Backend, handle: Handle) -> None:
        mapping = backend.map(handle, writable=True)
        assert mapping.buffer == bytes(SIZE)
        mapping.close()

    def test_another_process_sees_the_same_memory(self, backend: Backend, handle: Handle) -> None:
        mapping = backend.map(handle, writable=True)

        def write() -> str:
            other = backend.map(handle, writable=True)
            before = bytes(other.buffer[:3])
            other.buffer[3:6] = b"abc"
            return before.decode()

        mapping.buffer[:3] = b"xyz"
        assert in_fork(write).text == "xyz"
        assert mapping.buffer[:6] == b"xyzabc"
        mapping.close()

    def test_python_refuses_to_write_to_a_sealed_buffer(
        self, backend: Backend, sealed: Handle
    ) -> None:
        mapping = backend.map(sealed, writable=False)
        with pytest.raises(TypeError):
            mapping.buffer[0] = 0
        mapping.close()

    def test_writing_through_a_tensor_kills_the_writer_alone(
        self, backend: Backend, sealed: Handle
    ) -> None:
        mapping = backend.map(sealed, writable=False)
        tensor = as_bytes(mapping)

        def write() -> str:
            tensor.fill_(7)
            return "survived"

        child = in_fork(write)
        assert (child.signal, child.text) == (signal.SIGSEGV, "")
        assert mapping.buffer == PATTERN
        assert bytes(tensor) == PATTERN

    def test_mprotect_cannot_undo_the_seal(self, backend: Backend, sealed: Handle) -> None:
        mapping = backend.map(sealed, writable=False)
        libc = ctypes.CDLL(None, use_errno=True)
        address = np.frombuffer(mapping.buffer, np.uint8).ctypes.data
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), protection) == -1
        assert ctypes.get_errno() == errno.EACCES
        mapping.close()

    def test_a_mapping_outlives_the_segment(self, backend: Backend, sealed: Handle) -> None:
        mapping = backend.map(sealed, writable=False)
        backend.free(sealed.segment)
        assert mapping.buffer == PATTERN
        mapping.close()

    def test_views_outlive_the_mapping(self, backend: Backend, sealed: Handle) -> None:
        mapping = backend.map(sealed, writable=False)
        tensor = as_bytes(mapping)[5:9]
        mapping.close()
        mapping.close()  # a second time is harmless
        del mapping
        assert bytes(tensor) == PATTERN[5:9]

    def test_the_last_view_unmaps(self, backend: Backend, sealed: Handle) -> None:
        mapping = backend.map(sealed, writable=False)
        tensor = as_bytes(mapping)[5:9]
        mapping.close()
        assert sealed.segment in Path("/proc/self/maps").read_text()
        del tensor
        assert sealed.segment not in Path("/proc/self/maps").read_text()

    def test_a_closed_mapping_says_so(self, backend: Backend, sealed: Handle) -> None:
        mapping = backend.map(sealed, writable=False)
        mapping.close()
        with pytest.raises(ValueError, match="closed"):
            _ = mapping.buffer

    def test_freeing_twice_is_harmless(self, backend: Backend, handle: Handle) -> None:
        backend.free(handle.segment)
        backend.free(handle.segment)
        with pytest.raises(StaleGeneration, match="gone"):
            backend.map(handle, writable=True)

    @pytest.mark.parametrize("writable", [True, False])
    def test_a_handle_of_another_size_is_stale(
        self, backend: Backend, handle: Handle, writable: bool
    ) -> None:
        wrong = Handle(
            backend=backend.name, segment=handle.segment, num_bytes=SIZE + 1, generation=1
        )
        with pytest.raises(StaleGeneration, match="another size"):
            backend.map(wrong, writable=writable)

    @pytest.mark.parametrize("num_bytes", [1 << 50, 1 << 62])
    def test_out_of_room_names_the_fix_and_leaves_nothing(
        self, backend: Backend, prefix: str, num_bytes: int
    ) -> None:
        with pytest.raises(OutOfDeviceMemory, match=r"Enlarge|serve a smaller model"):
            backend.reserve(f"{prefix}1", num_bytes)
        assert backend.sweep(prefix) == []

    def test_the_sweep_takes_our_names_and_no_others(self, backend: Backend, prefix: str) -> None:
        ours, others = prefix, f"{prefix[:-1]}x-"
        for name in (f"{ours}1", f"{ours}2", f"{others}1"):
            backend.reserve(name, 10)
        assert backend.sweep(ours) == [f"{ours}1", f"{ours}2"]
        assert backend.sweep(ours) == []
        assert backend.sweep(others) == [f"{others}1"]

    def test_the_limit_is_a_real_one(self, backend: Backend) -> None:
        assert 1 << 20 < backend.limit_bytes() < 1 << 50


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="no backend is called 'tape'"):
        by_name("tape")


class TestHost:
    @pytest.fixture
    def backend(self) -> Backend:
        return by_name("host")

    def test_others_may_not_even_open_it(self, sealed: Handle) -> None:
        path = SHM_ROOT / sealed.segment.lstrip("/")
        assert path.stat().st_mode & 0o777 == 0o400

    def test_a_mapped_segment_has_all_its_memory(self, backend: Backend, handle: Handle) -> None:
        mapping = backend.map(handle, writable=True)
        status = (SHM_ROOT / handle.segment.lstrip("/")).stat()
        assert status.st_blocks * 512 >= SIZE  # a sparse one would end in SIGBUS
        mapping.close()

    @pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
    def test_after_the_seal_the_owner_cannot_map_it_writable(
        self, backend: Backend, sealed: Handle
    ) -> None:
        path = SHM_ROOT / sealed.segment.lstrip("/")
        os.chown(path, 65534, 65534)  # root itself is never refused
        child = in_fork(lambda: str(backend.map(sealed, writable=True)), uid=65534)
        assert child.text.startswith("NotWriter")
        child = in_fork(lambda: str(len(backend.map(sealed, writable=False).buffer)), uid=65534)
        assert child.text == str(SIZE)

    def test_torch_does_not_warn_of_read_only_memory(
        self, backend: Backend, sealed: Handle, recwarn: pytest.WarningsRecorder
    ) -> None:
        mapping = backend.map(sealed, writable=False)
        assert as_bytes(mapping).dtype == torch.uint8
        assert not recwarn.list


def on_small_shm(runtime_dir: RuntimeDir) -> dict[str, Any]:
    """What tests/allocator/small_shm.py found on an 8 MiB /dev/shm of its own."""
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"this user can't make a mount namespace: {probe.stderr.strip()}")
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    program = [sys.executable, "-m", "tests.allocator.small_shm", str(runtime_dir.path)]
    finished = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", *program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def test_a_full_device(runtime_dir: RuntimeDir) -> None:
    found = on_small_shm(runtime_dir)
    # The backend: an error that names the fix, and nothing is left of the attempt.
    for where in ("commit", "reserve"):
        assert "it holds 8.4 MB, of which 3.1 MB are free" in found[where]
        # 5 MiB are used, 5 more are wanted.
        assert re.search(r"remount,size=10M /dev/shm.*--shm-size 10m", found[where])
    assert found["nothing_taken"]
    assert len(found["names"]) == 2  # the third was never made
    # The daemon: what is idle makes room, though not for what could never fit.
    assert found["idle"] == "loaded"
    assert found["evicting"] == "loaded"
    assert found["after_evicting"] == ["new"]
    assert "are needed, but" in found["too_large"]
    assert found["after_too_large"] == ["new"]
    assert found["status"] == 0
    assert found["left"] == ["another program's"]
