"""GGUF files: bit for bit what `transformers` makes of the same file, damage refused by name."""

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from allocator import RuntimeDir
from tests.daemon_process import DaemonProcess
from tests.references import load, parameters, transformers_reads
from tests.workers.checkpoint.checkpoint_files import same_bytes, write_gguf
from tests.workers.checkpoint.test_checkpoint_sharing import loaded_in_a_process
from workers.checkpoint import attach, open_checkpoint
from workers.checkpoint.formats.gguf_file import HeaderReader
from workers.conformance.greedy import read_whole
from workers.errors import CheckpointCorrupt, CheckpointError, UnsupportedCheckpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# --- what is sound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_is_that_of_transformers(tiny: Path, dtype: torch.dtype) -> None:
    expected = parameters(transformers_reads(tiny, dtype))
    read = read_whole(open_checkpoint(tiny, str(dtype).removeprefix("torch.")))
    assert read.keys() <= expected.keys()
    assert expected.keys() - read.keys() <= {"lm_head.weight"}  # tied
    assert [name for name in read if not same_bytes(read[name], expected[name].detach())] == []


def test_the_config_is_that_of_the_file(tiny: Path) -> None:
    config = json.loads(open_checkpoint(tiny).metadata()["config"])
    assert config["model_type"] == "llama"
    assert (config["vocab_size"], config["hidden_size"]) == (100, 32)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["eos_token_id"] == [2]
    assert not [key for key in config if key.startswith("_")]


@pytest.fixture(scope="module")
def real_daemon() -> Iterator[DaemonProcess]:
    path = Path(tempfile.mkdtemp(prefix="onecopy-", dir="/tmp"))
    daemon = DaemonProcess(RuntimeDir.open(path))
    yield daemon
    assert daemon.stop() == 0
    assert list(path.iterdir()) == []
    path.rmdir()


@pytest.fixture(scope="module")
def real_load(real_daemon: DaemonProcess, smollm2_gguf: Path) -> dict[str, Any]:
    """The real model, loaded once by another process; the weight set stays."""
    return loaded_in_a_process(real_daemon.runtime_dir, smollm2_gguf, "bfloat16")


def test_the_real_model_is_that_of_transformers_bit_for_bit(
    real_daemon: DaemonProcess,
    real_load: dict[str, Any],
    smollm2_gguf: Path,
    smollm2_by_transformers: Path,
) -> None:
    with real_daemon.connect() as memory:
        weights = attach(memory, open_checkpoint(smollm2_gguf, "bfloat16"))
        assert not weights.loaded
        expected = parameters(load(smollm2_by_transformers, torch.bfloat16))
        assert expected.keys() - weights.tensors.keys() <= {"lm_head.weight"}
        for name, tensor in weights.tensors.items():
            assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
        assert sum(t.nbytes for t in weights.tensors.values()) <= weights.num_bytes


@pytest.mark.slow
def test_loading_the_real_model_takes_little_private_memory(real_load: dict[str, Any]) -> None:
    assert real_load["largest"] == 49152 * 576 * 2
    assert real_load["grown"] < 2 * real_load["largest"] < real_load["num_bytes"] / 2


# --- the header


def test_the_header_reader_finds_the_same_tensors_and_skips_the_words(tiny: Path) -> None:
    ours, full = HeaderReader(tiny), GGUFReader(tiny)
    assert [(t.name, t.data_offset, t.n_bytes, list(t.shape)) for t in ours.tensors] == [
        (t.name, t.data_offset, t.n_bytes, list(t.shape)) for t in full.tensors
    ]
    assert ours.fields.keys() == full.fields.keys()
    assert len(full.fields["tokenizer.ggml.tokens"].parts) > 100
    assert ours.fields["tokenizer.ggml.tokens"].parts[3:] == []
    for name in ("llama.embedding_length", "general.architecture", "tokenizer.ggml.eos_token_id"):
        assert ours.fields[name].contents() == full.fields[name].contents()


def test_the_header_of_the_real_model(smollm2_gguf: Path) -> None:
    reader = HeaderReader(smollm2_gguf)
    assert len(reader.tensors) == 272
    words = reader.fields["tokenizer.ggml.tokens"]
    assert sum(len(part) for part in words.parts[1:]) < 100  # rather than 49,152 of them


# --- what is damaged


def test_every_truncation_is_refused(tiny: Path, tmp_path: Path) -> None:
    good = tiny.read_bytes()
    path = tmp_path / "bad.gguf"
    for end in [*range(0, 5000, 331), *range(5000, len(good), 4001), len(good) - 1]:
        path.write_bytes(good[:end])
        with pytest.raises(CheckpointCorrupt, match=r"bad\.gguf is truncated, damaged or no GGUF"):
            open_checkpoint(path).tensors()


@pytest.mark.slow
def test_random_damage_to_the_header_never_gives_another_error(tiny: Path, tmp_path: Path) -> None:
    good = tiny.read_bytes()
    header_bytes = GGUFReader(tiny).data_offset
    path = tmp_path / "bad.gguf"
    chance = random.Random(7)  # the same damage every time
    refused: list[str] = []
    for _ in range(250):
        content = bytearray(good)
        for _ in range(chance.choice([1, 1, 4])):
            content[chance.randrange(header_bytes)] = chance.choice([0, 1, 0x7F, 0xFF])
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.metadata()
            read_whole(checkpoint)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 25
    assert [message for message in refused if "bad.gguf" not in message] == []


def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bad.gguf", num_kv_heads=7)
    with pytest.raises(CheckpointCorrupt, match=r"bad\.gguf: blk\.0\.attn_k\.weight does not fit"):
        read_whole(open_checkpoint(path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(20), b"not it" * 10])
def test_what_is_no_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.gguf"):
        open_checkpoint(path).tensors()


def test_a_gguf_file_needs_no_suffix(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny, tmp_path / "model")
    assert len(open_checkpoint(tmp_path / "model").tensors()) == 11


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", architecture="perceptron9000")
    with pytest.raises(UnsupportedCheckpoint, match="perceptron9000"):
        open_checkpoint(path).tensors()


def test_a_file_that_is_gone(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny, tmp_path / "gone.gguf")
    checkpoint = open_checkpoint(tmp_path / "gone.gguf")
    (tmp_path / "gone.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"gone\.gguf"):
        checkpoint.fingerprint()
    with pytest.raises(CheckpointError, match=r"gone\.gguf"):
        checkpoint.tensors()
