"""GGUF files as what is quantized: the numbers that a server of the file has, in any pieces."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.quick import few_quick
from tests.workers.checkpoint.checkpoint_files import write_gguf
from tests.workers.checkpoint.gguf_converter import CONVERTERS, convert
from tests.workers.model.tiny_families import tiny_model
from tests.workers.quantize.test_quantize import made
from tests.workers.tiny_models import write_tokenizer
from workers.checkpoint import open_checkpoint
from workers.conformance.greedy import read_whole
from workers.errors import UnsupportedCheckpoint
from workers.quantize import gguf_source
from workers.quantize.gguf_rows import describe
from workers.quantize.gguf_source import GGUFSource
from workers.quantize.policy import Choices

KINDS = gguf.GGMLQuantizationType
FAMILIES = sorted({"gemma3", *CONVERTERS} - {"gemma3_text", "phi"})
"""phi's tiny config has heads that no GGUF file of it could have."""


@pytest.fixture
def _described_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process would say, without the seconds that its imports take."""
    monkeypatch.setattr(gguf_source, "_described", describe)


def differing(path: Path, piece_bytes: int) -> list[str]:
    """Tensors that are not those of a server, where pieces are of that size."""
    source = GGUFSource(path, None)
    source.open()
    expected = read_whole(open_checkpoint(path, "bfloat16"))
    found = []
    for one in source.tensors():
        if not source._parameters[one.name].rows and not one.name.endswith("xielu"):
            continue
        content = bytearray(one.num_bytes)
        for begin in range(0, one.num_bytes, piece_bytes):
            source.read(one.name, begin, memoryview(content)[begin : begin + piece_bytes])
        if bytes(content) != expected[one.name].reshape(-1).view(torch.uint8).numpy().tobytes():
            found.append(one.name)
    source.close()
    assert len(source.tensors()) == len(expected)
    return found


@pytest.mark.usefixtures("_described_here")
@pytest.mark.parametrize("family", few_quick(FAMILIES))
def test_families_have_the_numbers_of_a_server(family: str, tmp_path: Path) -> None:
    path = convert(tiny_model(family), tmp_path / "model.gguf")
    assert differing(path, 1 << 20) == []
    assert differing(path, 130) == [], "parts of rows, and rows that are in another order"


@pytest.mark.usefixtures("_described_here")
@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_1, KINDS.BF16, KINDS.F16], ids=str)
def test_blocks_have_the_numbers_of_a_server(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, matrices=kind)
    assert differing(path, 1 << 20) == []
    assert differing(path, 62) == []


@pytest.mark.usefixtures("_described_here")
def test_what_is_not_made_of_rows_is_refused_by_name(tmp_path: Path) -> None:
    path = convert(tiny_model("mixtral"), tmp_path / "model.gguf")
    with pytest.raises(UnsupportedCheckpoint, match=r"gate_up_proj is not made of whole rows"):
        made(path, tmp_path / "out", choices=Choices(("experts",)))


@pytest.mark.usefixtures("_described_here")
def test_a_file_becomes_a_folder_of_the_same_model(tmp_path: Path) -> None:
    path = convert(tiny_model("qwen2"), tmp_path / "model.gguf")
    result = made(path, tmp_path / "out", None)
    assert result.bits_per_weight is None
    expected = read_whole(open_checkpoint(path, "bfloat16"))
    found = read_whole(open_checkpoint(tmp_path / "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")


@pytest.mark.slow
def test_a_folder_is_made_of_a_file(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16().float()
    path = convert(model, tmp_path / "model.gguf", num_parts=3)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    made(path, tmp_path / "out", "w8a16", tokenizer=tokenizer)
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert json.loads(files["config.json"])["architectures"] == ["LlamaForCausalLM"]
    assert files["tokenizer.json"] == (tokenizer / "tokenizer.json").read_bytes()
    whole = dict(model.named_parameters())
    for name, weight in read_whole(open_checkpoint(tmp_path / "out")).items():
        off = (weight.float() - whole[name]).norm() / whole[name].norm()
        assert off <= (0.01 if "proj" in name else 0), name


@pytest.mark.slow
def test_a_file_that_can_not_be_served_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.gguf"):
        made(tmp_path / "model.gguf", tmp_path / "out")
