"""A real server as a process, its clients, and proof that nothing of it is left afterwards."""

import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import openai
import pytest
from typer.testing import CliRunner

from allocator import ProcessIdentity, RuntimeDir, module_command, module_environment
from server.admin.client import AdminClient
from server.cli.cli import app
from tests.warm import Started

TIMEOUT_S = 600.0
"""A deadline that only a fault misses, on however slow a machine."""

_PAUSE_S = 0.02
_PAUSE = threading.Event()  # never set: between two looks the processes looked at may run


@dataclass
class Outcome:
    """What a command printed and how it ended."""

    status: int
    stdout: str
    stderr: str


def onecopy(*arguments: str, timeout: float = TIMEOUT_S, **environment: str) -> Outcome:
    """Run the command line to its end, as a process of its own."""
    done = subprocess.run(
        module_command("server.cli", *arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=module_environment(HF_HUB_OFFLINE="1", **environment),
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def onecopy_here(*arguments: str) -> Outcome:
    """The same in this process, which has imported it already: what a shell would see of it. From
    one thread at a time."""
    result = CliRunner().invoke(app, arguments, env={"HF_HUB_OFFLINE": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def wait_until(condition: Callable[[], object], what: str, timeout: float = TIMEOUT_S) -> object:
    """The condition's first true value; fails the test after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:.0f} s in vain for {what}")
        _PAUSE.wait(_PAUSE_S)


@dataclass
class Server:
    """`onecopy serve` as a process of its own."""

    process: "subprocess.Popen[str] | Started"
    told: IO[str]
    """What it prints."""
    runtime_dir: Path
    log: Path
    url: str = ""
    try_line: str = ""
    identities: set[ProcessIdentity] = field(default_factory=set)

    @property
    def model(self) -> str:
        return self.status()["model"]

    def wait_ready(self) -> None:
        for line in self.told:
            if found := re.search(r"is ready: .* on (\S+)$", line.strip()):
                self.url = found[1]
                self.try_line = self._line_after("try")
                self.remember()
                return
        pytest.fail(f"the server did not become ready:\n{self.log.read_text()}")

    def _line_after(self, word: str) -> str:
        """The rest of that one of the ready lines."""
        for line in self.told:
            if found := re.match(rf" +{word} +(.+)", line):
                return found[1]
        pytest.fail(f"the server printed no line with '{word}'")

    def status(self) -> dict:
        """What the server says of itself, by way of its admin socket."""
        return AdminClient(RuntimeDir.open(self.runtime_dir)).status().model_dump()

    def remember(self) -> dict:
        """Note the processes that run now, so that `stop` can prove that they are gone."""
        status = self.status()
        pids = [status["pid"], status["forkserver_pid"]]
        pids += [one["pid"] for one in status["instances"]]
        pids += [pid for one in status["instances"] for pid in one["rank_pids"]]
        if owner := RuntimeDir.open(self.runtime_dir).owner("allocator"):
            pids.append(owner.pid)
        self.identities |= {known for pid in pids if pid and (known := ProcessIdentity.of(pid))}
        return status

    def wait_instances(self, wanted: Callable[[list[dict]], bool], what: str) -> list[dict]:
        def found() -> list[dict] | None:
            instances = self.remember()["instances"]
            return instances if wanted(instances) else None

        return wait_until(found, what)

    def onecopy(self, *arguments: str) -> Outcome:
        """A command for this server, from one thread at a time."""
        return onecopy_here(*arguments, "--runtime-dir", str(self.runtime_dir))

    def onecopy_process(self, *arguments: str) -> Outcome:
        """The same as a process of its own, beside others."""
        return onecopy(*arguments, "--runtime-dir", str(self.runtime_dir))

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        """`onecopy stop`, and nothing is left: no process, no segment, no socket."""
        outcome = self.onecopy("stop")
        assert outcome.status == 0, outcome.stderr
        self.process.wait(TIMEOUT_S)
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        wait_until(
            lambda: not any(one.is_alive() for one in self.identities), "the processes to end"
        )
        log = self.log.read_text()
        left = leftovers(self.runtime_dir)
        assert left == [], f"left behind: {left}\n{log}"
        assert "Traceback" not in log, log


def leftovers(runtime_dir: Path) -> list[str]:
    """Segments and files of a runtime directory."""
    prefix = RuntimeDir.open(runtime_dir).segment_prefix.lstrip("/")
    segments = [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]
    return segments + sorted(path.name for path in runtime_dir.iterdir())
