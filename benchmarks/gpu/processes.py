"""An allocator of the device, and clients of it in processes of their own, for the stages.

The programs are those that the tests command (`tests/allocator/backends/device_client.py`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu.stage import Stage

from allocator import RuntimeDir
from tests.allocator.backends.device_client import DeviceClient
from tests.daemon_process import DaemonProcess


@contextlib.contextmanager
def allocator(stage: Stage, name: str = "run") -> Iterator[DaemonProcess]:
    """One of the stage's device, in a runtime directory of that name."""
    path = stage.folder / name
    path.mkdir(mode=0o700, exist_ok=True)
    images = Path(stage.folder, "images")
    device = ("--device", stage.device, "--image-dir", str(images))
    daemon = DaemonProcess(RuntimeDir.open(path), *device)
    try:
        yield daemon
    finally:
        daemon.stop()


@contextlib.contextmanager
def clients(daemon: DaemonProcess, count: int) -> Iterator[list[DeviceClient]]:
    """So many, connected, each with a context on the device."""
    with contextlib.ExitStack() as started:
        made = []
        for _ in range(count):
            client = DeviceClient(daemon.runtime_dir)
            started.enter_context(client)
            client.do.make_context()
            made.append(client)
        yield made


def together(clients: Sequence[DeviceClient], begin: Callable[[DeviceClient], object]) -> list[Any]:
    """What each answers to what it is told to begin; all work at the same time."""
    for client in clients:
        begin(client)
    return [client.receive() for client in clients]
