"""Started in a folder whose files are called like modules: none of them is run."""

import site
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import allocator
from allocator import module_command, module_environment
from server.text.tokenizer_files import tokenizer_folder
from tests.daemon_process import TIMEOUT_S
from tests.system.running_server import Server
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.slow

CALLED_LIKE = ("allocator", "json", "queue", "server", "torch", "transformers", "workers", "zmq")
RUN = "raise SystemExit('a file of the working folder was run')"


@pytest.fixture
def working_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in CALLED_LIKE:
        (folder / f"{name}.py").write_text(RUN)
    return folder


@pytest.mark.parametrize(
    "module", ["allocator", "server.cli", "workers.estimate", "workers.process.forkserver"]
)
def test_each_program_imports_what_is_installed(module: str, working_folder: Path) -> None:
    ended = subprocess.run(
        module_command(module, "--help"),
        cwd=working_folder,
        env=module_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if module == "workers.process.forkserver":  # takes descriptors, no options
        assert "not enough values to unpack (expected at least 4, got 1)" in ended.stderr
    else:
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_checkout_that_nobody_installed_is_found_and_comes_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if Path(allocator.__file__).parents[1] in map(Path, site.getsitepackages()):
        pytest.skip("these tests run an installed onecopy")
    monkeypatch.setenv("PYTHONPATH", ":/the/users")  # an empty entry is the working folder
    first = module_environment()["PYTHONPATH"]
    assert first == f"/the/users:{Path(allocator.__file__).parents[1]}"
    monkeypatch.setenv("PYTHONPATH", first)
    assert module_environment()["PYTHONPATH"] == first
    monkeypatch.delenv("PYTHONPATH")
    assert module_environment()["PYTHONPATH"] == str(Path(allocator.__file__).parents[1])


def test_a_tokenizer_is_built_in_such_a_folder(
    working_folder: Path, smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(working_folder)
    assert (tokenizer_folder(smollm2_gguf, tmp_path) / "tokenizer.json").is_file()


def test_a_model_is_served_in_such_a_folder(
    make_server: Callable[..., Server], working_folder: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "tiny"
    write_checkpoint(checkpoint, "llama")
    write_tokenizer(checkpoint)
    server = make_server(str(checkpoint), "--dtype", "float32", cwd=working_folder)
    answer = server.client().completions.create(model="tiny", prompt="a b c", max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1
    assert server.onecopy("verify").status == 0
    server.stop()
