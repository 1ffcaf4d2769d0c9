"""Folders of quantized weights, expanded while they are read or packed: beside compressed-tensors'
own functions, and beside the formulas of those who pack without it."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.workers.tiny_models import prompt, reference_model, write_checkpoint
from workers.checkpoint import open_checkpoint
from workers.checkpoint.formats import expanded
from workers.conformance.greedy import read_whole
from workers.errors import CheckpointMismatch, InvalidSetting, UnsupportedCheckpoint
from workers.evaluation.likelihood import loaded, log_probabilities
from workers.model.decoder import build_model
from workers.packed_format import PackedFormat, decoded, unpack
from workers.placement.packing import open_as_served
from workers.placement.resident import Resident
from workers.quantize.quantize import quantize
from workers.quantize.request import Request
from workers.settings import EngineSettings, checked

SIZES = {"hidden_size": 128, "intermediate_size": 256}
LINEAR = ".mlp.down_proj.weight"


def said(config: dict[str, Any], folder: Path) -> Path:
    """Adds to a folder's config.json what it says of its quantization."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folder


def linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in tensors if "_proj.weight" in name]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain", "llama", torch.bfloat16, **SIZES)


def rewritten(
    plain: Path, folder: Path, config: dict[str, Any], parts: Any
) -> dict[str, torch.Tensor]:
    """Writes a folder where each linear is what `parts` makes of it; returns what was written."""
    tensors = load_file(plain / "model.safetensors")
    for name in linears(tensors):
        module = name.removesuffix(".weight")
        weight = tensors.pop(name)
        tensors |= {f"{module}.{part}": one.contiguous() for part, one in parts(weight).items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    said(config, folder)
    return tensors


def scheme(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def read_packed(folder: Path) -> tuple[dict[str, torch.Tensor], PackedFormat | None]:
    """All tensors, the packed ones as what they say, and how a linear of many columns is packed."""
    checkpoint = open_checkpoint(folder, packs=True)
    formats = decoded(checkpoint.metadata())
    tensors = read_whole(checkpoint)
    assert sum(one.num_bytes for one in checkpoint.tensors()) == sum(
        one.nbytes for one in tensors.values()
    )
    for name, layout in formats.items():
        assert checkpoint.stored_runs(name) == ()
        tensors[name] = unpack(layout, tensors[name]).to(torch.bfloat16)
    return tensors, formats.get(f"model.layers.0{LINEAR}")


COMPRESSED = {
    "4 bits in groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "8 bits by rows": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "8 bits with zero points": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 with zero points": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8 of a tensor": ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8 by rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 of a tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}


STAY_PACKED = {
    "4 bits in groups": PackedFormat(4, 32, True, False),
    "with zero points": PackedFormat(4, 32, True, True),
    "8 bits by rows": PackedFormat(8, 256, True, False),
    "int8": PackedFormat(8, 256, True, False),
    "int8 of a tensor": PackedFormat(8, 256, True, False),
}
"""Of weights with 256 columns; scales are in bfloat16. With zero points 8 bits do not hold them."""


@pytest.mark.parametrize("name", list(COMPRESSED))
def test_compressed_tensors_has_the_same_weights(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, words = COMPRESSED[name]
    how = scheme(**words)
    compressor = BaseCompressor.get_value_from_registry(form)
    expected: dict[str, torch.Tensor] = {}

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        grouped = weight.unflatten(-1, (-1, words.get("group_size", weight.shape[1])))
        if words["strategy"] == "tensor":
            low, high = weight.min().view(1), weight.max().view(1)
        else:
            low, high = grouped.amin(-1), grouped.amax(-1)
        scales, zero = calculate_qparams(low, high, how.weights)
        given = {"weight": weight, "weight_scale": scales, "weight_zero_point": zero}
        made = compressor.compress(given, how)
        expected[str(len(expected))] = compressor.decompress(made, how)["weight"]
        return {**made, "input_scale": torch.ones(1)}

    config = QuantizationConfig(config_groups={"group_0": how}, format=form).model_dump()
    rewritten(plain, tmp_path / "out", config, parts)
    monkeypatch.setattr(expanded, "SCRATCH_BYTES", 4096)
    found = read_whole(open_checkpoint(tmp_path / "out"))
    names = linears(load_file(plain / "model.safetensors"))
    for tensor, weight in zip(names, expected.values(), strict=True):
        assert torch.equal(found[tensor], weight.to(torch.bfloat16)), tensor
    assert set(found) == set(load_file(plain / "model.safetensors"))
    again, layout = read_packed(tmp_path / "out")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[one], found[one]) for one in found)
    assert layout == STAY_PACKED.get(name)


@pytest.mark.parametrize("scheme_name", ["w4a16", "w8a8"])
def test_what_was_quantized_here_computes_as_its_weights(
    scheme_name: str, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(Request(plain, tmp_path / "out", scheme_name), lambda _progress: None)
    checkpoint = open_checkpoint(tmp_path / "out")
    with caplog.at_level(logging.INFO, "onecopy.instance"):
        tensors = read_whole(checkpoint)
    assert "21 weights are expanded to bfloat16 while they are read" in caplog.text
    assert checkpoint.stored_runs("model.layers.0.mlp.up_proj.weight") == ()
    config = json.loads(checkpoint.metadata()["config"])
    assert "quantization_config" not in config
    build_model(config, Resident(tensors), torch.bfloat16)
    if scheme_name == "w4a16":  # with the other, transformers rounds activations, too
        ours = reference_model("llama", torch.bfloat16, **SIZES)
        ours.load_state_dict(tensors)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        ids = torch.tensor([prompt(9)])
        with torch.inference_mode():
            assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("scheme_name", ["w4a16", "w8a8", "w8a16"])
def test_what_was_quantized_here_is_computed_packed(scheme_name: str, tmp_path: Path) -> None:
    """Of a model in float16, which kernels compute in bfloat16."""
    plain = write_checkpoint(tmp_path / "plain", "llama", torch.float16, **SIZES)
    quantize(Request(plain, tmp_path / "out", scheme_name), lambda _progress: None)
    as_is = EngineSettings()
    checkpoint = open_as_served(tmp_path / "out", as_is)
    assert checkpoint.dtype == torch.bfloat16
    assert len(decoded(checkpoint.metadata())) == 21
    window = prompt(60)
    found, exact = (
        torch.cat([rows for _, rows in log_probabilities(loaded(one, len(window), as_is), window)])
        for one in (checkpoint, open_checkpoint(tmp_path / "out", "float32"))
    )
    assert (found - exact).square().mean().sqrt() < 0.2 * exact.std(), "of random weights"


def test_what_is_computed_in_float32_stays_expanded(plain: Path, tmp_path: Path) -> None:
    quantize(Request(plain, tmp_path / "out", "w8a16"), lambda _progress: None)
    for settings in ({"dtype": "float32"}, {"weights": "bf16"}, {"tensor_parallel_size": 9}):
        checkpoint = open_as_served(tmp_path / "out", checked(settings))
        assert not decoded(checkpoint.metadata())
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}))
    assert not decoded(open_as_served(tmp_path / "out", EngineSettings()).metadata())
    with pytest.raises(InvalidSetting, match=r"--weights packed: nothing in .* can be packed"):
        open_as_served(tmp_path / "out", checked({"weights": "packed"}))


