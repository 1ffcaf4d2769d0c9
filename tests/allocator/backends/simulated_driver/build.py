"""Compile the simulated CUDA driver and NVML, and the environment in which a process finds them.

Invariant: only processes that get this environment load it, never the one that runs the tests.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = ("libcuda", "libnvidia-ml")
GRANULARITY = 2 << 20  # as the simulated driver says, and the real ones do


def build(folder: Path) -> Path:
    """libcuda.so.1 and libnvidia-ml.so.1 in `folder`; the first's path. Skips the test where that
    can't be."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the simulated driver needs a C compiler, and there is no cc")
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("the simulated driver is called by way of cuda-bindings, which is missing")
    here = Path(__file__).parent
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    for name in SOURCES:
        library = folder / f"{name}.so.1"
        command = [compiler, *flags, f"-Wl,-soname,{library.name}", "-o", str(library)]
        compiled = subprocess.run(
            [*command, str(here / f"{name}.c"), "-ldl", "-lpthread"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert compiled.returncode == 0, compiled.stderr
    return folder / "libcuda.so.1"


def environment(library: Path, state: Path, **settings: str) -> dict[str, str]:
    """Where a process loads `library` as its CUDA driver. Processes of one `state` share devices.
    `settings` are what libcuda.c reads, or CUDA_VISIBLE_DEVICES."""
    inherited = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    inherited["LD_LIBRARY_PATH"] = str(library.parent)
    return {**inherited, "SIMULATED_DRIVER_STATE": str(state), **settings}
