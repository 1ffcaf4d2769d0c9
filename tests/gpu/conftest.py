"""What the tests that need an NVIDIA GPU share. Without one each is skipped, saying why."""

import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import RuntimeDir
from allocator.backends import Backend, open_device
from allocator.messages import Extent, Handle
from tests.allocator.backends.backend_contract import map_extent, mapped
from tests.allocator.backends.device_client import DeviceClient
from tests.daemon_process import ROOT, DaemonProcess
from tests.leaks import Leaks

DEVICE = "cuda:0"
_LEFT_S = 15.0
"""What a test may take to give everything back: many are to be heard within a few minutes."""
_LOOK = f"""
from allocator.backends import open_device
from allocator.errors import InvalidSetting
try:
    open_device({DEVICE!r})
except InvalidSetting as error:
    print(error)
"""

Start = Callable[..., DeviceClient]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU. Another process looks,
    for one that has used CUDA can't fork any more, and tests of other folders do."""
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    if not here:
        return
    looked = subprocess.run(
        [sys.executable, "-c", _LOOK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if looked.stdout:
            item.add_marker(pytest.mark.skip(reason=looked.stdout.strip()))


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skips where torch can't use the GPU. What the driver and torch open once a process is opened
    here, so that no test seems to leak it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} can't use the GPU")
    _use_once(open_device(DEVICE))
    torch.ones(1000, device=DEVICE).sum().item()


def _use_once(backend: Backend) -> None:
    num_bytes = 2 * backend.granularity
    named = Handle(
        backend="cuda", device=backend.device, segment="once", num_bytes=num_bytes, generation=1
    )
    backend.reserve("once", num_bytes)
    with contextlib.closing(mapped(backend, named, writable=True)) as mapping:
        mapping.write(0, bytes(num_bytes))
        mapping.read(0, memoryview(bytearray(num_bytes)))
    backend.free("once")
    extent = Extent(offset=0, num_bytes=backend.granularity)
    backend.reserve_pool("once", num_bytes)
    backend.reserve_extent("once", extent)
    with contextlib.closing(backend.open_pool(named)) as window:
        map_extent(backend, named, window, extent, writable=True)
    backend.free("once")


@pytest.fixture
def no_leaks() -> Iterator[Leaks]:
    """As everywhere, but the driver has descriptors of its own, more or less of them as it likes:
    what ours become of them is looked at by `test_cuda_backend`, many times over."""
    leaks = Leaks(not_ours=("/dev/nvidia",), timeout_s=_LEFT_S)
    yield leaks
    leaks.check()


@pytest.fixture
def backend() -> Iterator[Backend]:
    """Both sides in this process."""
    yield open_device(DEVICE)
    gc.collect()


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """An allocator of the GPU."""
    return start_daemon("--device", DEVICE)


@pytest.fixture
def start(daemon: DaemonProcess, runtime_dir: RuntimeDir) -> Iterator[Start]:
    """Start clients, which end with the test."""
    with contextlib.ExitStack() as started:
        yield lambda **options: started.enter_context(DeviceClient(runtime_dir, None, **options))
