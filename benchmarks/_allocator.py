"""An allocator of the benchmark's own."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running_allocator(runtime_dir: Path, *options: str) -> Iterator[None]:
    """Ready; ends with the context. `runtime_dir` is made."""
    runtime_dir.mkdir(mode=0o700)
    ready_read, ready_write = os.pipe()
    command = [sys.executable, "-P", "-m", "allocator", "--quiet", *options]
    command += ["--runtime-dir", str(runtime_dir), "--ready-fd", str(ready_write)]
    daemon = subprocess.Popen(command, pass_fds=[ready_write])
    try:
        os.close(ready_write)
        ready = os.read(ready_read, 1)
        os.close(ready_read)
        if not ready:
            raise RuntimeError("the allocator ended before it was ready; its messages say why")
        yield
    finally:
        daemon.terminate()
        daemon.wait(timeout=60)
