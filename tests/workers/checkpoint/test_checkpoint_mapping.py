"""Checkpoint files that serve as segments themselves, through a real allocator."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator import Client, StaleGeneration
from tests.daemon_process import DaemonProcess
from tests.workers.checkpoint.checkpoint_files import (
    folder,
    folder_of_every_kind,
    same_bytes,
    write_gguf,
)
from workers.checkpoint import attach, open_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder_of_every_kind(tmp_path / "model")


def mapped_files(path: Path) -> list[str]:
    """Permissions of this process's mappings of that file."""
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    return [fields[1] for fields in lines if fields[-1] == str(path)]


def test_the_file_is_the_one_copy(memory: Client, model: Path, daemon: DaemonProcess) -> None:
    file = model / "model.safetensors"
    weights = attach(memory, open_checkpoint(model), map_files=True)
    assert weights.loaded
    expected = load_file(file)
    assert weights.tensors.keys() == expected.keys()
    assert all(same_bytes(weights.tensors[name], expected[name]) for name in expected)
    with daemon.connect() as other:
        again = attach(other, open_checkpoint(model), map_files=True)
        assert not again.loaded
        assert mapped_files(file).count("r--s") == 2
        (held,) = other.statistics().weight_sets
        assert held.files == ((str(file), file.stat().st_size),)
        # The segment holds the manifest alone.
        assert held.num_bytes - file.stat().st_size < 64 << 10


def test_a_mapped_and_a_copied_set_are_two(memory: Client, model: Path) -> None:
    mapped = attach(memory, open_checkpoint(model), map_files=True)
    copied = attach(memory, open_checkpoint(model))
    assert copied.loaded
    assert mapped.reader.key != copied.reader.key
    assert copied.reader.files == ()


def test_what_needs_converting_is_copied(memory: Client, model: Path, tmp_path: Path) -> None:
    cast = attach(memory, open_checkpoint(model, "float16"), map_files=True)
    assert cast.reader.files == ()
    gguf = attach(memory, open_checkpoint(write_gguf(tmp_path / "tiny.gguf")), map_files=True)
    assert gguf.reader.files == ()


def test_a_file_that_changed_is_refused_to_those_who_come_later(
    memory: Client, model: Path
) -> None:
    weights = attach(memory, open_checkpoint(model), map_files=True)
    os.utime(model / "model.safetensors", ns=(1, 1))
    with pytest.raises(StaleGeneration, match="has changed"):
        memory.wake(weights.reader.key)  # whatever the key names, without asking the checkpoint
    assert attach(memory, open_checkpoint(model), map_files=True).reader.key != weights.reader.key


def test_sleep_forgets_it_and_the_next_maps_it_again(memory: Client, model: Path) -> None:
    weights = attach(memory, open_checkpoint(model), map_files=True)
    reader, key = weights.reader, weights.reader.key
    del weights
    reader.release()
    memory.sleep(key, level=2)
    assert memory.statistics().used_bytes == 0
    assert attach(memory, open_checkpoint(model), map_files=True).loaded


def test_tensors_of_several_files(memory: Client, tmp_path: Path) -> None:
    made = folder(tmp_path / "sharded", dtype=None)
    parts = {"a": torch.arange(6.0), "b": torch.arange(4, dtype=torch.int64)}
    weight_map = {}
    for number, (name, tensor) in enumerate(parts.items(), start=1):
        file = f"model-{number}-of-2.safetensors"
        save_file({name: tensor}, made / file)
        weight_map[name] = f'"{name}": "{file}"'
    index = '{"weight_map": {' + ", ".join(weight_map.values()) + "}}"
    (made / "model.safetensors.index.json").write_text(index)
    weights = attach(memory, open_checkpoint(made), map_files=True)
    assert len(weights.reader.files) == 2
    assert all(torch.equal(weights.tensors[name], parts[name]) for name in parts)
