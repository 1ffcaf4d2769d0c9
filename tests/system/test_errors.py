"""Bad input at the command line: one line that names the fix, exit status 1, nothing left."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.quick import long_run
from tests.system.running_server import TIMEOUT_S, Outcome, Server, leftovers, onecopy
from tests.workers.checkpoint.checkpoint_files import write_gguf
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="onecopy-t-"))
    yield folder
    assert leftovers(folder) == []
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama that can be served."""
    folder = tmp_path / "tiny"
    write_checkpoint(folder, "llama")
    write_tokenizer(folder)
    return folder


def serve(model: object, runtime_dir: Path, *arguments: str, **environment: str) -> Outcome:
    """A server that is expected to refuse."""
    command = ["serve", str(model), "--port", "0", "--runtime-dir", str(runtime_dir), *arguments]
    return onecopy(*command, **environment)


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 1
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    message = outcome.stderr.strip().splitlines()[-1]
    assert message.startswith("onecopy: ")
    for word in words:
        assert word in message


def test_missing_model(runtime_dir: Path) -> None:
    assert_refused(serve("/no/such/model", runtime_dir), "does not exist", "give a")


def test_hub_id_without_a_network(runtime_dir: Path, tmp_path: Path) -> None:
    outcome = serve("some-org/some-model", runtime_dir, HF_HOME=str(tmp_path))
    assert_refused(outcome, "some-org/some-model", "network", "folder")


def test_folder_without_a_config(runtime_dir: Path, tmp_path: Path) -> None:
    assert_refused(serve(tmp_path, runtime_dir), "config.json")


def test_truncated_gguf(runtime_dir: Path, tmp_path: Path) -> None:
    """Whoever finds out first, the one that unpacks its tokenizer or the instance."""
    short = write_gguf(tmp_path / "short.gguf")
    os.truncate(short, short.stat().st_size - 100)
    outcome = serve(short, runtime_dir, ONECOPY_CACHE_DIR=str(tmp_path / "cache"))
    assert_refused(outcome, "short.gguf", "again")


@long_run
def test_truncated_safetensors(runtime_dir: Path, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    assert_refused(serve(checkpoint, runtime_dir), "truncated", "again")


def test_missing_tensor(runtime_dir: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert_refused(serve(checkpoint, runtime_dir), "model.layers.")


@long_run
def test_unknown_architecture(runtime_dir: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    assert_refused(serve(checkpoint, runtime_dir), "nonesuch")


def test_missing_tokenizer(runtime_dir: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert_refused(serve(checkpoint, runtime_dir), "tokenizer.json")


@long_run
def test_context_longer_than_the_model(runtime_dir: Path, checkpoint: Path) -> None:
    outcome = serve(checkpoint, runtime_dir, "--max-model-len", "1000000")
    assert_refused(outcome, "--max-model-len", "1000000")


def test_port_in_use(runtime_dir: Path, checkpoint: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        outcome = serve(checkpoint, runtime_dir, "--port", port)
    assert_refused(outcome, port, "--port")


def test_memory_limit_too_small(runtime_dir: Path, checkpoint: Path) -> None:
    outcome = serve(checkpoint, runtime_dir, "--memory-limit", "1000")
    assert_refused(outcome, "--memory-limit")


def test_runtime_dir_that_is_not_ours(runtime_dir: Path, checkpoint: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(runtime_dir, 12345, -1)
    try:
        assert_refused(serve(checkpoint, runtime_dir), "12345", "--runtime-dir")
    finally:
        os.chown(runtime_dir, 0, -1)


def test_runtime_dir_on_a_read_only_file_system(checkpoint: Path) -> None:
    outcome = serve(checkpoint, Path("/proc/onecopy"))
    assert_refused(outcome, "/proc/onecopy", "--runtime-dir")


def test_runtime_dir_with_too_long_a_path(checkpoint: Path, tmp_path: Path) -> None:
    outcome = serve(checkpoint, tmp_path / ("x" * 100))
    assert_refused(outcome, "107 bytes")


def test_too_small_a_dev_shm(runtime_dir: Path) -> None:
    """In a mount namespace of its own, whose /dev/shm holds 64 MB as Docker's does."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1) to mount a small /dev/shm")
    command = [sys.executable, "-m", "server.cli", "serve", "demo", "--port", "0"]
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", script, "sh"),
            *(*command, "--runtime-dir", str(runtime_dir)),
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if "mount" in done.stderr and "denied" in done.stderr:
        pytest.skip("this machine does not let us mount")
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert_refused(outcome, "/dev/shm", "remount,size=", "--shm-size")


def test_second_server_in_one_runtime_dir(demo: Server, checkpoint: Path) -> None:
    outcome = serve(checkpoint, demo.runtime_dir)
    assert_refused(outcome, "another server", str(demo.process.pid), "onecopy stop")
    assert demo.onecopy("verify").status == 0


def test_commands_without_a_server(runtime_dir: Path) -> None:
    for command in ("ps", "verify"):
        assert_refused(onecopy(command, "--runtime-dir", str(runtime_dir)), "onecopy serve")
    idle = onecopy("stop", "--runtime-dir", str(runtime_dir))
    assert (idle.status, idle.stdout) == (0, f"nothing runs in {runtime_dir}\n")


def test_serves_a_hugging_face_folder_on_a_unix_socket(
    make_server: Callable[..., Server], checkpoint: Path, tmp_path: Path
) -> None:
    """The way the refused ones would have gone."""
    import httpx

    uds = Path(tempfile.mkdtemp(prefix="onecopy-u-")) / "api.sock"
    server = make_server(str(checkpoint), "--uds", str(uds), "--dtype", "float32")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), timeout=TIMEOUT_S) as client:
        answer = client.post(
            "http://localhost/v1/completions",
            json={"model": checkpoint.name, "prompt": "a b c", "max_tokens": 5},
        )
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] >= 1
    assert server.onecopy("verify").status == 0
    server.stop()
    assert not uds.exists()
    uds.parent.rmdir()
