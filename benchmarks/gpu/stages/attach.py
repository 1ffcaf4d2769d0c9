"""How long a process takes to map a sealed set and make its tensors: flat in the size."""

import statistics
import time

from gpu.processes import allocator
from gpu.stage import GB, MIB, Stage, main

from allocator import (
    ALIGNMENT,
    Client,
    Manifest,
    TensorEntry,
    WeightSetReader,
    WeightSetWriter,
    manifest_bytes,
)
from allocator.backends.cuda_driver import current, find

NUM_TENSORS = 1000
ROUNDS = 11


def run(stage: Stage) -> None:
    sizes = [8 * MIB, 64 * MIB] if stage.small else [GB // 10, 10 * GB]
    if stage.on_gpu:  # what every process does once is not what is timed
        import torch

        torch.ones(1, device=stage.device)
    with (
        current(find(stage.device).ordinal),
        allocator(stage) as daemon,
        daemon.connect() as memory,
    ):
        _attach_to_all(stage, memory, sizes)


def _attach_to_all(stage: Stage, memory: Client, sizes: list[int]) -> None:
    for num_bytes in sizes:
        with stage.part(f"a set of {num_bytes / 1e9:.3g} GB"):
            _seal(memory, num_bytes)
    with stage.part("attach"):
        medians = []
        for num_bytes in sizes:
            times = [_attach(stage, memory, num_bytes) for _ in range(ROUNDS)]
            medians.append(statistics.median(times[1:]))
            figures = {"first": times[0], "median": medians[-1], "max": max(times[1:])}
            stage.figure(
                f"attach_{NUM_TENSORS}_tensors_of_{num_bytes / 1e9:.3g}_gb_ms",
                {name: round(value, 2) for name, value in figures.items()},
            )
        stage.claim(
            "attaching takes about as long whatever the size",
            stage.small or medians[1] < 2 * medians[0] + 1,
            medians_ms=[round(one, 2) for one in medians],
        )


def _attach(stage: Stage, memory: Client, num_bytes: int) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    reader = memory.open_weight_set(_key(num_bytes), {})
    assert isinstance(reader, WeightSetReader)
    if stage.on_gpu:
        assert len(reader.tensors()) == NUM_TENSORS
    taken = (time.perf_counter() - started) * 1000
    reader.release()
    return taken


def _key(num_bytes: int) -> str:
    return f"bench-{num_bytes}"


def _seal(memory: Client, num_bytes: int) -> None:
    each = num_bytes // NUM_TENSORS // ALIGNMENT * ALIGNMENT
    entries = {
        f"model.layers.{i}.weight": TensorEntry(
            dtype="bfloat16", shape=(each // 2,), stride=(1,), offset=i * each, num_bytes=each
        )
        for i in range(NUM_TENSORS)
    }
    manifest = Manifest(version=1, tensors=entries, metadata={})
    writer = memory.open_weight_set(_key(num_bytes), {})
    assert isinstance(writer, WeightSetWriter)
    writer.reserve_uncommitted(each * NUM_TENSORS + manifest_bytes(manifest))
    writer.seal(manifest, each * NUM_TENSORS).release()


if __name__ == "__main__":
    main(run)
