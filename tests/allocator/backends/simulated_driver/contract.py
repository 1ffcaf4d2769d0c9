"""The contract of every backend, for CUDA's on the simulated driver.

Run by tests/allocator/backends/test_cuda_sequence.py, in a process that finds that driver.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from allocator import RuntimeDir, StaleGeneration
from allocator.backends import Backend, for_handle, open_device
from allocator.messages import Extent, Handle
from tests.allocator.backends import backend_contract
from tests.allocator.backends.backend_contract import PATTERN, BackendContract, bytes_of, mapped
from tests.allocator.backends.backend_peer import Peer
from tests.allocator.backends.simulated_driver.process import (
    Process,
    imported,
    peek_address,
    poke_address,
)
from tests.warm import Warm


class TestCUDA(BackendContract):
    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> Backend:
        # Tensors would need a torch with CUDA; here device memory has addresses of the process.
        monkeypatch.setattr(backend_contract, "peek", peek_address)
        monkeypatch.setattr(backend_contract, "poke", poke_address)
        return open_device("cuda:0")

    @pytest.fixture(scope="class")
    def warm(self, adopted_orphans: None) -> Iterator[Warm]:
        with imported(os.environ) as warm:
            yield warm

    @pytest.fixture
    def start_peer(self, warm: Warm, runtime_dir: RuntimeDir) -> Iterator[Callable[[], Peer]]:
        with ExitStack() as started:
            yield lambda: started.enter_context(Process(os.environ, warm))

    def test_a_sealed_segment_can_not_be_mapped_writable(
        self, backend: Backend, sealed: Handle
    ) -> None:
        """Not so here: descriptors carry no access mode, so only clients' own mappings do."""
        mapping = mapped(backend, sealed, writable=True)
        assert bytes_of(mapping) == PATTERN
        mapping.close()

    def test_a_pool_that_is_gone_can_not_be_opened(self, backend: Backend, pool: Handle) -> None:
        """Here a window takes nothing of the pool; its extents can't be had."""
        backend.free(pool.segment)
        for_handle(pool).open_pool(pool).close()
        with pytest.raises(StaleGeneration, match="gone"):
            backend.export(pool.segment, Extent(offset=0, num_bytes=backend.granularity))