def test_a_checkpoint_that_was_quantized_otherwise_has_another_fingerprint(
    plain: Path, tmp_path: Path
) -> None:
    quantize(Request(plain, tmp_path / "a", "w8a16"), lambda _progress: None)
    before = open_checkpoint(tmp_path / "a").fingerprint()
    file = tmp_path / "a" / "config.json"
    file.write_text(file.read_text().replace('"dynamic": false', '"dynamic": true'))
    assert open_checkpoint(tmp_path / "a").fingerprint() != before


def packed(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of levels along the first dimension, low bits first, as GPTQ's tools write them."""
    words = torch.zeros(levels.shape[0] * bits // 32, *levels.shape[1:], dtype=torch.int64)
    for place in range(32 // bits):
        words |= levels[place :: 32 // bits].long() << (place * bits)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize(
    ("bits", "form", "ordered", "zero_points", "stay_packed"),
    [
        (4, "gptq", False, None, PackedFormat(4, 64, True, True)),
        (4, "gptq", False, 8, PackedFormat(4, 64, False, False)),
        (4, "gptq_v2", True, None, None),
        (8, "gptq", False, 128, PackedFormat(8, 64, False, False)),
        (8, "gptq", False, None, None),
        (8, "gptq", True, 128, None),
    ],
)
def test_gptq(
    bits: int,
    form: str,
    ordered: bool,
    zero_points: int | None,
    stay_packed: PackedFormat | None,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(5)
    expected: list[torch.Tensor] = []

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        groups = torch.arange(columns) // 64
        if ordered:
            groups = groups[torch.randperm(columns, generator=generator)]
        levels = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
        zero = torch.randint(1, 1 << bits, (columns // 64, rows), generator=generator)
        if zero_points is not None:
            zero.fill_(zero_points)
        scales = (torch.rand(columns // 64, rows, generator=generator) * 0.01).half()
        expected.append(((levels - zero[groups]).float() * scales[groups].float()).T)
        stored_zero = zero - int(form == "gptq")
        return {
            "qweight": packed(levels, bits),
            "qzeros": packed(stored_zero.T, bits).T,
            "scales": scales,
            "g_idx": groups.to(torch.int32),
            "bias": torch.zeros(rows, dtype=torch.float16),
        }

    config = {"quant_method": "gptq", "bits": bits, "group_size": 64, "checkpoint_format": form}
    rewritten(plain, tmp_path / "out", config, parts)
    monkeypatch.setattr(expanded, "SCRATCH_BYTES", 4096)
    found = read_whole(open_checkpoint(tmp_path / "out"))
    for name, weight in zip(linears(load_file(plain / "model.safetensors")), expected, strict=True):
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name
    assert not [name for name in found if name.endswith(".bias")]
    again, layout = read_packed(tmp_path / "out")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[one], found[one]) for one in found)
    assert layout == stay_packed


def test_awq(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    words = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    converter = AutoAWQConverter.from_autoawq_config(words)
    expected: list[torch.Tensor] = []

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        bounds = (-(1 << 31), 1 << 31)
        levels = torch.randint(*bounds, (columns, rows // 8), generator=generator)
        zeros = torch.randint(*bounds, (columns // 64, rows // 8), generator=generator)
        made = {"qweight": levels.to(torch.int32), "qzeros": zeros.to(torch.int32)}
        scales = (torch.rand(columns // 64, rows, generator=generator) * 0.01).half()
        coarse, scale, zero = converter._convert_gemm_module(
            made["qweight"], scales, made["qzeros"]
        )
        assert zero is not None
        steps = coarse.view(rows, -1, 64).float() - zero.view(rows, -1, 1)
        expected.append((steps * scale.view(rows, -1, 1).float()).view(rows, columns))
        return {**made, "scales": scales}

    rewritten(plain, tmp_path / "out", words, parts)
    monkeypatch.setattr(expanded, "SCRATCH_BYTES", 4096)
    found = read_whole(open_checkpoint(tmp_path / "out"))
    for name, weight in zip(linears(load_file(plain / "model.safetensors")), expected, strict=True):
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name
    again, layout = read_packed(tmp_path / "out")
    assert all(torch.equal(again[one], found[one]) for one in found)
    assert layout == PackedFormat(4, 64, True, True)


def test_fp8_in_blocks(plain: Path, tmp_path: Path) -> None:
    """Of a size that divides neither rows nor columns."""
    height, width = 48, 80
    expected: list[torch.Tensor] = []

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        scales = torch.rand(-(-rows // height), -(-columns // width)) + 0.5
        coarse = weight.to(torch.float8_e4m3fn)
        wide = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        expected.append(coarse.float() * wide)
        return {"weight": coarse, "weight_scale_inv": scales}

    config = {"quant_method": "fp8", "weight_block_size": [height, width]}
    rewritten(plain, tmp_path / "out", config, parts)
    found = read_whole(open_checkpoint(tmp_path / "out"))
    for name, weight in zip(linears(load_file(plain / "model.safetensors")), expected, strict=True):
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name


def broken(plain: Path, tmp_path: Path) -> Iterator[tuple[Path, type[Exception], str]]:
    quantize(Request(plain, tmp_path / "sound", "w4a16", group_size=32), lambda _progress: None)
    sound = load_file(tmp_path / "sound" / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    changes: list[tuple[str, Any, type[Exception], str]] = [
        ("weight_scale", None, CheckpointMismatch, "has no .weight_scale"),
        ("weight_shape", None, CheckpointMismatch, "no weight_shape"),
        ("weight_shape", torch.tensor([128, 300]), UnsupportedCheckpoint, "neither of 4 bits"),
        ("weight_shape", torch.tensor([127, 256]), CheckpointMismatch, "it would be"),
        ("weight_scale", torch.ones(128, 7), CheckpointMismatch, "no 7 groups"),
        ("weight_scale", torch.ones(3, 8), CheckpointMismatch, "does not fit its scales"),
        ("weight_packed", torch.ones(128, 32), CheckpointMismatch, "torch.float32"),
        ("weight_packed", torch.ones(2, 128, 32).int(), UnsupportedCheckpoint, "no matrix"),
        ("weight_g_idx", torch.full((256,), 9).int(), CheckpointMismatch, "does not fit"),
        ("weight_zero_point", torch.ones(3, 8).int(), CheckpointMismatch, "does not fit"),
        ("weight_zero_point", torch.ones(3, 8).char(), CheckpointMismatch, "does not fit"),
    ]
    for number, (part, value, error, message) in enumerate(changes):
        folder = tmp_path / f"broken{number}"
        folder.mkdir()
        tensors = {**sound, f"{module}.{part}": value}
        kept = {name: one for name, one in tensors.items() if one is not None}
        save_file(kept, folder / "model.safetensors")
        (folder / "config.json").write_bytes((tmp_path / "sound" / "config.json").read_bytes())
        yield folder, error, message


def test_what_does_not_fit_together_is_refused_by_name(plain: Path, tmp_path: Path) -> None:
    for folder, error, message in broken(plain, tmp_path):
        for packs in (False, True):
            with pytest.raises(error, match=message) as told:
                read_whole(open_checkpoint(folder, packs=packs))
            assert "model.layers.1.mlp.down_proj" in str(told.value) or "4 bits" in str(told.value)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "awq", "bits": 4, "version": 5},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quant_method": "compressed-tensors", "transform_config": {"a": 1}},
        {"quant_method": "fp8", "weight_block_size": [128, "x"]},
        {"quant_method": "mxfp4"},
    ],
    ids=str,
)
def test_other_methods_stay_refused(config: dict[str, Any], plain: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="is quantized"):
        open_checkpoint(said(config, plain))


def test_a_config_that_promises_levels_that_are_not_there(plain: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="is quantized"):
        open_checkpoint(said({"quant_method": "fp8"}, plain)).tensors()
