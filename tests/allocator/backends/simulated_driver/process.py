"""A process on the simulated driver, told over a socket what to do: both its ends.

Owns the process and the descriptors that come back from it. It can be the allocator's side or a
client's, with the very code that those run. Invariant: every wait is bounded.
"""

import ctypes
import gc
import hashlib
import json
import os
import random
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from allocator.backends import device_fault, for_handle, open_device
from allocator.backends.cuda import CUDABackend
from allocator.backends.cuda_driver import current, load
from allocator.backends.cuda_memory import CUDAMapping, CUDAPoolWindow
from allocator.backends.nvml import device_usage, device_usages
from allocator.messages import Extent, Handle
from tests.allocator.backends.backend_peer import Died, Peer, PeerProgram, encoded
from tests.allocator.processes import Refused, in_fork
from tests.daemon_process import ROOT, TIMEOUT_S
from tests.remote import remote
from tests.warm import Warm

COUNTS = ("handles", "ranges", "mappings", "pinned", "streams", "contexts", "pending", "faults")


def imported(variables: Mapping[str, str]) -> Warm:
    """To start processes with the library that they find in this environment."""
    return Warm(__name__, ("cuda.bindings.driver",), variables)


class Process(Peer):
    """The parent's end. As a context it is stopped at the end."""

    def __init__(self, variables: Mapping[str, str], warm: Warm) -> None:
        """`warm` has imported this program, in an environment with the same library."""
        assert warm.starts_the_same(variables)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(TIMEOUT_S)
        with theirs:
            self._process = warm.start(
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                cwd=str(ROOT),
                environment=variables,
            )

    @property
    def do(self) -> "SimulatedProgram":
        return self.given(None)

    def given(self, descriptor: int | None) -> "SimulatedProgram":
        """As `do`; the descriptor goes along."""
        return remote(SimulatedProgram, partial(self._run, descriptor))

    def _run(
        self,
        descriptor: int | None,
        method: str,
        given: Sequence[Any],
        named: Mapping[str, Any],
    ) -> Any:
        value, _ = self._answer(descriptor, method, given, named)
        return value

    def export(self, segment: str, extent: Extent | None = None) -> int:
        """What the allocator's side exports, the caller's to close."""
        place = () if extent is None else (extent.offset, extent.num_bytes)
        _, descriptors = self._answer(None, "export", (segment, *place), {})
        (descriptor,) = descriptors
        return descriptor

    def counts(self) -> dict[str, int]:
        """What the simulated driver counts in this process."""
        return dict(zip(COUNTS, self.do.counts(), strict=True))

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self.stop()

    def _answer(
        self,
        descriptor: int | None,
        method: str,
        given: Sequence[Any],
        named: Mapping[str, Any],
    ) -> tuple[Any, list[int]]:
        request = json.dumps([method, given, named], default=encoded).encode()
        socket.send_fds(self._socket, [request], [] if descriptor is None else [descriptor])
        try:
            reply, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        except ConnectionResetError:
            reply, descriptors = b"", []
        if not reply:
            raise Died(max(0, -self._process.wait(TIMEOUT_S)))
        answer = json.loads(reply)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["value"], descriptors


def peek_address(memory: Any, offset: int, num_bytes: int) -> bytes:
    """A simulated device address is an address of the process."""
    return ctypes.string_at(memory.address + offset, num_bytes)


def poke_address(memory: Any, offset: int, data: bytes) -> None:
    """The same, to write."""
    ctypes.memmove(memory.address + offset, data, len(data))


def content(num_bytes: int, seed: int) -> bytes:
    """Bytes that tell their place."""
    return random.Random(seed).randbytes(num_bytes)


