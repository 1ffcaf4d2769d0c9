"""The native kernels, compiled once for each instruction set, and what placements need; all else is
in pyproject.toml.

They are loaded through ctypes, not imported: which set a machine can run is decided there
(workers/model/native/library.py). Without a compiler they are left out: `onecopy doctor` says so,
and what to do.
"""

import copy
import os
import platform
from pathlib import Path
from typing import Final

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE: Final = Path("workers", "model", "native")
FLAGS: Final = {
    "amx": [
        *("-DSET_AMX", "-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        *("-mamx-tile", "-mamx-bf16"),
    ],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"],
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "neon_bf16": ["-march=armv8.2-a+bf16"],
    "portable": [],
}
MACHINES: Final = {
    "x86_64": ["amx", "avx512_bf16", "avx512", "avx2", "portable"],
    "aarch64": ["neon_bf16", "portable"],
}
COMMON: Final = [
    *("-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]


def kernels() -> list[Extension]:
    """All sets of this kind of machine, whatever this one has; of others the portable one."""
    sets = MACHINES.get(platform.machine(), ["portable"])
    headers = sorted(str(path) for path in NATIVE.glob("*.h"))
    return [
        Extension(
            f"workers.model.native._decoder_{name}",
            [str(NATIVE / "decoder.cpp")],
            depends=headers,
            language="c++",
            extra_compile_args=[*COMMON, *FLAGS[name]],
            optional=True,
        )
        for name in sets
    ]


def placement(name: str, source: str, *flags: str, depends: list[str]) -> Extension:
    """What a placement does without the interpreter's lock, for any processor of this machine."""
    return Extension(
        f"workers.placement.{name}",
        [str(Path("workers", "placement", source))],
        depends=depends,
        language="c++",
        extra_compile_args=["-g0", "-std=c++17", "-pthread", *flags],
        extra_link_args=["-pthread"],
        optional=True,
    )


PLACEMENT: Final = (
    # What fills memory from files (workers/placement/native_reading.py).
    placement("_reader", "reader.cpp", "-O2", depends=[]),
    # Sums over the ranks of one host (workers/placement/all_reduce.py).
    placement("_all_reduce", "all_reduce.cpp", "-O3", depends=[str(NATIVE / "platform.h")]),
)


def rounding() -> list[Extension]:
    """What rounds weights (workers/quantize/native.py). The same bits come from every set, and from
    the same flags for numbers as the kernels have."""
    return [
        Extension(
            f"workers.quantize._quantize_{name}",
            [str(Path("workers", "quantize", "quantize.cpp"))],
            language="c++",
            extra_compile_args=[*COMMON, "-fno-trapping-math", *FLAGS[name]],
            optional=True,
        )
        for name in (("avx2", "portable") if platform.machine() == "x86_64" else ("portable",))
    ]


class Build(build_ext):
    """Several at a time, each in a folder of its own, for they have one source."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        alone = copy.copy(self)
        alone.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(alone, ext)


if __name__ == "__main__":
    setup(ext_modules=[*kernels(), *PLACEMENT, *rounding()], cmdclass={"build_ext": Build})
