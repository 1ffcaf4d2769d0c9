"""Hugging Face folders: byte-exact against the format's own library, damage refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.workers.checkpoint.checkpoint_files import (
    assemble,
    damaged,
    entry,
    folder,
    same_bytes,
    sound,
    tensors_of_every_kind,
)
from workers.checkpoint import open_checkpoint
from workers.checkpoint.formats.checkpoint import SCRATCH_BYTES
from workers.conformance.greedy import read_whole
from workers.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    UnsupportedCheckpoint,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", dtype=None)


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


# --- what is sound


def test_every_kind_comes_out_byte_for_byte(model: Path) -> None:
    expected = tensors_of_every_kind()
    save(model / "model.safetensors", expected)
    read = read_whole(open_checkpoint(model))
    assert read.keys() == expected.keys()
    assert [name for name in read if not same_bytes(read[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_cast_is_that_of_torch(model: Path, dtype: torch.dtype) -> None:
    expected = {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.itemsize > 1 else tensor
        for name, tensor in tensors_of_every_kind().items()
    }
    save(model / "model.safetensors", tensors_of_every_kind())
    read = read_whole(open_checkpoint(model, str(dtype).removeprefix("torch.")))
    assert [name for name in expected if not same_bytes(read[name], expected[name])] == []


def test_values_that_a_cast_could_lose(model: Path) -> None:
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38, -0.0])
    save(model / "model.safetensors", {"odd": odd})
    read = read_whole(open_checkpoint(model, "bfloat16"))["odd"]
    assert torch.equal(read.view(torch.int16), odd.bfloat16().view(torch.int16))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_tensors_longer_than_the_scratch_buffer(model: Path, dtype: str) -> None:
    count = 2 * SCRATCH_BYTES // 4 + 12345
    long = torch.arange(count, dtype=torch.float32)
    save(model / "model.safetensors", {"short": torch.ones(3), "long": long})
    checkpoint = open_checkpoint(model, dtype)
    steps: list[int] = []
    out = torch.empty(count, dtype=checkpoint.dtype or torch.float32)
    checkpoint.copy_into("long", out, steps.append)
    assert torch.equal(out, long.to(out.dtype))
    assert sum(steps) == out.nbytes
    assert len(steps) == 3


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_configured_dtype_is_the_default(tmp_path: Path, field: str) -> None:
    model = folder(tmp_path / "model", **{"dtype": None, field: "bfloat16"})
    save(model / "model.safetensors", {"a": torch.ones(3), "n": torch.arange(3)})
    dtypes = {t.name: t.dtype for t in open_checkpoint(model).tensors()}
    assert dtypes == {"a": torch.bfloat16, "n": torch.int64}
    assert open_checkpoint(model, "float32").dtype == torch.float32


def write_shards(model: Path) -> dict[str, torch.Tensor]:
    """Two shards and their index; another file lies beside them that is in no index."""
    tensors = {"a": torch.ones(2), "b": torch.arange(3.0), "c": torch.zeros(1)}
    shards = {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]}
    for file, names in shards.items():
        save(model / file, {name: tensors[name] for name in names})
    save(model / "adapter.safetensors", {"unrelated": torch.ones(1)})
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_shards_are_those_of_the_index(model: Path) -> None:
    expected = write_shards(model)
    read = read_whole(open_checkpoint(model))
    assert read.keys() == expected.keys()
    assert all(same_bytes(read[name], expected[name]) for name in expected)


def test_one_file_named_as_usual_is_the_model(model: Path) -> None:
    save(model / "model.safetensors", {"a": torch.ones(2)})
    save(model / "consolidated.safetensors", {"the.same.again": torch.ones(2)})
    assert [t.name for t in open_checkpoint(model).tensors()] == ["a"]


def test_one_file_of_another_name_will_do(model: Path) -> None:
    save(model / "weights.safetensors", {"a": torch.ones(2)})
    assert [t.name for t in open_checkpoint(model).tensors()] == ["a"]


def test_what_the_generation_config_says_is_no_part_of_the_weights(model: Path) -> None:
    """It can be corrected, and the set in memory is the same."""
    save(model / "model.safetensors", {"a": torch.ones(2)})
    before = open_checkpoint(model)
    assert before.eos_token_ids() is None
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    checkpoint = open_checkpoint(model)
    assert checkpoint.eos_token_ids() == (2,)
    assert checkpoint.metadata() == before.metadata()
    assert checkpoint.fingerprint() == before.fingerprint()
    assert json.loads(checkpoint.metadata()["config"])["model_type"] == "llama"


@pytest.mark.parametrize(
    ("said", "ends"),
    [("[2, null, 7, 2]", (2, 7)), ("null", None), ("[]", None), ("0", (0,))],
)
def test_end_tokens_as_files_name_them(model: Path, said: str, ends: object) -> None:
    save(model / "model.safetensors", {"a": torch.ones(2)})
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {said}}}')
    assert open_checkpoint(model).eos_token_ids() == ends


@pytest.mark.parametrize("said", ['"x"', "-1", "2.0", "[true]", '{"a": 1}', "4294967296"])
def test_end_tokens_that_are_none(model: Path, said: str) -> None:
    save(model / "model.safetensors", {"a": torch.ones(2)})
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {said}}}')
    with pytest.raises(CheckpointCorrupt, match=r"generation_config\.json says that eos_token_id"):
        open_checkpoint(model).eos_token_ids()


# --- what is damaged


def test_the_undamaged_one_is_read(model: Path) -> None:
    (model / "model.safetensors").write_bytes(sound())
    read = read_whole(open_checkpoint(model))
    assert read["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["b"].tolist() == [6, 7]


@pytest.mark.parametrize("content", damaged().values(), ids=damaged().keys())
def test_damage_is_refused_by_name_and_file(model: Path, content: bytes) -> None:
    file = model / "model.safetensors"
    file.write_bytes(content)

    def read() -> None:
        checkpoint = open_checkpoint(model)
        checkpoint.fingerprint()
        checkpoint.tensors()

    with pytest.raises(CheckpointCorrupt) as caught:
        read()
    message = str(caught.value)
    assert str(file) in message or str(model) in message
    assert len(message) < 500
    assert "\n" not in message


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_no_truncation_at_all_goes_unnoticed(model: Path, length: int) -> None:
    save(model / "model.safetensors", {"a": torch.ones(length), "b": torch.ones(3, 2)})
    content = (model / "model.safetensors").read_bytes()
    for end in range(0, len(content), max(1, len(content) // 97)):
        (model / "model.safetensors").write_bytes(content[:end])
        with pytest.raises(CheckpointCorrupt):
            open_checkpoint(model).tensors()


def test_an_unknown_dtype_is_named(model: Path) -> None:
    header = {"a": entry([8], 0, 32, "F32_COMPLEX_TURBO")}
    (model / "model.safetensors").write_bytes(assemble(header, bytes(32)))
    with pytest.raises(UnsupportedCheckpoint, match="'a' has the unknown dtype 'F32_COMPLEX_TURBO"):
        open_checkpoint(model).tensors()


def test_a_file_that_shrinks_while_it_is_read(model: Path) -> None:
    save(model / "model.safetensors", {"a": torch.ones(SCRATCH_BYTES)})
    checkpoint = open_checkpoint(model)
    [source] = checkpoint.tensors()
    out = torch.empty(source.shape)

    def shrink(_num_bytes: int) -> None:
        os.truncate(model / "model.safetensors", SCRATCH_BYTES)

    with pytest.raises(CheckpointCorrupt, match="became shorter while it was read"):
        checkpoint.copy_into("a", out, shrink)


def test_two_shards_with_one_name(model: Path) -> None:
    for file in ("1.safetensors", "2.safetensors"):
        save(model / file, {"a": torch.ones(2)})
    with pytest.raises(CheckpointCorrupt, match=r"2\.safetensors holds 'a', as .*1\.safetensors"):
        open_checkpoint(model).tensors()


def test_missing_shards_are_named(model: Path) -> None:
    write_shards(model)
    (model / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match=r"missing: model-2\.safetensors\. Download"):
        open_checkpoint(model)


def test_a_dangling_link(model: Path) -> None:
    (model / "model.safetensors").symlink_to(model / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        open_checkpoint(model).fingerprint()


def test_a_folder_with_the_name_of_a_file(model: Path) -> None:
    (model / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a folder"):
        open_checkpoint(model).fingerprint()


@pytest.mark.parametrize(
    "index",
    [
        *("", "{", "[]", "7", '{"weight_map": 7}', '{"weight_map": {}}', "{}", '"\\ud800"'),
        *('{"weight_map": {"a": 7}}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": ""}}'),
        *('{"weight_map": {"a": ".."}}', '{"weight_map": {"a": "x.bin", "b": 1}}'),
        *("[" * 100_000, '{"weight_map":' * 100_000),
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_index(model: Path, index: str) -> None:
    save(model / "model-1.safetensors", {"a": torch.ones(2)})
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointCorrupt, match=r"index\.json"):
        open_checkpoint(model)


def test_an_index_cannot_lead_out_of_its_folder(model: Path) -> None:
    save(model.parent / "secret.safetensors", {"a": torch.ones(2)})
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointNotFound, match="missing"):
        open_checkpoint(model)


@pytest.mark.parametrize("config", ["", "{", "[]", "7", "\xff", "[" * 100_000], ids=lambda t: t[:9])
def test_a_damaged_config(model: Path, config: str) -> None:
    (model / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(CheckpointCorrupt, match=r"config\.json"):
        open_checkpoint(model)


# --- what is something else


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"does not exist: give a Hugging Face folder or"):
        open_checkpoint(tmp_path / "nothing")


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"holds no config\.json"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(model: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"holds no \.safetensors file"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_loaded(model: Path, name: str) -> None:
    (model / name).write_bytes(b"\x80\x04")
    with pytest.raises(UnsupportedCheckpoint, match=r"pickled.*convert them to safetensors"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "config.json"])
def test_a_single_file_that_is_no_gguf(model: Path, name: str) -> None:
    (model / name).write_bytes(b"something else")
    with pytest.raises(UnsupportedCheckpoint, match="is not a GGUF file"):
        open_checkpoint(model / name)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq, 3 bits"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 3}}, "awq, 3 bits"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 5}}, "fp8"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        (
            {"compression_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}},
            "compressed-tensors",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "torchao"}}}, "torchao"),
        ({"quantization_config": {"bits": 4}}, "unknown, 4 bits"),
        ({"quantization_config": "x"}, "unknown"),
    ],
)
def test_quantized_checkpoints_are_refused_by_method(
    config: dict[str, Any], method: str, tmp_path: Path
) -> None:
    model = folder(tmp_path / "model", **config)
    with pytest.raises(UnsupportedCheckpoint, match=rf"quantized \({method}\)"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("hf_quant_config.json", "modelopt"),
    ],
)
def test_quantized_checkpoints_that_a_side_file_names(file: str, method: str, model: Path) -> None:
    save(model / "model.safetensors", {"a": torch.ones(2)})
    (model / file).write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match=rf"quantized \({method}\)"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "gptq or awq"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight_scale", "compressed-tensors or fp8"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "fp8"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.SCB", "bitsandbytes"),
        ("model.layers.0.mlp.experts.down_proj_blocks", "mxfp4"),
    ],
)
def test_quantized_checkpoints_that_nothing_but_tensors_tell(
    name: str, method: str, model: Path
) -> None:
    save(model / "model.safetensors", {name: torch.ones(2), "a": torch.ones(2)})
    with pytest.raises(UnsupportedCheckpoint, match=rf"quantized \({method}\)"):
        open_checkpoint(model).tensors()


def test_an_empty_word_of_quantization_is_none(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", quantization_config={})
    save(model / "model.safetensors", {"a": torch.ones(2)})
    assert len(open_checkpoint(model).tensors()) == 1


def test_one_file_comes_before_an_index_of_others(model: Path) -> None:
    write_shards(model)
    save(model / "model.safetensors", {"newer": torch.ones(2)})
    assert [t.name for t in open_checkpoint(model).tensors()] == ["newer"]


def test_an_index_that_names_the_usual_file_with_others(model: Path) -> None:
    save(model / "model.safetensors", {"a": torch.ones(2)})
    save(model / "more.safetensors", {"b": torch.ones(2)})
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {t.name for t in open_checkpoint(model).tensors()} == {"a", "b"}


def test_an_unknown_dtype_is_refused(model: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="'int4' is not one of auto, bfloat16, float16"):
        open_checkpoint(model, "int4")
