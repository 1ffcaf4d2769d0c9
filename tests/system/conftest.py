"""Servers for the tests of the whole system."""

import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import module_command, module_environment
from tests.system.running_server import TIMEOUT_S, Server


@pytest.fixture(scope="session")
def make_server(tokenizer_cache: Path) -> Iterator[Callable[..., Server]]:
    """Start servers; whatever still runs at the end of the tests is killed, and fails them."""
    servers: list[Server] = []

    def start(
        model: str,
        *arguments: str,
        wait: bool = True,
        runtime_dir: Path | None = None,
        num_descriptors: int | None = None,
        cwd: Path | None = None,
    ) -> Server:
        def limit() -> None:
            if num_descriptors is not None:
                limits = (num_descriptors, num_descriptors)
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        folder = runtime_dir or Path(tempfile.mkdtemp(prefix="onecopy-t-"))
        log = Path(tempfile.mkstemp(prefix="onecopy-log-")[1])
        with log.open("w") as stderr:
            process = subprocess.Popen(
                module_command(
                    *("server.cli", "serve", model, "--port", "0"),
                    *("--runtime-dir", str(folder), "--drain-timeout", str(TIMEOUT_S), *arguments),
                ),
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                text=True,
                preexec_fn=limit,
                env=module_environment(ONECOPY_CACHE_DIR=str(tokenizer_cache), HF_HUB_OFFLINE="1"),
                cwd=cwd,
            )
        server = Server(process, folder, log)
        servers.append(server)
        if wait:
            server.wait_ready()
        return server

    yield start
    still_running = [server for server in servers if server.process.poll() is None]
    for server in still_running:
        server.onecopy("stop")
        server.process.kill()
        server.process.wait()
    for server in servers:
        if server.process.stdout is not None:
            server.process.stdout.close()
        shutil.rmtree(server.runtime_dir, ignore_errors=True)
        server.log.unlink()
    assert not still_running, "a test left its server running"


@pytest.fixture(scope="session")
def demo(make_server: Callable[..., Server]) -> Iterator[Server]:
    """The demo model on two instances, for all tests that leave it as it was."""
    server = make_server("demo", "--instances", "2", "--max-num-seqs", "8")
    yield server
    server.remember()
    server.stop()
