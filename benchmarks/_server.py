"""A server of the benchmark's own, driven by the command line as a person would."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _processes import environment


@contextlib.contextmanager
def running_server(
    model: str,
    runtime_dir: Path,
    *,
    num_instances: int,
    options: Sequence[str] = (),
    within: Sequence[str] = (),
) -> Iterator[float]:
    """Serve `model`; gives the milliseconds from the process's start to its ready line. `within` is
    a program that becomes the server, once it has put itself into another place."""
    wanted = time.monotonic()
    server = subprocess.Popen(
        [
            *within,
            *(sys.executable, "-P", "-m", "server.cli", "serve", model, "--port", "0"),
            *("--instances", str(num_instances), "--runtime-dir", str(runtime_dir)),
            *options,
        ],
        env=environment(own=True),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "is ready" in line:
                break
        else:
            raise RuntimeError("the server ended before it was ready; its messages say why")
        yield (time.monotonic() - wanted) * 1000
    finally:
        if server.poll() is None:
            onecopy(runtime_dir, "stop")
        server.wait(timeout=60)


def onecopy(runtime_dir: Path, *arguments: str) -> str:
    """What a command prints."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "server.cli", *arguments, "--runtime-dir", str(runtime_dir)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def server_status(runtime_dir: Path) -> dict[str, Any]:
    """`onecopy ps --json`."""
    status: dict[str, Any] = json.loads(onecopy(runtime_dir, "ps", "--json"))
    return status


def wait_ready(runtime_dir: Path, count: int) -> dict[str, Any]:
    """Until so many instances are ready, and no other is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = server_status(runtime_dir)
        if [one["state"] for one in status["instances"]] == ["ready"] * count:
            return status
    raise TimeoutError(f"{count} instances did not become ready")


def free_port() -> int:
    """One that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
