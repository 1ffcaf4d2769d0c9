"""The warden: a small process that forks a cell for each task.

A cell is a child for input that may do anything to whoever reads it: a grammar, a large body. The
kernel bounds its computing time, memory and stack. Whatever the input does, nobody else notices.

Owns both sides' wire types, the forking and the bounds. Invariants: a cell never outlives the
warden, nor the warden whoever launched it; a cell's memory grows by no more than it was granted.
Does not know what a task is: that is in the module that the warden was launched for, which has

    prepare(setup)             before the first fork: imports, and what all cells need
    run(kind, options, fds)    in the cell

This file is run by its path and isolated (`python -I`), so that no file of the working folder is
imported in place of ours. A fork then takes a millisecond or two.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Protocol

import msgspec

MAX_FRAME_BYTES: Final = 1 << 16
OUT_OF_MEMORY: Final = 112
"""Exit status of a cell that had too little memory, where the interpreter noticed it."""
_MOST_FDS: Final = 2
_MAX_FILE_BYTES: Final = 64 << 20
"""The most that a cell may write to a file."""
_PR_SET_PDEATHSIG: Final = 1

Bound = Literal["time", "memory", "stack"]
_BOUNDS: Final[Mapping[int, Bound]] = {
    -signal.SIGPROF: "time",
    -signal.SIGSEGV: "stack",
    -signal.SIGBUS: "stack",
    -signal.SIGABRT: "memory",
    OUT_OF_MEMORY: "memory",
}


class Grant(msgspec.Struct, frozen=True):
    """What one cell may use. Memory is what it may grow by."""

    cpu_s: float
    memory_bytes: int
    stack_bytes: int
    nice: int = 0


class Task(msgspec.Struct, tag="task", frozen=True):
    """Fork a cell. Comes with its descriptors; an `Ended` follows."""

    id: int
    kind: str
    options: dict[str, Any]
    grant: Grant


class Kill(msgspec.Struct, tag="kill", frozen=True):
    """End a cell, if it has not ended."""

    id: int


class Ended(msgspec.Struct, frozen=True):
    """`status` is the exit status, or minus the signal's number; `cpu_s` what it computed."""

    id: int
    status: int
    cpu_s: float

    @property
    def exceeded(self) -> Bound | None:
        """Which bound it met, if that ended it."""
        return _BOUNDS.get(self.status)


class Tasks(Protocol):
    """The module that a warden is launched for."""

    def prepare(self, setup: Mapping[str, Any]) -> None:
        """Called once."""

    def run(self, kind: str, options: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Called in the cell, which ends afterwards. `MemoryError` may be raised."""


_to_warden: "msgspec.msgpack.Decoder[Task | Kill]" = msgspec.msgpack.Decoder(Task | Kill)
_from_warden: msgspec.msgpack.Decoder[Ended] = msgspec.msgpack.Decoder(Ended)


def launch(
    module: str, setup: Mapping[str, Any]
) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Start a warden for a module, by its dotted name. Returns at once; tasks wait until it is
    prepared. The socket is ours, not blocking; its close ends the warden."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own file, by a fixed command
            [
                *(sys.executable, "-I", __file__, str(theirs.fileno()), str(os.getpid())),
                *(module, json.dumps(setup)),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        )
    ours.setblocking(False)
    return process, ours


def send(control: socket.socket, message: Task | Kill, *fds: int) -> None:
    """Raises `OSError` where the warden is gone, or has not listened for long."""
    socket.send_fds(control, [msgspec.msgpack.encode(message)], fds)


def receive(control: socket.socket) -> Ended | None:
    """The next end of a cell; None where none is there yet. Raises `OSError` where the warden is
    gone, or somebody else speaks in its place: a cell has inherited its socket."""
    try:
        frame = control.recv(MAX_FRAME_BYTES)
    except BlockingIOError:
        return None
    if not frame:
        raise ConnectionResetError("the warden ended")
    try:
        return _from_warden.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConnectionResetError(f"the warden said what is no end of a cell: {error}") from error


# --- the warden's process


def main() -> None:
    """Serve until the other end of the socket closes. Arguments as `launch` gives them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who launched us decides when to stop
    _die_with_parent(int(sys.argv[2]))
    # Last: where the package is installed, it is found there.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    tasks: Tasks = importlib.import_module(sys.argv[3])
    tasks.prepare(json.loads(sys.argv[4]))
    # Objects that stay leave the collector's lists: a collection in a cell copies no page of them.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        _Warden(control, tasks).run()


class _Warden:
    def __init__(self, control: socket.socket, tasks: Tasks):
        self._control = control
        self._tasks = tasks
        self._ids: dict[int, int] = {}
        """Process → task."""
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake_read in ready:
                    self._wake_read.recv(4096)
                    self._reap()
                if self._control in ready and not self._receive():
                    break
        # What is closed at the end must not be written to for a child that ends meanwhile.
        signal.set_wakeup_fd(-1)
        for pid in self._ids:
            os.kill(pid, signal.SIGKILL)

    def _receive(self) -> bool:
        """False where whoever launched us is gone."""
        try:
            frame, fds, _, _ = socket.recv_fds(self._control, MAX_FRAME_BYTES, _MOST_FDS)
        except ConnectionResetError:
            return False
        if not frame:
            return False
        try:
            match _to_warden.decode(frame):
                case Task() as task:
                    self._fork(task, fds)
                case Kill(id=task_id):
                    for pid, known in self._ids.items():
                        if known == task_id:
                            os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is still this one
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, task: Task, fds: Sequence[int]) -> None:
        own_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            self._tell(Ended(task.id, -signal.SIGKILL, 0.0))  # as if it had been lost
            return
        if pid == 0:
            _become_cell(own_pid, self._tasks, task, fds)
        self._ids[pid] = task.id

    def _reap(self) -> None:
        while self._ids:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            cpu_s = usage.ru_utime + usage.ru_stime
            self._tell(Ended(self._ids.pop(pid), os.waitstatus_to_exitcode(status), cpu_s))

    def _tell(self, ended: Ended) -> None:
        try:
            self._control.send(msgspec.msgpack.encode(ended))
        except (BrokenPipeError, ConnectionResetError):
            return  # whoever launched us is gone; the loop sees it next


def _become_cell(warden_pid: int, tasks: Tasks, task: Task, fds: Sequence[int]) -> NoReturn:
    """Bound this process, do the task, end. Never returns."""
    status = 1
    try:
        _die_with_parent(warden_pid)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        errors = os.dup(2)
        # What a library prints when it gives up would fill the log of whoever launched us.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        _bound(task.grant)
        tasks.run(task.kind, task.options, fds)
        status = 0
    except MemoryError:
        status = OUT_OF_MEMORY
    except BaseException:  # noqa: BLE001 - an error of ours, for the log
        os.write(errors, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(status)


def _bound(grant: Grant) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for limit, value in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + grant.memory_bytes),
        (resource.RLIMIT_STACK, grant.stack_bytes),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(
            limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard)
        )
    os.nice(grant.nice)
    # Unlike RLIMIT_CPU it knows parts of a second; by default its signal ends the process.
    signal.setitimer(signal.ITIMER_PROF, grant.cpu_s)


def _die_with_parent(parent_pid: int) -> None:
    """As `workers.process.linux`, which is not imported yet."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


if __name__ == "__main__":
    main()
