"""A program of ours in forks of a process that has imported it: hundreds of tests start one, and
most of what a start takes is imports.

Owns the process that waits, warm, and how what it forks comes to be a child of whoever asked: who
asks adopts orphans (`tests.leaks.adopt_orphans`). Invariant: but for its imports each is a process
of its own, with the environment, the folder and the descriptors of whoever asked.
"""

import gc
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

_FIXED = ("LD_", "GLIBC_", "MALLOC_", "PYTHON", "OMP_")
"""Variables that count when an interpreter starts, and not later."""
_LIMITS = [
    limit
    for name in dir(resource)
    if name.startswith("RLIMIT_") and (limit := getattr(resource, name)) is not None
]
_MAX_BYTES = 1 << 18


class Started:
    """One of them; to who started it what a `subprocess.Popen` is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._ended(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises TimeoutExpired."""
        if self.poll() is None and timeout is not None:
            descriptor = os.pidfd_open(self.pid)
            try:
                if not select.select([descriptor], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout)
            finally:
                os.close(descriptor)
        status = self._ended(0)
        assert status is not None
        return status

    def _ended(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # somebody has taken it, as of any adopted child
                self.returncode = 0
            else:
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that has imported `module`, whose `main` is the program, and `also` what that
    imports late. As a context it ends."""

    def __init__(
        self, module: str, also: Sequence[str] = (), environment: Mapping[str, str] = os.environ
    ) -> None:
        self._environment = _fixed(environment)
        self._limits = [resource.getrlimit(limit) for limit in _LIMITS]
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(other.fileno()), module, *also],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        assert self._socket.recv(_MAX_BYTES), "it can't be imported"

    def starts_the_same(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Whether what would be started now would differ in nothing but the time for imports."""
        limits = [resource.getrlimit(limit) for limit in _LIMITS]
        return _fixed(environment) == self._environment and limits == self._limits

    def start(
        self,
        *arguments: str,
        cwd: str,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] = os.environ,
        output: tuple[int, int] = (1, 2),
    ) -> Started:
        """The program with these arguments, reading nothing, writing to `output`."""
        told = {
            "arguments": arguments,
            "environment": dict(environment),
            "cwd": cwd,
            "descriptors": [1, 2, *pass_fds],
        }
        socket.send_fds(self._socket, [json.dumps(told).encode()], [*output, *pass_fds])
        answer = self._socket.recv(_MAX_BYTES)
        assert answer, "what is to start processes has ended"
        return Started(int(answer))

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()
        self._process.wait()


def _fixed(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_FIXED)}


def _told(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    frame, descriptors, _, _ = socket.recv_fds(control, _MAX_BYTES, 16)
    return (json.loads(frame), descriptors) if frame else None


def serve(control: socket.socket, module: str, *also: str) -> Callable[[], int]:
    """Returns in each process that was asked for, with what it is to do; and at the end."""
    program = import_module(module)
    for one in also:
        import_module(one)
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while told := _told(control):
        said, descriptors = told
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            if pid := os.fork():
                os.write(write, str(pid).encode())
                os._exit(0)
            os.close(read)
            os.close(write)
            _become(said, descriptors, control)
            return program.main  # type: ignore[no-any-return]
        os.close(write)
        pid_of_it = os.read(read, _MAX_BYTES)
        os.close(read)
        os.waitpid(between, 0)
        control.send(pid_of_it)  # only now it is a child of who asked
        for descriptor in descriptors:
            os.close(descriptor)
    return lambda: 0


def _become(said: dict[str, Any], descriptors: list[int], control: socket.socket) -> None:
    control.close()
    wanted = said["descriptors"]
    above = max([*wanted, *descriptors]) + 1
    kept = [os.dup2(one, above + at) for at, one in enumerate(descriptors)]
    for one in descriptors:
        os.close(one)
    for one, number in zip(kept, wanted, strict=True):
        os.dup2(one, number)
        os.close(one)
    random.seed()
    os.chdir(said["cwd"])
    os.environ.clear()
    os.environ.update(said["environment"])
    sys.argv = [sys.argv[2], *said["arguments"]]


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as opened:
        begin = serve(opened, *sys.argv[2:])
    sys.exit(begin())
