"""Servers for the tests of the whole system."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import module_command, module_environment
from tests.system.running_server import TIMEOUT_S, Server
from tests.warm import Started, Warm


@pytest.fixture(scope="session")
def warm_server(adopted_orphans: None) -> Iterator[Warm]:
    """A process that has imported the command line and the server."""
    with Warm("server.cli.cli", ("server.serve",), module_environment()) as warm:
        yield warm


@pytest.fixture(scope="session")
def make_server(tokenizer_cache: Path, warm_server: Warm) -> Iterator[Callable[..., Server]]:
    """Start servers; whatever still runs at the end of the tests is killed, and fails them."""
    servers: list[Server] = []

    def start(
        model: str,
        *options: str,
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
        arguments = (
            *("serve", model, "--port", "0", "--runtime-dir", str(folder)),
            *("--drain-timeout", str(TIMEOUT_S), *options),
        )
        environment = module_environment(ONECOPY_CACHE_DIR=str(tokenizer_cache), HF_HUB_OFFLINE="1")
        read, write = os.pipe()
        told = os.fdopen(read)
        with log.open("w") as stderr, os.fdopen(write, "w"):
            process: subprocess.Popen[str] | Started
            as_usual = num_descriptors is None and cwd is None
            if as_usual and warm_server.starts_the_same(environment):
                process = warm_server.start(
                    *arguments,
                    cwd=str(Path.cwd()),
                    environment=environment,
                    output=(write, stderr.fileno()),
                )
            else:
                process = subprocess.Popen(
                    module_command("server.cli", *arguments),
                    stdout=write,
                    stderr=stderr,
                    stdin=subprocess.DEVNULL,
                    text=True,
                    preexec_fn=limit,
                    env=environment,
                    cwd=cwd,
                )
        server = Server(process, told, folder, log)
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
        server.told.close()
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
