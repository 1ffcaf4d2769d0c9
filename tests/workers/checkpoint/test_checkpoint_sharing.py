"""Checkpoints through a real allocator: one copy, whatever goes wrong on the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from allocator import ALIGNMENT, AllocatorError, Client, OutOfDeviceMemory, RuntimeDir
from tests.allocator.processes import in_fork
from tests.daemon_process import ROOT, DaemonProcess
from tests.leaks import segments
from tests.workers.checkpoint.checkpoint_files import (
    damaged,
    folder,
    folder_of_every_kind,
    same_bytes,
    tensors_of_every_kind,
    write_gguf,
)
from workers.checkpoint import attach, attach_weights, open_checkpoint
from workers.conformance.greedy import read_whole
from workers.errors import CheckpointCorrupt, CheckpointError

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder_of_every_kind(tmp_path / "model")


def mapped(permissions: str) -> list[str]:
    """This process's mappings of segments that have these permissions."""
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    return [f[5] for f in lines if len(f) > 5 and "/onecopy-" in f[5] and f[1] == permissions]


def bytes_read() -> int:
    """All that this process has read by system calls so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


# --- one copy


def test_the_first_loads_and_the_others_attach(memory: Client, model: Path) -> None:
    first = attach(memory, open_checkpoint(model))
    second = attach(memory, open_checkpoint(model))
    assert (first.loaded, second.loaded) == (True, False)
    expected = tensors_of_every_kind()
    for weights in (first, second):
        assert list(weights.tensors) == list(read_whole(open_checkpoint(model)))
        assert all(same_bytes(weights.tensors[name], expected[name]) for name in expected)
        assert json.loads(weights.metadata["config"])["model_type"] == "llama"
    assert first.reader.handle == second.reader.handle
    [found] = memory.statistics().weight_sets
    assert found.num_bytes == first.num_bytes
    assert found.reader_pids == (os.getpid(),) * 2


def test_nobody_can_write_once_it_is_sealed(memory: Client, model: Path) -> None:
    tensors = attach_weights(memory, model)
    assert len(mapped("r--s")) == 1
    assert mapped("rw-s") == []
    child = in_fork(lambda: str(tensors["f32"].zero_()))
    assert child.signal == 11
    assert same_bytes(tensors["f32"], tensors_of_every_kind()["f32"])


def test_another_process_gets_the_same_tensors(
    memory: Client, runtime_dir: RuntimeDir, model: Path
) -> None:
    tensors = attach_weights(memory, model)

    def child() -> str:
        from allocator import connect

        with connect(runtime_dir) as own:
            weights = attach(own, open_checkpoint(model))
            same = all(torch.equal(weights.tensors[n], tensors[n]) for n in ("f32", "i64", "bool"))
            return f"{weights.loaded} {same}"

    assert in_fork(child).text == "False True"


def test_tensors_are_aligned(memory: Client, model: Path) -> None:
    tensors = attach_weights(memory, model)
    assert [n for n, t in tensors.items() if t.numel() and t.data_ptr() % ALIGNMENT] == []


def test_tensors_outlive_the_session(daemon: DaemonProcess, model: Path) -> None:
    with daemon.connect() as memory:
        tensors = attach_weights(memory, model)
    daemon.kill()
    assert same_bytes(tensors["bf16"], tensors_of_every_kind()["bf16"])
    DaemonProcess(daemon.runtime_dir).stop()  # takes the dead one's files


def test_each_dtype_is_a_weight_set_of_its_own(memory: Client, model: Path) -> None:
    for dtype in ("auto", "bfloat16", "float32"):
        assert attach(memory, open_checkpoint(model, dtype)).loaded
    assert len(memory.statistics().weight_sets) == 3


def test_progress_ends_at_the_total_and_comes_seldom(memory: Client, tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    save_file({f"t{n}": torch.ones(1000) for n in range(500)}, model / "model.safetensors")
    seen: list[tuple[int, int, bool]] = []
    attach(memory, open_checkpoint(model), lambda *step: seen.append(step))
    assert seen == sorted(seen)
    assert 2 <= len(seen) <= 33
    assert all(writes and done <= total for done, total, writes in seen)


def test_attaching_reads_none_of_the_weights(memory: Client, tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    save_file({"a": torch.ones(4 * MIB)}, model / "model.safetensors")
    start = bytes_read()
    assert attach(memory, open_checkpoint(model)).loaded
    between = bytes_read()
    assert not attach(memory, open_checkpoint(model)).loaded
    assert between - start > 16 * MIB
    assert bytes_read() - between < MIB


# --- the file changes


def test_a_file_written_again_in_the_same_size_is_loaded_anew(memory: Client, model: Path) -> None:
    file = model / "model.safetensors"
    before = open_checkpoint(model).fingerprint()
    old = attach_weights(memory, model)
    other = {k: t.clone() for k, t in tensors_of_every_kind().items()}
    other["f32"].fill_(5)
    size, inode = file.stat().st_size, file.stat().st_ino
    save_file(other, model / "new")
    with file.open("r+b") as stream:  # in place: neither its size nor its inode changes
        stream.write((model / "new").read_bytes())
    assert (file.stat().st_size, file.stat().st_ino) == (size, inode)
    assert open_checkpoint(model).fingerprint() != before
    new = attach(memory, open_checkpoint(model))
    assert new.loaded
    assert torch.all(new.tensors["f32"] == 5)
    assert same_bytes(old["f32"], tensors_of_every_kind()["f32"])


def test_a_config_that_changes_makes_another_set(memory: Client, model: Path) -> None:
    attach_weights(memory, model)
    folder(model, dtype=None, rope_theta=1e6)
    assert attach(memory, open_checkpoint(model)).loaded


def test_a_copy_under_another_name_is_another_set(memory: Client, model: Path) -> None:
    attach_weights(memory, model)
    shutil.copytree(model, model.parent / "copy")
    assert attach(memory, open_checkpoint(model.parent / "copy")).loaded


def test_what_changes_while_it_is_read_is_never_sealed(
    memory: Client, daemon: DaemonProcess, model: Path
) -> None:
    file = model / "model.safetensors"

    def rewrite(_done: int, _total: int, _writes: bool) -> None:
        content = file.read_bytes()
        (model / "new").write_bytes(content)
        (model / "new").replace(file)

    with pytest.raises(CheckpointCorrupt, match="changed while it was read"):
        attach(memory, open_checkpoint(model), rewrite)
    assert_absent(memory, daemon)
    assert attach(memory, open_checkpoint(model)).loaded


# --- what goes wrong


def assert_absent(memory: Client, daemon: DaemonProcess) -> None:
    assert memory.statistics().weight_sets == ()
    assert segments(daemon.runtime_dir.segment_prefix) == []
    assert memory.statistics().used_bytes == 0


def test_after_any_damage_the_set_is_absent_and_a_repair_is_enough(
    memory: Client, daemon: DaemonProcess, model: Path
) -> None:
    file = model / "model.safetensors"
    good = file.read_bytes()
    for content in damaged().values():
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            attach(memory, open_checkpoint(model))
        assert_absent(memory, daemon)
    file.write_bytes(good)
    assert attach(memory, open_checkpoint(model)).loaded


def test_damage_that_shows_only_while_copying(
    memory: Client, daemon: DaemonProcess, tmp_path: Path
) -> None:
    model = folder(tmp_path / "model")
    save_file({"a": torch.ones(4 * MIB)}, model / "model.safetensors")

    def truncate(_done: int, _total: int, _writes: bool) -> None:
        os.truncate(model / "model.safetensors", 12 * MIB)

    with pytest.raises(CheckpointCorrupt, match="became shorter"):
        attach(memory, open_checkpoint(model), truncate)
    assert_absent(memory, daemon)


def test_no_room(runtime_dir: RuntimeDir, start_daemon: Any, model: Path) -> None:
    daemon = start_daemon("--memory-limit", "1000")
    with daemon.connect() as memory:
        with pytest.raises(OutOfDeviceMemory, match="--memory-limit"):
            attach(memory, open_checkpoint(model))
        assert_absent(memory, daemon)


def test_an_allocator_that_dies_while_loading(daemon: DaemonProcess, model: Path) -> None:
    with (
        daemon.connect() as memory,
        pytest.raises(AllocatorError, match="the allocator ended"),
    ):
        attach(memory, open_checkpoint(model), lambda *_: daemon.kill())
    DaemonProcess(daemon.runtime_dir).stop()  # takes the dead one's files


def test_a_writer_killed_while_loading_is_followed(
    memory: Client, runtime_dir: RuntimeDir, model: Path
) -> None:
    def child() -> str:
        from allocator import connect

        own = connect(runtime_dir)
        attach(own, open_checkpoint(model), lambda *_: os.kill(os.getpid(), 9))
        return "unreachable"

    assert in_fork(child).signal == 9
    weights = attach(memory, open_checkpoint(model))
    assert weights.loaded
    assert same_bytes(weights.tensors["f32"], tensors_of_every_kind()["f32"])


# --- memory


def loaded_in_a_process(runtime_dir: RuntimeDir, path: Path, dtype: str) -> dict[str, Any]:
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "tests.workers.checkpoint.loading_program"),
            *(str(runtime_dir.path), str(path), dtype),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)
    assert result["loaded"]
    assert result["num_samples"] >= 3
    return result


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_loading_takes_little_private_memory(
    daemon: DaemonProcess, tmp_path: Path, dtype: str
) -> None:
    model = folder(tmp_path / "model")
    save_file({f"t{n}": torch.ones(16 * MIB) for n in range(2)}, model / "model.safetensors")
    result = loaded_in_a_process(daemon.runtime_dir, model, dtype)
    # 64 MiB a tensor, and twice that is the promise; it takes a scratch buffer in truth.
    assert result["grown"] < 24 * MIB < 2 * result["largest"]


# --- a GGUF file


def test_gguf_is_shared_too(memory: Client, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    first, second = (attach(memory, open_checkpoint(path)) for _ in range(2))
    assert (first.loaded, second.loaded) == (True, False)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    assert json.loads(second.metadata["config"])["vocab_size"] == 100


def test_attaching_does_not_even_open_a_gguf_file(memory: Client, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    attach(memory, open_checkpoint(path))
    start = bytes_read()
    checkpoint = open_checkpoint(path)
    assert not attach(memory, checkpoint).loaded
    assert bytes_read() - start < 100_000  # /proc/self/io, the lock, sockets
    assert checkpoint._opened is None  # type: ignore[attr-defined]


def test_a_truncated_gguf_file_leaves_nothing(
    memory: Client, daemon: DaemonProcess, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    good = path.read_bytes()
    for end in (0, 4, 100, 2000, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:end])
        with pytest.raises(CheckpointCorrupt):
            attach(memory, open_checkpoint(path))
        assert_absent(memory, daemon)
    path.write_bytes(good)
    assert attach(memory, open_checkpoint(path)).loaded
