"""Processes that share modules, both ends: the programs that run there, and what commands them.

A nursery imports torch and the model libraries once and then forks a process for each one that a
test asks for, so that fresh ones cost nothing. It lets go of them: they become the tests' own
children, whose deaths the tests see. Run as `python -m tests.allocator.client.share.module_programs
FD`, which `Nursery` does.
"""

import contextlib
import copy
import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator import RuntimeDir, WeightSetWriter, connect
from allocator.client.share.module import SharedModule, share
from tests.allocator.client.share.sample_modules import HAS_DIFFUSERS, build, described, output
from tests.allocator.processes import Refused
from tests.daemon_process import ROOT, TIMEOUT_S
from tests.leaks import wait_until
from tests.remote import remote

# --- what runs in a process


class ModuleProgram:
    """What it can be told to do: one method each, over one module."""

    def __init__(self, runtime_dir: str):
        self.memory = connect(runtime_dir)
        self.kind = ""
        self.module: nn.Module = nn.Module()
        self.shared: SharedModule | None = None

    def build(self, kind: str, seed: int = 0, device: str = "cpu") -> None:
        self.kind = kind
        self.module = build(kind, seed, device)

    def share(
        self, key: str, fingerprint: dict[str, str] | None = None, timeout_s: float = 60.0
    ) -> bool:
        """Whether this process published."""
        self.shared = share(
            self.memory, self.module, key, fingerprint=fingerprint, timeout_s=timeout_s
        )
        return self.shared.loaded

    def stop_at_first_progress(self) -> None:
        """From now on this process stops itself in the middle of the next publishing."""
        self._signal_at_first_progress(signal.SIGSTOP)

    def interrupt_at_first_progress(self) -> None:
        """As Ctrl-C in the middle of the next publishing, also where the tests run in the
        background, and SIGINT is ignored from the start."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._signal_at_first_progress(signal.SIGINT)

    def _signal_at_first_progress(self, number: signal.Signals) -> None:
        report = WeightSetWriter.progress

        def signalling(writer: WeightSetWriter, num_bytes: int) -> None:
            WeightSetWriter.progress = report
            report(writer, num_bytes)
            signal.raise_signal(number)

        WeightSetWriter.progress = signalling

    def num_bytes(self) -> int:
        assert self.shared is not None
        return self.shared.num_bytes

    def output(self) -> str:
        return output(self.kind, self.module)

    def described(self) -> dict[str, Any]:
        return described(self.module)

    def in_segment(self) -> list[str]:
        """The names of all tensors whose bytes lie in a shared segment."""
        ranges = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "/dev/shm/onecopy-" in line:
                start, end = (int(number, 16) for number in line.split()[0].split("-"))
                ranges.append(range(start, end))
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return [
            name for name, t in tensors.items() if any(t.data_ptr() in bounds for bounds in ranges)
        ]

    def train(self) -> str:
        """One pass in training mode, which changes the buffers of a batch norm."""
        return output(self.kind, self.module.train())

    def write(self, name: str) -> None:
        """In place, into a tensor of the module."""
        dict(self.module.state_dict())[name].add_(1)

    def copy(self) -> tuple[str, str, list[str]]:
        """Outputs of a deep copy, before and after its parameters were written to, and what of the
        copy lies in a segment."""
        original = self.module
        self.module = copy.deepcopy(original)
        before = self.output()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.zero_()
        result = before, self.output(), self.in_segment()
        self.module = original
        return result

    def convert(self, dtype: str) -> None:
        self.module.to(getattr(torch, dtype))

    def release(self) -> None:
        assert self.shared is not None
        self.shared.release()
        self.shared.release()

    def drop(self) -> None:
        self.module = nn.Module()
        gc.collect()


def _obey(connection: socket.socket, runtime_dir: str) -> None:
    """Run commands until the other end closes."""
    program = ModuleProgram(runtime_dir)
    with connection.makefile("rw") as lines:
        print(json.dumps({"value": os.getpid()}), file=lines, flush=True)
        for line in lines:
            method, given, named = json.loads(line)
            try:
                answer = {"value": getattr(program, method)(*given, **named)}
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the test compares it
                answer = {"error": type(error).__name__, "message": str(error)}
            print(json.dumps(answer), file=lines, flush=True)
    program.memory.close()


def _start(connection: socket.socket, control: socket.socket, runtime_dir: str) -> None:
    """A process that is no child of ours: its parent ends at once."""
    if between := os.fork():
        os.waitpid(between, 0)
        return
    status = 1
    try:
        if os.fork() == 0:
            control.close()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _obey(connection, runtime_dir)
        status = 0
    except BaseException:  # noqa: BLE001 - nothing of the nursery may run in here
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    """The nursery: fork a process for each socket that comes, until there are no more."""
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for kind in ("llama", "t5", *(("unet", "autoencoder") if HAS_DIFFUSERS else ())):
        build(kind, device="meta")  # imports what it needs
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.send(b"ready")
    while True:
        runtime_dir, fds, _, _ = socket.recv_fds(control, 4096, 1)
        if not fds:
            return
        with socket.socket(fileno=fds[0]) as connection:
            _start(connection, control, runtime_dir.decode())
        control.send(b"started")


# --- what commands it


class ModuleProcess:
    """A `ModuleProgram` in a process of its own. As a context it is stopped at the end.

    `do` runs a method of it there and returns what that returned, or raises Refused; `begin` only
    has it run, and `receive` takes what it returns.
    """

    def __init__(self, connection: socket.socket, runtime_dir: RuntimeDir):
        self.runtime_dir = runtime_dir
        self._connection = connection
        self._text = b""
        self._ended = False
        self.do = remote(ModuleProgram, self._run)
        self.begin = remote(ModuleProgram, self._send)
        self.pid: int = self.receive()

    def _run(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        self._send(method, given, named)
        return self.receive()

    def _send(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        self._connection.sendall(json.dumps([method, given, named]).encode() + b"\n")

    def receive(self) -> Any:
        """The next answer. Raises Refused."""
        deadline = time.monotonic() + TIMEOUT_S
        while b"\n" not in self._text:
            left_s = max(0.0, deadline - time.monotonic())
            assert select.select([self._connection], [], [], left_s)[0], "no answer"
            piece = self._connection.recv(1 << 16)
            assert piece, "the process ended"
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["value"]

    def wait_stopped(self) -> None:
        """Until the process has stopped itself."""
        assert os.WIFSTOPPED(self._status(os.WUNTRACED))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended_by(self) -> int:
        """The signal that ended the process, or 0. Waits for its end."""
        status = self._status(0)
        self._ended = True
        self._connection.close()
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    def _status(self, options: int) -> int:
        """What changed, as waitpid(2) has it."""
        changed: list[int] = []

        def look() -> bool:
            pid, status = os.waitpid(self.pid, options | os.WNOHANG)
            changed.append(status)
            return pid != 0

        wait_until(look, f"process {self.pid} stops or ends", TIMEOUT_S)
        return changed[-1]

    def stop(self) -> None:
        """Let it close its session and end. Idempotent, also after `ended_by`."""
        if not self._ended:
            self._connection.shutdown(socket.SHUT_RDWR)
            self.signal(signal.SIGCONT)
            assert self.ended_by() == 0

    def __enter__(self) -> "ModuleProcess":
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


class Nursery:
    """The process that forks the others. As a context it ends at the end."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.allocator.client.share.module_programs",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )
        self._control.settimeout(4 * TIMEOUT_S)
        assert self._control.recv(16) == b"ready"

    def start(self, runtime_dir: RuntimeDir) -> ModuleProcess:
        """A fresh process, connected to the allocator of `runtime_dir`; a child of ours."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [str(runtime_dir.path).encode()], [theirs.fileno()])
        assert self._control.recv(16) == b"started"
        return ModuleProcess(ours, runtime_dir)

    @contextlib.contextmanager
    def processes(self, runtime_dir: RuntimeDir, number: int) -> Iterator[list[ModuleProcess]]:
        """Several at once."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self.start(runtime_dir)) for _ in range(number)]

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_error: object) -> None:
        self._control.close()
        assert self._process.wait(TIMEOUT_S) == 0


if __name__ == "__main__":
    main()
