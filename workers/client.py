"""The server's side of the instances: start them, hear of their ends, exchange messages.

Owns the forkserver's process and the engine socket. Torch-free and asyncio. Invariants: a process
that was started here ends when this does; a message from a peer that is no instance of ours is
dropped. Knows nothing of which instance should do what.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from allocator import module_command, module_environment
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

log = logging.getLogger("onecopy.server")

_CONTROL_FRAME_BYTES: Final = 1 << 16
_CONTROL_BUFFER_BYTES: Final = 1 << 20
"""Room for a request to start each of 256 instances at once."""
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
    """The forkserver is gone, and all instances with it."""


class ForkserverBusy(Exception):
    """It has not read what it was asked before, and can't be asked for more now."""


class Forkserver:
    """The process that all instances are forked from."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket):
        self._process = process
        self._control = control

    @classmethod
    def launch(
        cls, model: str, dtype: str, metadata: Mapping[str, str] | None = None
    ) -> "Forkserver":
        """Start it for one model, or for the weight set with this `metadata`; its `Up` comes when
        its imports are done."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CONTROL_BUFFER_BYTES)
        with theirs, contextlib.ExitStack() as stack:
            descriptors = [theirs.fileno()]
            if metadata is not None:
                # In memory: the disk may be full, and this is small.
                file = stack.enter_context(open(os.memfd_create("metadata"), "w+b"))  # noqa: PTH123
                file.write(json.dumps(dict(metadata)).encode())
                file.seek(0)
                descriptors.append(file.fileno())
            first, *others = map(str, descriptors)
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                module_command("workers.forkserver", first, model, dtype, *others),
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env=module_environment(**_ENVIRONMENT),
            )
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def start(self, spec: InstanceSpec) -> None:
        """Ask for an instance; a `Started` follows. Raises ForkserverEnded, and ForkserverBusy
        where it was not asked."""
        try:
            self._control.send(encode(Start(spec=spec)))
        except BlockingIOError as error:
            raise ForkserverBusy from error
        except OSError as error:
            raise ForkserverEnded from error

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

    async def close(self) -> None:
        """End it, and with it every instance that still runs."""
        self._control.close()
        try:
            await asyncio.wait_for(asyncio.to_thread(self._process.wait), timeout=5)
        except TimeoutError:
            self._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)


class Engines:
    """The ROUTER socket that instances connect to, addressed by the instance's name."""

    def __init__(self, endpoint: str):
        self._path = Path(endpoint.removeprefix("ipc://"))
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(endpoint)

    async def receive(self) -> tuple[str, FromInstance]:
        """The next valid message, and the name of the instance it came from."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                identity, frame = frames
                return identity.decode(), decode_from_instance(frame)
            except (ValueError, msgspec.DecodeError) as error:
                log.warning("dropped a message on the engine socket: %s", error)

    async def send(self, name: str, message: ToInstance) -> bool:
        """False where no instance of this name is connected."""
        try:
            await self._socket.send_multipart([name.encode(), encode(message)])
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def close(self) -> None:
        """Close the socket and remove its name."""
        self._socket.close(0)
        self._context.term()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
