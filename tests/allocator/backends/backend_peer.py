"""A further process that maps a backend's memory, told what to do over a socket: both its ends.

Owns the process. Invariants: every wait is bounded, and every process is waited for; a death is an
exception of its own, since some tests want one.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from allocator.backends import Mapping, PoolWindow, for_handle
from allocator.backends.cuda_driver import call, current
from allocator.backends.cuda_memory import CUDAMapping, CUDAPoolWindow
from allocator.messages import Extent, Handle, encode
from tests.allocator.backends.obedient import Obedient
from tests.allocator.processes import Refused
from tests.daemon_process import ROOT, TIMEOUT_S
from tests.remote import remote
from tests.warm import Started


class Died(Exception):
    """The peer ended in the middle of a command, by this signal, or 0."""

    def __init__(self, signal: int):
        super().__init__(f"the peer died of signal {signal}")
        self.signal = signal


def peek(memory: Mapping | PoolWindow, offset: int, num_bytes: int) -> bytes:
    """These bytes, through addresses."""
    if isinstance(memory, CUDAMapping | CUDAPoolWindow):
        out = bytearray(num_bytes)
        with current(memory.__dlpack_device__()[1]) as driver:
            call(driver.cuMemcpyDtoH, out, memory.address + offset, num_bytes)
        return bytes(out)
    return bytes(memory.buffer[offset : offset + num_bytes])


def poke(memory: Mapping | PoolWindow, offset: int, data: bytes) -> None:
    """Write through addresses. On a GPU by its own copies, which need no torch, whose import would
    take most of a test's time."""
    if isinstance(memory, CUDAMapping | CUDAPoolWindow):
        with current(memory.__dlpack_device__()[1]) as driver:
            call(driver.cuMemcpyHtoD, memory.address + offset, data, len(data))
            call(driver.cuCtxSynchronize)  # it may return before the device has it, or refuses it
        return
    memory.buffer[offset : offset + len(data)] = data


class Peer:
    """The process, as tests see it: `do` runs a method of its program there and returns what that
    returned, or raises Refused or Died. As a context it is stopped at the end."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(TIMEOUT_S)
        with theirs:
            self._process: subprocess.Popen[bytes] | Started = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.allocator.backends.backend_peer",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )

    @property
    def do(self) -> "PeerProgram":
        return self.given(None)

    def given(self, descriptor: int | None) -> "PeerProgram":
        """As `do`; the descriptor goes along."""
        return remote(PeerProgram, partial(self._run, descriptor))

    def _run(
        self,
        descriptor: int | None,
        method: str,
        given: Sequence[Any],
        named: dict[str, Any],
    ) -> Any:
        request = json.dumps([method, given, named], default=encoded).encode()
        socket.send_fds(self._socket, [request], [] if descriptor is None else [descriptor])
        try:
            reply = self._socket.recv(1 << 20)
        except ConnectionResetError:
            reply = b""
        if not reply:
            raise Died(max(0, -self._process.wait(TIMEOUT_S)))
        answer = json.loads(reply)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["value"]

    def peek(self, offset: int, num_bytes: int) -> bytes:
        """These bytes, as the peer sees them."""
        return bytes.fromhex(self.do.peek(offset, num_bytes))

    def poke(self, offset: int, data: bytes) -> None:
        """Let the peer write them."""
        self.do.poke(offset, data)

    def stop(self) -> None:
        """Its socket's end ends it. Idempotent."""
        self._socket.close()
        try:
            self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(TIMEOUT_S)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


def encoded(value: Any) -> str:
    """Handles and bytes, for JSON."""
    return (encode(value) if isinstance(value, Handle) else value).hex()


class PeerProgram(Obedient):
    """What it can be told to do: one method each, over one mapping or one window at a time."""

    def __init__(self) -> None:
        self.mapping: Mapping | None = None
        self.window: PoolWindow | None = None

    @property
    def memory(self) -> Mapping | PoolWindow:
        memory = self.mapping or self.window
        assert memory is not None
        return memory

    def map(self, handle: str, writable: bool) -> None:
        named = msgspec.msgpack.decode(bytes.fromhex(handle), type=Handle)
        self.mapping = for_handle(named).map(named, writable=writable, descriptor=self.descriptor)

    def open_pool(self, handle: str) -> None:
        named = msgspec.msgpack.decode(bytes.fromhex(handle), type=Handle)
        self.window = for_handle(named).open_pool(named)

    def map_extent(self, offset: int, num_bytes: int, writable: bool) -> None:
        assert self.window is not None
        extent = Extent(offset=offset, num_bytes=num_bytes)
        self.window.map(extent, writable=writable, descriptor=self.descriptor)

    def unmap_extent(self, offset: int, num_bytes: int, discard: bool) -> None:
        assert self.window is not None
        self.window.unmap(Extent(offset=offset, num_bytes=num_bytes), discard=discard)

    def peek(self, offset: int, num_bytes: int) -> str:
        return peek(self.memory, offset, num_bytes).hex()

    def poke(self, offset: int, data: str) -> None:
        poke(self.memory, offset, bytes.fromhex(data))

    def read(self, offset: int, num_bytes: int) -> str:
        assert self.mapping is not None
        out = bytearray(num_bytes)
        self.mapping.read(offset, memoryview(out))
        return out.hex()

    def write(self, offset: int, data: str) -> None:
        assert self.mapping is not None
        self.mapping.write(offset, bytes.fromhex(data))

    def close(self) -> None:
        self.memory.close()
        self.mapping = self.window = None


if __name__ == "__main__":
    PeerProgram().obey(int(sys.argv[1]))
