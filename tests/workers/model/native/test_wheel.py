"""A wheel of onecopy: kernels for every set of its processors, which need no compiler any more."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.daemon_process import ROOT
from workers.model.native import library

pytestmark = pytest.mark.slow

MACHINE = platform.machine()
SETS = [name for name in library.SETS if library.MACHINES.get(name, MACHINE) == MACHINE]
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_COMPUTE = """
import json, torch, workers
from transformers import LlamaConfig, LlamaForCausalLM
from workers.model.decoder import build_model
from workers.model.native import usable
from workers.placement.resident import Resident

config = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=128, max_position_embeddings=64,
)
tensors = LlamaForCausalLM(config).bfloat16().state_dict()
computed = {}
for name, why_not in usable().items():
    model = build_model(json.loads(config.to_json_string()), Resident(tensors), torch.bfloat16)
    reason = str(why_not) if why_not else model.accelerate(16, 64, 2, kernels=name)
    if reason is None:
        model.warm_up()
    computed[name] = reason
print(json.dumps({"at": workers.__file__, "computed": computed}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources alone, without the network; not optimized, which takes six times as
    long and changes nothing of what is in it."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no compiler c++")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    compiled = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for room in ("allocator", "server", "workers"):
        shutil.copytree(ROOT / room, source / room, ignore=compiled)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    setup = source / "setup.py"
    assert '"-O3"' in setup.read_text()
    setup.write_text(setup.read_text().replace('"-O3"', '"-O0"'))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    options = ["--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    subprocess.run([*command, *options, str(source)], check=True)
    [file] = folder.glob("onecopy-*.whl")
    return file


def test_it_holds_the_kernels_of_every_set_and_all_else_that_is_compiled(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    decoders = {f"workers/model/native/_decoder_{name}{_SUFFIX}" for name in SETS}
    others = {f"workers/placement/_{name}{_SUFFIX}" for name in ("reader", "all_reduce")}
    rounding = {f"workers/quantize/_quantize_{name}{_SUFFIX}" for name in ("avx2", "portable")}
    assert held == decoders | others | rounding


def test_installed_where_no_compiler_is_it_computes_by_every_set(
    wheel: Path, tmp_path: Path
) -> None:
    """What it depends on is looked up where these tests have it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    python = tmp_path / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    packages = Path(found.stdout.strip())
    assert packages.is_relative_to(tmp_path)
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    kept = ("HOME", "TMPDIR", "LD_LIBRARY_PATH", "OMP_WAIT_POLICY")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [python, "-P", "-c", _COMPUTE],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PATH": str(tmp_path / "empty")},
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert Path(told["at"]).is_relative_to(packages)
    expected = {name: str(why) if why else None for name, why in library.usable().items()}
    assert told["computed"] == expected
    assert None in expected.values()
