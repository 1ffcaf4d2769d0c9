"""A client of a device whose memory the processor can't address: both its ends.

`tests.allocator.client.client_program` writes and reads through addresses; here that goes by the
mapping's own `write` and `read`, or by tensors where torch can reach the device.
"""

import ctypes
import hashlib
import json
import subprocess
import sys
from typing import Any

from allocator import Mapping, RuntimeDir, device_fault
from allocator.backends.cuda_driver import call, current, find
from allocator.messages import PutBlocks
from tests.allocator.client import client_program
from tests.allocator.client.client_program import MANIFEST_BYTES
from tests.allocator.processes import ClientProcess
from tests.daemon_process import ROOT
from tests.remote import remote


class DeviceClient(ClientProcess):
    """The process, as tests see it; it runs a `DeviceProgram`."""

    do: "DeviceProgram"
    begin: "DeviceProgram"

    def __init__(
        self, runtime_dir: RuntimeDir, environment: dict[str, str] | None = None, **options: str
    ):
        """Options as `allocator.connect` takes them."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(runtime_dir.path), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
        )
        self._text = b""
        self.do = remote(DeviceProgram, self._run)
        self.begin = remote(DeviceProgram, self._send)


class DeviceProgram(client_program.ClientProgram):
    """One method a command."""

    def __init__(self, runtime_dir: str, options: dict[str, str]):
        super().__init__(runtime_dir, options)
        self.mapping: Mapping | None = None
        self.tensor: Any = None

    # --- weight sets

    def reserve(self, num_bytes: int) -> str:
        """The segment's name."""
        assert self.writer is not None
        self.mapping = self.writer.reserve_uncommitted(num_bytes + MANIFEST_BYTES)
        self.num_bytes = num_bytes
        assert self.writer._handle is not None
        return self.writer._handle.segment

    def fill(self, value: int) -> None:
        assert self.mapping is not None
        self.mapping.write(0, bytes([value]) * self.num_bytes)

    def seal(self) -> None:
        self.mapping = None
        super().seal()

    def digest(self) -> str:
        """Of the tensor's bytes, as `read` gives them."""
        assert self.reader is not None
        out = bytearray(self.reader.manifest.tensors["x"].num_bytes)
        self.reader._mappings[0].read(0, memoryview(out))
        return hashlib.sha256(out).hexdigest()

    def load_as_elected(self, num_bytes: int, value: int) -> None:
        """What is left of `load` once it is known who writes."""
        self.reserve(num_bytes)
        self.fill(value)
        self.seal()

    def device(self) -> str:
        return self.memory.device

    def make_context(self) -> None:
        """What this process will need of its GPU in any case."""
        with current(find(self.memory.device).ordinal) as driver:
            call(driver.cuCtxSynchronize)

    def fault(self) -> str | None:
        """Why this process can't use its GPU any more, if so."""
        return device_fault(self.memory.device)

    # --- on the simulated driver

    def put_unwritten(self, blocks: list[tuple[str, int]]) -> int:
        """Put blocks that the device is still to write; how much it had to do when the allocator
        was asked to let others read them."""
        ordinal = find(self.memory.device).ordinal
        with current(ordinal) as driver:
            stream = call(driver.cuStreamCreate, 1)
            pinned = int(call(driver.cuMemHostAlloc, 4096, 0))
            for _, offset in blocks:
                address = self.memory._pool._current.window.address + offset
                call(driver.cuMemcpyHtoDAsync, address, pinned, 4096, stream)
        seen = []
        request = self.memory._connection.request

        def watched(message: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(message, PutBlocks):
                counts = (ctypes.c_int * 8)()
                ctypes.CDLL("libcuda.so.1").simulated_counts(counts)
                seen.append(counts[6])
            return request(message, *arguments, **options)

        self.memory._connection.request = watched  # type: ignore[method-assign]
        self.put(blocks)
        return max(seen)

    def unmap_behind(self, offset: int) -> None:
        """As nobody should: what the library still takes for mapped is so no more."""
        lease = self.leases[offset]
        with current(find(self.memory.device).ordinal) as driver:
            address = lease._mapped.window.address + offset
            call(driver.cuMemUnmap, address, lease.extent.num_bytes)

    # --- with tensors

    def take_tensor(self) -> list[Any]:
        """Keep the set's tensor: its device, dtype and number of bytes."""
        assert self.reader is not None
        self.tensor = self.reader.tensors()["x"]
        return [str(self.tensor.device), str(self.tensor.dtype), self.tensor.nbytes]

    def tensor_digest(self) -> str:
        return hashlib.sha256(self.tensor.cpu().numpy().tobytes()).hexdigest()

    def tensor_sum(self) -> int:
        """Computed by the device."""
        return int(self.tensor.long().sum())

    def write_to_tensor(self) -> None:
        import torch

        self.tensor[0] = 0
        torch.cuda.synchronize()

    def drop_tensor(self) -> None:
        self.tensor = None

    def free_bytes(self) -> int:
        """Of the device, for whoever asks. Makes a context."""
        with current(find(self.memory.device).ordinal) as driver:
            call(driver.cuCtxSynchronize)
            return int(call(driver.cuMemGetInfo)[0])

    def fill_leases(self, values: list[tuple[int, int]]) -> None:
        """(offset, the value of all its bytes)."""
        import torch

        for offset, value in values:
            self.leases[offset].tensor().fill_(value)
        torch.cuda.synchronize()

    def lease_digest(self, offset: int) -> str:
        return hashlib.sha256(self.leases[offset].tensor().cpu().numpy().tobytes()).hexdigest()

    def lease_addresses(self) -> list[tuple[int, int]]:
        """(offset, device address) of every lease."""
        return [(offset, lease.tensor().data_ptr()) for offset, lease in self.leases.items()]

    def block_digest(self, digest: str) -> str:
        extent = self.blocks[digest].extent
        found = self.memory._pool.tensor(extent)
        return hashlib.sha256(found.cpu().numpy().tobytes()).hexdigest()


def main() -> None:
    """Obey until stdin ends."""
    client_program.main(DeviceProgram)


if __name__ == "__main__":
    main()
