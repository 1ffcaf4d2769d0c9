"""The server's side of the instances: start them, hear of their ends, exchange messages.

Owns the forkserver's process and the engine socket. Torch-free and asyncio. Invariants: a process
that was started here ends when this does, however; an instance goes on where its forkserver ends;
nobody but our instances reaches the engine socket.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from allocator import ProcessState, RuntimeDir, module_command, module_environment
from workers.messages import (
    MAX_FRAME_BYTES,
    FromForkserver,
    FromInstance,
    InstanceSpec,
    Start,
    ToInstance,
    Up,
    decode_from_forkserver,
    decode_from_instance,
    encode,
)
from workers.process import linux
from workers.process.leash import Leash as Leash

log = logging.getLogger("onecopy.server")

_CONTROL_FRAME_BYTES: Final = 1 << 16
_CONTROL_BUFFER_BYTES: Final = 1 << 20
"""Room for a request to start each of 256 instances at once."""
_CLOSE_S: Final = 1.0
"""What a forkserver may take to end, before it is killed."""
_CONNECT_EVERY_MS: Final = 3
"""How often to look whether an instance listens: its start takes some tens of milliseconds."""
_ENVIRONMENT: Final[Mapping[str, str]] = {
    # Instances share the cores: a thread that waits at a barrier must sleep, not spin.
    "OMP_WAIT_POLICY": "PASSIVE",
    # numpy's own threads would exist before the fork, and torch does the work here.
    "OPENBLAS_NUM_THREADS": "1",
    # One malloc arena: per-thread ones keep freed scratch memory that nobody else can use.
    "MALLOC_ARENA_MAX": "1",
    # Large scratch tensors get mappings of their own, which go back to the kernel when freed.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    # oneDNN, and torch's layer above it, each keep what they made for the batch sizes they have
    # met, 1024 entries by default: an instance's heap was 200 MB after many prompt lengths. With 16
    # it stays at 32 MB, with 96 at 62 MB, at the same speed (docs/LOG.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class ForkserverEnded(Exception):
    """The forkserver is gone. Its instances go on."""


class ForkserverBusy(Exception):
    """It has not read what it was asked before, and can't be asked for more now."""


class Forkserver:
    """The process that all instances are forked from."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket, pipe: int):
        self._process = process
        self._control = control
        self._pipe = pipe

    @classmethod
    def launch(
        cls, model: str, dtype: str, metadata: Mapping[str, str] | None = None
    ) -> "Forkserver":
        """Start it for one model, or for the weight set with this `metadata`; its `Up` comes when
        its imports are done. Raises OSError."""
        linux.adopt_orphans()  # an instance that outlives its forkserver is ours to wait for
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CONTROL_BUFFER_BYTES)
        pipe_write = -1
        try:
            pipe_read, pipe_write = os.pipe()
            with theirs, contextlib.ExitStack() as stack:
                stack.callback(os.close, pipe_read)
                fds = [theirs.fileno(), pipe_read]
                arguments = [*map(str, fds), model, dtype]
                if metadata is not None:
                    # In memory: the disk may be full, and this is small.
                    memory = os.memfd_create("metadata")
                    file = stack.enter_context(open(memory, "w+b"))  # noqa: PTH123
                    file.write(json.dumps(dict(metadata)).encode())
                    file.seek(0)
                    fds.append(memory)
                    arguments.append(str(memory))
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    module_command("workers.process.forkserver", *arguments),
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    env=module_environment(**_ENVIRONMENT),
                )
        except OSError:
            ours.close()
            if pipe_write >= 0:
                os.close(pipe_write)
            raise
        return cls(process, ours, pipe_write)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def start(self, spec: InstanceSpec) -> Leash:
        """Ask for an instance; a `Started` follows. Raises ForkserverEnded, ForkserverBusy,
        OSError."""
        leash = Leash(spec.name)
        try:
            socket.send_fds(self._control, [encode(Start(spec=spec))], leash.descriptors)
        except BlockingIOError as error:
            leash.close()
            raise ForkserverBusy from error
        except OSError as error:
            leash.close()
            raise ForkserverEnded from error
        leash.handed_over()
        return leash

    async def receive(self) -> FromForkserver:
        """The next event. Raises ForkserverEnded."""
        loop = asyncio.get_running_loop()
        try:
            frame = await loop.sock_recv(self._control, _CONTROL_FRAME_BYTES)
        except OSError as error:
            raise ForkserverEnded from error
        if not frame:
            raise ForkserverEnded
        return decode_from_forkserver(frame)

    async def up(self) -> Up:
        """Wait for the imports. Raises ForkserverEnded."""
        event = await self.receive()
        if not isinstance(event, Up):
            raise ForkserverEnded
        return event

    def kill(self) -> None:
        """End it at once, whatever it does or can't do. Its instances go on."""
        self._process.kill()  # the pipe's end is no signal to one that was stopped as it began
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    async def close(self) -> int:
        """End it; in order, where it still reacts. Returns its exit status, or minus the signal's
        number. Idempotent."""
        self._control.close()
        state = ProcessState.of(self.pid)
        if state is not None and state.is_stopped:
            self.kill()
        try:
            status = await asyncio.wait_for(end_of(self._process), _CLOSE_S)
        except TimeoutError:
            self.kill()
            status = await end_of(self._process)
        self.kill()
        return status


async def end_of(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a child's end without holding a thread, which a cancellation could not free."""
    if process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            await readable(pidfd)
        finally:
            os.close(pidfd)
    return process.wait()


async def readable(fd: int) -> None:
    """Until there is something to read, or the end."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


class Engines:
    """The ROUTER socket that is connected to all instances, addressed by the instance's name.

    Nobody can connect to it: it is the instances that listen, each on a socket of its own, which
    takes connections from this process alone, by the kernel's word."""

    def __init__(self, runtime_dir: RuntimeDir):
        self._runtime_dir = runtime_dir
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _CONNECT_EVERY_MS)
        self._paths: dict[str, Path] = {}
        for path in runtime_dir.engines():
            path.unlink(missing_ok=True)  # of a server that was killed

    def expect(self, name: str) -> str:
        """Connect to an instance as soon as it listens. Returns the endpoint where it is to."""
        path = self._paths.get(name)
        if path is None:
            # Not to be guessed: whoever is there before the instance would be taken for it.
            path = self._runtime_dir.engine(f"{name}-{secrets.token_urlsafe(3)}")
            self._paths[name] = path
            self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, name.encode())
            self._socket.connect(f"ipc://{path}")
        return f"ipc://{path}"

    def forget(self, name: str) -> None:
        """The instance has ended."""
        path = self._paths.pop(name, None)
        if path is not None:
            self._socket.disconnect(f"ipc://{path}")
            path.unlink(missing_ok=True)

    async def receive(self) -> tuple[str, FromInstance | None]:
        """The name of an instance, and its next message; None where that can't be read."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                identity, *rest = frames
                name = identity.decode()
            except ValueError as error:
                log.warning("dropped a message of nobody: %s", error)
                continue
            try:
                (frame,) = rest
                return name, decode_from_instance(frame)
            except (ValueError, RecursionError, msgspec.DecodeError) as error:
                log.warning("a message of %r on the engine socket is not one: %s", name, error)
                return name, None

    async def send(self, name: str, message: ToInstance) -> bool:
        """False where no instance of this name is expected (any more)."""
        try:
            await self._socket.send_multipart([name.encode(), encode(message)])
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def close(self) -> None:
        """Close the socket and remove all names."""
        self._socket.close(0)
        self._context.term()
        for path in self._paths.values():
            path.unlink(missing_ok=True)