class SimulatedProgram(PeerProgram):
    """The child's end: one method a command. Of clients those of `PeerProgram`, too."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: CUDABackend | None = None
        self.view: object = None

    @property
    def owned(self) -> CUDABackend:
        assert self.backend is not None
        return self.backend

    # --- the allocator's side

    def own(self, device: str) -> list[Any]:
        opened = open_device(device)
        assert isinstance(opened, CUDABackend)
        self.backend = opened
        return [opened.device, opened.granularity, opened.limit_bytes()]

    def reserve(self, segment: str, num_bytes: int) -> None:
        self.owned.reserve(segment, num_bytes)

    def free(self, segment: str) -> None:
        self.owned.free(segment)

    def reserve_pool(self, pool: str, num_bytes: int) -> None:
        self.owned.reserve_pool(pool, num_bytes)

    def reserve_extent(self, pool: str, offset: int, num_bytes: int) -> None:
        self.owned.reserve_extent(pool, Extent(offset=offset, num_bytes=num_bytes))

    def free_extent(self, pool: str, offset: int, num_bytes: int) -> None:
        self.owned.free_extent(pool, Extent(offset=offset, num_bytes=num_bytes))

    def committed_bytes(self, segment: str) -> int:
        return self.owned.committed_bytes(segment)

    def export(self, segment: str, offset: int = -1, num_bytes: int = 0) -> None:
        extent = None if offset < 0 else Extent(offset=offset, num_bytes=num_bytes)
        self.exported = self.owned.export(segment, extent)

    # --- a client's side

    def peek(self, offset: int, num_bytes: int) -> str:
        return peek_address(self.memory, offset, num_bytes).hex()

    def poke(self, offset: int, data: str) -> None:
        poke_address(self.memory, offset, bytes.fromhex(data))

    def fill(self, num_bytes: int, seed: int, piece_bytes: int, num_threads: int) -> None:
        """Write `content` to the mapping, in pieces, by several threads at once."""
        assert isinstance(self.mapping, CUDAMapping)
        mapping, data = self.mapping, memoryview(content(num_bytes, seed))
        starts = list(range(0, num_bytes, piece_bytes))

        def write(first: int) -> None:
            for start in starts[first::num_threads]:
                mapping.write(start, data[start : start + piece_bytes])

        threads = [threading.Thread(target=write, args=(i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def digest(self, offset: int, num_bytes: int) -> str:
        assert isinstance(self.mapping, CUDAMapping)
        out = bytearray(num_bytes)
        self.mapping.read(offset, memoryview(out))
        return hashlib.sha256(out).hexdigest()

    def ordinal(self) -> int:
        assert isinstance(self.memory, CUDAMapping | CUDAPoolWindow)
        return self.memory.__dlpack_device__()[1]

    def close_keeping_a_view(self) -> None:
        """Close the mapping while something like a tensor still refers to its addresses."""
        assert isinstance(self.mapping, CUDAMapping)
        self.view = self.mapping._opened()
        self.close()

    def forget(self) -> None:
        """Drop the mapping or window without closing it."""
        self.mapping = self.window = None
        gc.collect()

    def write_as_a_kernel_would(self, offset: int) -> list[str]:
        """Behind the mapping's back. How the driver takes it, and the next call."""
        assert isinstance(self.memory, CUDAMapping | CUDAPoolWindow)
        with current(self.ordinal()) as driver:
            first = driver.cuMemcpyHtoD(self.memory.address + offset, b"bad", 3)[0]
            return [first.name, driver.cuCtxSynchronize()[0].name]

    def begin_copy(self, offset: int) -> None:
        """Work for the device that it has not done yet when this returns."""
        assert isinstance(self.memory, CUDAMapping | CUDAPoolWindow)
        with current(self.ordinal()) as driver:
            _, stream = driver.cuStreamCreate(1)
            _, pinned = driver.cuMemHostAlloc(4096, 0)
            ctypes.memmove(int(pinned), b"late", 4)
            address = self.memory.address + offset
            assert driver.cuMemcpyHtoDAsync(address, pinned, 4, stream)[0].value == 0

    def is_well(self) -> bool:
        """Whether the context still takes calls."""
        with current(0) as driver:
            return bool(driver.cuCtxSynchronize()[0].value == 0)

    def fault(self, device: str) -> str | None:
        """Why this process can't use the device any more, if so."""
        return device_fault(device)

    def context_of_thread(self) -> int:
        """What is current between our calls; 0 is none."""
        return int(load().cuCtxGetCurrent()[1])

    def child_after_fork(self, device: str) -> str:
        """What a forked child that drops what it inherited gets when it asks for the device."""

        def ask() -> str:
            failed: list[str] = []
            sys.unraisablehook = lambda lost: failed.append(str(lost.exc_value))
            self.forget()
            if failed:  # a finalizer touched what is the parent's
                return failed[0]
            return open_device(device).device

        return in_fork(ask).text

    def tensor_keeps_the_range(self, num_bytes: int) -> list[Any]:
        """Counts with a tensor over the closed mapping, what it reads, and counts without it."""
        from torch.utils.dlpack import from_dlpack

        from allocator.backends import dlpack

        mapping = self.mapping
        assert isinstance(mapping, CUDAMapping)
        owner = mapping._opened()
        tensor = from_dlpack(dlpack.capsule(mapping.address, num_bytes, (dlpack.CPU, 0), owner))[
            1:4
        ]
        del owner
        mapping.close()
        self.mapping = mapping = None
        gc.collect()
        with_it, seen = self.counts(), bytes(tensor.numpy()).hex()
        del tensor
        return [with_it, seen, self.counts()]

    # --- either side

    def counts(self) -> list[int]:
        found = (ctypes.c_int * len(COUNTS))()
        ctypes.CDLL("libcuda.so.1").simulated_counts(found)
        return list(found)

    def num_descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def devices(self) -> list[str]:
        return [open_device(f"cuda:{i}").device for i in range(load().cuDeviceGetCount()[1])]

    def usage(self, device: str) -> dict[str, Any]:
        """What the driver says of the device's memory."""
        return asdict(device_usage(device))

    def usages(self) -> list[dict[str, Any]]:
        """The same of all devices."""
        return [asdict(usage) for usage in device_usages()]

    def free_bytes(self) -> int:
        """Of the first device, as a process with a context is told."""
        with current(0) as driver:
            return int(driver.cuMemGetInfo()[1])

    def open_named(self, device: str) -> str:
        handle = Handle(backend="cuda", device=device, segment="s", num_bytes=1, generation=1)
        return for_handle(handle).device


def main() -> int:
    """Obey until the other end closes."""
    SimulatedProgram().obey(int(sys.argv[1]))
    return 0
