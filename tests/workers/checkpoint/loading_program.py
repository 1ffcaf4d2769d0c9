"""Load a checkpoint in a process of its own and print how much private memory that took.

Usage: RUNTIME_DIR PATH DTYPE. Imports and the file's header are not counted.
"""

import gc
import json
import sys
import threading
from pathlib import Path

from allocator import connect
from workers.checkpoint import attach, open_checkpoint


def private_bytes() -> int:
    """Anonymous memory of this process; neither files nor shared segments are among it."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise ValueError("this kernel does not say how much memory is anonymous")


class Peak:
    """The highest of frequent samples, taken by a thread while it is a context."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_samples = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.num_bytes = max(self.num_bytes, private_bytes())
            self.num_samples += 1

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    """Attach, as the writer, and report."""
    runtime_dir, path, dtype = sys.argv[1:]
    checkpoint = open_checkpoint(path, dtype)
    largest = max(tensor.num_bytes for tensor in checkpoint.tensors())
    checkpoint.metadata()
    with connect(runtime_dir) as memory:
        memory.statistics()
        gc.collect()
        base = private_bytes()
        with Peak() as peak:
            weights = attach(memory, checkpoint)
        result = {
            "loaded": weights.loaded,
            "num_bytes": weights.num_bytes,
            "largest": largest,
            "grown": peak.num_bytes - base,
            "num_samples": peak.num_samples,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
