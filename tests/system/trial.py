"""A model's folder, tried out as `onecopy serve` would, at a fraction of the time: what the server
reads, in a fork of a process that has imported the server; what an instance does, in a real one,
that a real forkserver forks beside a real allocator.

Owns the processes. Invariant: each trial is bounded in time, and what it took is measured.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from allocator import RuntimeDir
from tests.daemon_process import ROOT, DaemonProcess
from workers import checked
from workers.client import Engines, Forkserver
from workers.messages import Exited, InstanceSpec, Ready, Started, StartFailed

DEADLINE_S = 120.0
"""However slow the machine: what takes that long hangs."""
_LOOK_S = 0.005


@dataclass(frozen=True)
class Outcome:
    """What became of a folder."""

    where: str
    """"server" or "instance": who refused it; "" if nobody did."""
    message: str
    seconds: float
    """Of the processor's time, the instance's or the server's, whichever took longer."""
    peak_bytes: int
    """The most that either had in memory, whatever it shared."""
    problem: str = ""
    """What must not be: a hang, a signal, a traceback."""


class Trials:
    """Ready to try one folder after the other. As a context it ends its processes."""

    def __init__(self, dtype: str = "auto", like: Path = Path("/nowhere")) -> None:
        """What a model `like` this one needs is imported once."""
        self._dtype = dtype
        self._like = like
        self._folder = Path(tempfile.mkdtemp(prefix="onecopy-trial-"))
        self.runtime_dir = RuntimeDir.open(self._folder)
        self._images = Path(tempfile.mkdtemp(prefix="onecopy-images-"))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed at the end
        self._num_tried = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._daemon = DaemonProcess(
                self.runtime_dir, "--quiet", "--image-dir", str(self._images)
            )
            stack.callback(self._daemon.stop)
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.system.server_part"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            stack.callback(self._end_server)
            self._loop = asyncio.new_event_loop()
            stack.callback(self._loop.close)
            self._loop.run_until_complete(self._start())
            stack.callback(lambda: self._loop.run_until_complete(self._end()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()
        self._log.close()
        self._images.rmdir() if not any(self._images.iterdir()) else None
        self._folder.rmdir()

    async def _start(self) -> None:
        self._engines = Engines(self.runtime_dir)
        own = os.dup(2)
        os.dup2(self._log.fileno(), 2)  # what instances log is looked through
        try:
            self._forkserver = Forkserver.launch(str(self._like), "auto")
        finally:
            os.dup2(own, 2)
            os.close(own)
        await self._forkserver.up()

    async def _end(self) -> None:
        await self._forkserver.close()
        self._engines.close()

    def _end_server(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(DEADLINE_S)

    def run(self, model: Path, *, server_part: bool = True) -> Outcome:
        """As `onecopy serve MODEL`, as far as the first token; without `server_part` only what an
        instance does."""
        of_server = self._server_part(model) if server_part else Outcome("", "", 0.0, 0)
        if of_server.message or of_server.problem:
            return of_server
        return self._loop.run_until_complete(self._instance_part(model, of_server))

    def _server_part(self, model: Path) -> Outcome:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(os.fspath(model)), file=self._server.stdin, flush=True)
        told = json.loads(self._server.stdout.readline())
        return Outcome(
            "server" if told["message"] else "",
            told["message"],
            told["seconds"],
            told["peak_bytes"],
            told["problem"],
        )

    async def _instance_part(self, model: Path, before: Outcome) -> Outcome:
        self._num_tried += 1
        name = f"t{self._num_tried}"
        leash = self._forkserver.start(
            InstanceSpec(
                name=name,
                runtime_dir=str(self.runtime_dir.path),
                engines=self._engines.expect(name),
                server_pid=os.getpid(),
                model=str(model),
                served_model_name="trial",
                requested_at=time.monotonic(),
                settings=checked(
                    {
                        "dtype": self._dtype,
                        "max_num_seqs": 2,
                        "max_num_batched_tokens": 64,
                        "threads": 1,
                    }
                ),
                num_threads=1,
            )
        )
        started = await self._forkserver.receive()
        assert isinstance(started, Started)
        exited = asyncio.ensure_future(self._forkserver.receive())
        told = asyncio.ensure_future(self._told(name))
        deadline, peak, seconds = time.monotonic() + DEADLINE_S, before.peak_bytes, before.seconds
        problem = ""
        while not (told.done() or exited.done()):
            await asyncio.wait([told, exited], timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            peak = max(peak, peak_bytes(started.pid))
            seconds = max(seconds, processor_s(started.pid))
            if time.monotonic() > deadline:
                problem = f"nothing heard within {DEADLINE_S:.0f} s"
                break
        if not told.done():  # what it said last may come behind its end
            await asyncio.wait([told], timeout=DEADLINE_S)
        message = told.result() if told.done() else ""
        told.cancel()
        if not exited.done() and not (message and message != "ready"):
            os.kill(started.pid, 9)
        event = await exited
        leash.close()
        self._engines.forget(name)
        assert isinstance(event, Exited)
        if not told.done() or told.cancelled():
            problem = problem or f"it ended with status {event.status} and said nothing"
        log = self._logged()
        if "Traceback" in log:
            problem = problem or log[-2000:]
        ready = message == "ready"
        return Outcome(
            "" if ready else "instance", "" if ready else message, seconds, peak, problem
        )

    def _logged(self) -> str:
        """What the processes have logged since it was last asked."""
        self._log.seek(0)
        text = self._log.read()
        self._log.seek(0)
        self._log.truncate()
        return text

    async def _told(self, name: str) -> str:
        """What the instance says of itself at last."""
        while True:
            sender, message = await self._engines.receive()
            if sender != name:
                continue
            if isinstance(message, Ready):
                return "ready"
            if isinstance(message, StartFailed):
                return f"{message.code}: {message.message}"


def peak_bytes(pid: int) -> int:
    """The most that a process ever had in memory."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def processor_s(pid: int) -> float:
    """What a process has computed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
