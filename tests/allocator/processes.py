"""Client processes that tests command: spawned ones that talk, and forked ones that run a function.

Invariant: every wait is bounded, and every process is waited for.
"""

import faulthandler
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator import RuntimeDir
from tests.allocator.client.client_program import ClientProgram
from tests.daemon_process import ROOT, TIMEOUT_S
from tests.remote import remote


class Refused(Exception):
    """The error that a method of a client process raised."""

    def __init__(self, name: str, message: str):
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class ClientProcess:
    """A `ClientProgram` in a process of its own, connected. As a context it is stopped at the end.

    `do` runs a method of it there and returns what that returned, or raises Refused; `begin` only
    has it run, and `receive` takes what it returns.
    """

    program: type[ClientProgram] = ClientProgram
    module = "tests.allocator.client.client_program"

    def __init__(self, runtime_dir: RuntimeDir, **options: Any):
        """Options as `allocator.connect` takes them."""
        command = (sys.executable, "-m", self.module)
        self._process = subprocess.Popen(
            [*command, str(runtime_dir.path), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self._text = b""
        self.do = remote(self.program, self._run)
        self.begin = remote(self.program, self._send)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _run(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        self._send(method, given, named)
        return self.receive()

    def _send(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, given, named]).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """The next answer. Raises Refused."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + TIMEOUT_S
        while b"\n" not in self._text:
            readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"client {self.pid} did not answer within {TIMEOUT_S} s"
            piece = os.read(fd, 1 << 16)
            assert piece, f"client {self.pid} ended"
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["value"]

    def kill(self) -> None:
        """SIGKILL: its lifeline is closed by the kernel."""
        self._process.kill()
        self._finish()

    def pause(self) -> None:
        """SIGSTOP, until `resume`."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    @property
    def ended_by(self) -> int | None:
        """The signal that ended it, 0 where it ended by itself; None while it runs. Waits a while
        for one that is about to end."""
        try:
            return max(0, -self._process.wait(TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Let it close its session and end. Idempotent, also after `kill`."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._finish()

    def _finish(self) -> None:
        self._process.wait(TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> "ClientProcess":
        assert self.receive() == "connected"
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Forked:
    """How a forked child ended: `signal` that killed it or 0, and what its function returned."""

    signal: int
    text: str


def in_fork(function: Callable[[], str], *, uid: int | None = None) -> Forked:
    """Run `function` in a forked child (as another user, where `uid` is given)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            faulthandler.disable()  # a death by SIGSEGV may be what is wanted
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            try:
                text = function()
            except Exception as error:  # noqa: BLE001 - the parent compares it
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
        finally:
            os._exit(0)
    os.close(write)
    try:
        text = b""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            readable, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"the forked child hung for {TIMEOUT_S} s")
            if not (piece := os.read(read, 1 << 16)):
                break
            text += piece
    finally:
        os.close(read)
    _, status = os.waitpid(pid, 0)
    return Forked(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, text.decode())
