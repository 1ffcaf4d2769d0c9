"""Compile the simulated CUDA driver, and the environment in which a process finds it.

Invariant: only processes that get this environment load it, never the one that runs the tests.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("libcuda.c")
GRANULARITY = 2 << 20  # as the simulated driver says, and the real ones do


def build(folder: Path) -> Path:
    """libcuda.so.1 in `folder`. Skips the test where that can't be."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the simulated driver needs a C compiler, and there is no cc")
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("the simulated driver is called by way of cuda-bindings, which is missing")
    library = folder / "libcuda.so.1"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags += ["-Wl,-soname,libcuda.so.1"]
    compiled = subprocess.run(
        [compiler, *flags, "-o", str(library), str(SOURCE), "-ldl", "-lpthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stderr
    return library


def environment(library: Path, state: Path, **settings: str) -> dict[str, str]:
    """Where a process loads `library` as its CUDA driver. Processes of one `state` share devices.
    `settings` are what libcuda.c reads, or CUDA_VISIBLE_DEVICES."""
    inherited = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    inherited["LD_LIBRARY_PATH"] = str(library.parent)
    return {**inherited, "SIMULATED_DRIVER_STATE": str(state), **settings}
