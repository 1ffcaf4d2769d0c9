"""The kernels for every instruction set that this machine can run, or emulate."""

import fcntl
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon_process import ROOT
from tests.quick import LONG
from tests.workers.model.native.foreign.library import ForeignLibrary, compile_server
from workers.model.native import library


def kernel_flags(name: str) -> list[str]:
    """As setup.py compiles a set."""
    made = runpy.run_path(str(ROOT / "setup.py"))
    return [*made["COMMON"], *made["FLAGS"][name]]


USABLE = library.usable()
SETS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why_not), reason=f"{name}: {why_not}"))
    for name, why_not in USABLE.items()
]
EMULATED = "amx, emulated"
"""The code for AMX tiles, with tiles in plain C++: what a machine without AMX can test of it."""
AARCH64 = {f"{name}, aarch64": name for name in ("neon_bf16", "portable")}
"""What runs under an emulator of that processor."""
SLOWLY = {
    "family": {"llama", "phi3 odd", "gemma3 odd", "qwen3_moe odd", "bert odd"},
    "name": {"4 bits with minima", "8 bits in groups of 16"},  # of packed weights
    "num_rows": {7, 16},
    "num_threads": {3},
}
"""Of a parameter's values, those that are run there: all takes a hundred times as long."""
BEST = next((name for name, why_not in USABLE.items() if not why_not), "")
"""The set that a server would use here: every family is computed by it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every family by the best set, every set with some families; the long run tries all pairs."""
    if LONG:
        return
    left_out = [item for item in items if isinstance(item, pytest.Function) and _is_one_more(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _is_one_more(item: pytest.Function) -> bool:
    """A family by a set that is tried with others."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return values.get("kernels", BEST) != BEST and values.get("family") not in SLOWLY["family"] | {
        None
    }


@pytest.fixture(scope="session")
def emulated_tiles(common_folder: Path) -> library.Kernels:
    """Compiled once for all processes of the tests."""
    if USABLE["avx512_bf16"]:
        pytest.skip(f"the vector part of the set amx: {USABLE['avx512_bf16']}")
    compiler, file = shutil.which("c++"), common_folder / "emulated_decoder.so"
    if compiler is None:
        pytest.skip("there is no compiler c++")
    # Optimizing more takes longer than all that is then computed.
    flags = ["-O1" if one == "-O3" else one for one in kernel_flags("amx")]
    flags = [flag for flag in flags if not flag.startswith("-mamx")]
    source = str(Path(library.__file__).with_name("decoder.cpp"))
    command = [compiler, *flags, "-DEMULATE_AMX", "-fPIC", "-shared", source, "-o", str(file)]
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            subprocess.run(command, check=True)
    return library.open_library("amx", file)


@pytest.fixture(scope="session")
def on_aarch64(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], library.Kernels]]:
    """The kernels of a set, in an emulated process."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs the Debian packages g++-aarch64-linux-gnu and qemu-user")
    folder = tmp_path_factory.mktemp("aarch64")
    started: dict[str, ForeignLibrary] = {}

    def kernels_of(name: str) -> library.Kernels:
        if name not in started:
            compile_server(compiler, kernel_flags(name), folder / name)
            started[name] = ForeignLibrary([emulator, "-cpu", "max", str(folder / name)])
        return library.Kernels(name, started[name])

    yield kernels_of
    for foreign in started.values():
        foreign.close()


@pytest.fixture(params=[*SETS, EMULATED, *AARCH64])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with every set that this machine can run, or emulate."""
    name: str = request.param
    if name in AARCH64:
        if request.node.get_closest_marker("this_process"):
            pytest.skip("the emulated process is another one")
        for parameter, value in request.node.callspec.params.items():
            if value not in SLOWLY.get(parameter, {value}):
                pytest.skip("takes too long where each instruction is emulated")
        foreign = request.getfixturevalue("on_aarch64")(AARCH64[name])
        monkeypatch.setattr(library, "load", lambda _wanted="auto": foreign)
    elif name == EMULATED:
        emulated = request.getfixturevalue("emulated_tiles")
        monkeypatch.setattr(library, "load", lambda _wanted="auto": emulated)
    else:
        monkeypatch.setenv(library.VARIABLE, name)
    return name
