"""Whole checkpoints: what is written, that others read it, and that nothing which ends, fills or
changes a run makes it another."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from allocator import DiskFull
from tests.leaks import wait_until
from tests.quick import few_quick
from tests.workers.model import tiny_families
from tests.workers.quantize.test_rounding import as_bytes, tile_of
from tests.workers.tiny_models import CONFIGS, prompt, write_checkpoint, write_tokenizer
from workers.errors import (
    CheckpointChanged,
    OutputDamaged,
    OutputExists,
    QuantizationRefused,
    UnsupportedCheckpoint,
)
from workers.quantize import plan
from workers.quantize.journal import DIGEST_BYTES, Journal
from workers.quantize.policy import Choices, decide, head_module
from workers.quantize.quantize import quantize
from workers.quantize.reference import NumpyRounding
from workers.quantize.request import Made, Request
from workers.quantize.scheme import Scheme, scheme_of

SMALLEST = 1 << 12
"""Of a chunk, for one thread: the least piece that there is."""
WORDS: dict[str, dict[str, Any]] = {
    "w4a16": {"scheme": "w4a16"},
    "w4a16-asym-32": {"scheme": "w4a16", "symmetric": False, "group_size": 32},
    "w4a16-clip": {"scheme": "w4a16", "searches_clip": True},
    "w8a16": {"scheme": "w8a16"},
    "w8a16-asym": {"scheme": "w8a16", "symmetric": False},
    "w8a16-64": {"scheme": "w8a16", "group_size": 64},
    "w8a8": {"scheme": "w8a8"},
    "w8a8-clip": {"scheme": "w8a8", "searches_clip": True},
}


def made(source: Path, destination: Path, scheme: str | None = "w4a16", **said: Any) -> Made:
    return quantize(Request(source, destination, scheme, **said), lambda _progress: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_checkpoint(folder, "llama", torch.bfloat16, hidden_size=128, intermediate_size=384)
    write_tokenizer(folder)
    (folder / "README.md").write_text("# of another model")
    (folder / "LICENSE").write_text("as you like")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that no piece holds, and as many as no word of zero points has."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "model.layers.0.mlp.down_proj.weight": torch.randn(
            13, 9000 // 128 * 128, generator=generator
        ),
        "model.layers.0.mlp.up_proj.weight": torch.randn(70, 128, generator=generator),
        "model.layers.0.input_layernorm.weight": torch.randn(5000, generator=generator),
    }
    save_file({name: one.bfloat16() for name, one in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# --- what is written


@pytest.mark.parametrize("words", few_quick(WORDS.values(), 3), ids=str)
def test_any_chunk_gives_what_the_whole_tensor_gives(
    words: dict[str, Any], wide: Path, tmp_path: Path
) -> None:
    chunks = {"small": (SMALLEST, 1), "some": (3 * 7000, 3), "large": (1 << 26, 2)}
    for name, (chunk, threads) in chunks.items():
        made(wide, tmp_path / name, **words, chunk_bytes=chunk, num_threads=threads)
    found = {name: contents(tmp_path / name) for name in chunks}
    assert found["small"] == found["some"] == found["large"]
    stored = load_file(tmp_path / "small" / "model.safetensors")
    for name, weight in load_file(wide / "model.safetensors").items():
        if weight.dim() == 1:
            assert torch.equal(stored[name], weight)
            continue
        how = scheme_for(wide, words)
        tile = tile_of(weight, how)
        assert NumpyRounding().rows(tile) == -1
        module = name.removesuffix(".weight")
        levels = stored[f"{module}.weight_packed" if how.is_packed else name]
        assert as_bytes(levels).tobytes() == tile.levels.tobytes()
        assert as_bytes(stored[f"{module}.weight_scale"]).tobytes() == tile.scales.tobytes()


def scheme_for(source: Path, words: dict[str, Any]) -> Scheme:
    weights = load_file(source / "model.safetensors").values()
    return scheme_of(
        words["scheme"],
        words.get("group_size"),
        words.get("symmetric", True),
        words.get("searches_clip", False),
        [one.shape[1] for one in weights if one.dim() > 1],
    )


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """By compressed-tensors itself, each tensor by its scheme."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    found: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
    for module, parts in modules.items():
        if "weight_scale" in parts:
            parts = compressor.decompress(parts, scheme)
        found[f"{module}.weight"] = parts["weight"]
    return found


@pytest.mark.parametrize("name", list(WORDS))
def test_compressed_tensors_reads_it(name: str, model: Path, tmp_path: Path) -> None:
    result = made(model, tmp_path / "out", **WORDS[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig.model_validate(config).model_dump(exclude_unset=False)
    for word, value in theirs.items():
        if word != "config_groups":
            assert config[word] == value, word
    weights = config["config_groups"]["group_0"]["weights"]
    assert theirs["config_groups"]["group_0"]["weights"].items() <= weights.items()
    found, limit = decompressed(tmp_path / "out"), 0.13 if "w4" in name else 0.01
    for tensor, weight in load_file(model / "model.safetensors").items():
        off = (found[tensor].float() - weight.float()).norm() / weight.float().norm()
        assert off == 0 if "proj" not in tensor else 0 < off <= limit, tensor
    assert result.bits_per_weight <= (4.7 if "w4" in name else 8.4)


@pytest.mark.parametrize("name", few_quick([one for one in WORDS if "asym" not in one], 3))
def test_transformers_computes_with_what_the_levels_stand_for(
    name: str, model: Path, tmp_path: Path
) -> None:
    """But for zero points: transformers 5.23 does not load those that compressed-tensors 0.20
    itself packs, since it makes room for unpacked ones."""
    made(model, tmp_path / "out", **WORDS[name])
    ids = torch.tensor([prompt(12)])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ours = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    with torch.inference_mode():
        logits = theirs(ids).logits
    found = decompressed(tmp_path / "out")
    weights = {name: found[name].to(one.dtype) for name, one in ours.state_dict().items()}
    ours.load_state_dict(weights)
    for tensor, weight in theirs.state_dict().items():
        if tensor.endswith(".weight"):
            assert torch.equal(weight.to(torch.bfloat16), weights[tensor]), tensor
    if not name.startswith("w8a8"):  # whose activations are rounded, too
        with torch.inference_mode():
            assert torch.equal(ours(ids).logits, logits)


def test_a_tied_model_and_one_of_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_SHARD_BYTES", 40_000)
    write_checkpoint(tmp_path / "model", "llama-tied", torch.float16)
    made(tmp_path / "model", tmp_path / "out", "w8a16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert index["metadata"]["total_size"] < sum(sizes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_all_else_goes_along(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "out")
    found, source = contents(tmp_path / "out"), contents(model)
    assert set(found) == set(source) - {"README.md"}
    for name in ("tokenizer.json", "generation_config.json", "LICENSE"):
        assert found[name] == source[name]
    config = json.loads(found["config.json"])
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    assert config == json.loads(source["config.json"])
    assert not list(tmp_path.glob(".*"))


def test_sizes_are_those_of_the_scheme(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    write_checkpoint(tmp_path / "model", "llama", torch.bfloat16, **sizes)
    for scheme, group, most in (("w4a16", 128, 4.25), ("w8a16", None, 8.25), ("w8a8", None, 8.25)):
        result = made(tmp_path / "model", tmp_path / scheme, scheme, group_size=group)
        assert result.bits_per_weight <= most
        size = (tmp_path / scheme / "model.safetensors").stat().st_size
        assert size == result.output_bytes
        assert sum(one.output_bytes for one in result.groups) < size


# --- who decides


@pytest.mark.parametrize("family", few_quick([*CONFIGS, *tiny_families.FAMILIES]))
def test_linears_are_told_by_their_names(family: str) -> None:
    config = tiny_families.tiny_config(family)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    linears = {
        f"{name}.weight" for name, one in module.named_modules() if type(one) is torch.nn.Linear
    }
    names = [name for name, _ in module.named_parameters()]
    not_rounded = {head_module(names, config.model_type)}
    rounded = set()
    for name, parameter in module.named_parameters():
        what = decide(name, "BF16", parameter.shape, config.model_type, Choices())
        if what.action == "round":
            rounded.add(name)
        elif what.module is not None:
            not_rounded.add(what.module)
        if what.action == "refuse":
            assert parameter.dim() == 3 or family == "gpt2", name
    assert rounded <= linears
    assert linears - rounded <= {f"{one}.weight" for one in not_rounded}, "told to be no linears"
    assert len(rounded) >= 9 or family == "gpt2"


def test_what_is_kept_by_name(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "out", choices=Choices(("down_proj", r"layers\.2\.")))
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.down_proj.weight" in names
    assert "model.layers.2.mlp.up_proj.weight" in names
    assert "model.layers.1.mlp.up_proj.weight_packed" in names
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")


def test_the_head_is_rounded_where_it_is_wanted(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "out", choices=Choices(rounds_head=True))
    assert "lm_head.weight_packed" in load_file(tmp_path / "out" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")


def refused_models(tmp_path: Path) -> Iterator[tuple[Path, dict[str, Any], str]]:
    plain = write_checkpoint(tmp_path / "plain", "llama", torch.bfloat16)
    yield plain, {"scheme": "w5a16"}, "'w5a16' is not one of w8a16, w8a8, w4a16"
    yield plain, {"scheme": "w8a8", "group_size": 32}, "leave out --group-size"
    yield plain, {"scheme": "w8a8", "symmetric": False}, "leave out --group-size and --asymmetric"
    yield plain, {"scheme": "w4a16", "group_size": 48}, "groups of 48 are not computed"
    yield plain, {"scheme": "w4a16", "group_size": 128}, "has 96 columns|has 64 columns"
    yield plain, {"choices": Choices(("(",))}, "is no regular expression"
    yield plain, {"choices": Choices((".",))}, "holds no linear"
    for number, (at, bad) in enumerate([((3, 5), float("nan")), ((63, 95), float("inf"))]):
        folder = write_checkpoint(tmp_path / f"bad{number}", "llama", torch.bfloat16)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][at] = bad
        save_file(tensors, folder / "model.safetensors")
        named = rf"layers.1.mlp.down_proj.weight holds NaN or an infinity at \[{at[0]}, {at[1]}\]"
        yield folder, {}, named
    for family, named in (("gpt_oss", "experts in one tensor"), ("gpt2", "a transposed linear")):
        folder = tmp_path / family
        tiny_families.save(tiny_families.tiny_model(family), folder)
        yield folder, {}, named
    integers = write_checkpoint(tmp_path / "integers", "llama", torch.bfloat16)
    tensors = load_file(integers / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
    save_file(tensors, integers / "model.safetensors")
    yield integers, {}, "its dtype is I8"


def test_what_can_not_be_written_is_refused_by_name(tmp_path: Path) -> None:
    for source, words, message in refused_models(tmp_path):
        with pytest.raises(QuantizationRefused, match=message):
            made(source, tmp_path / "out", **words)
        assert not (tmp_path / "out").exists()


def test_what_a_refusal_advises_helps(tmp_path: Path) -> None:
    tiny_families.save(tiny_families.tiny_model("gpt_oss").bfloat16(), tmp_path / "model")
    with pytest.raises(QuantizationRefused, match="--keep") as refused:
        made(tmp_path / "model", tmp_path / "out")
    pattern = str(refused.value).partition("--keep '")[2].rpartition("'")[0].replace("\\\\", "\\")
    made(tmp_path / "model", tmp_path / "out", choices=Choices((pattern,)))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")


def test_rounding_twice_is_refused(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "once")
    with pytest.raises(UnsupportedCheckpoint, match="quantized already"):
        made(tmp_path / "once", tmp_path / "twice")


# --- what may happen


def started(source: Path, destination: Path, **said: Any) -> "subprocess.Popen[str]":
    program = Path(__file__).with_name("quantize_program.py")
    return subprocess.Popen(
        [sys.executable, "-P", str(program), str(source), str(destination), json.dumps(said)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def num_done(journal: Path) -> int:
    """Units that a journal says are done."""
    try:
        content = journal.read_bytes()
    except FileNotFoundError:
        return 0
    digests = np.frombuffer(content[4096:], np.uint64).reshape(-1, DIGEST_BYTES // 8)
    return int(digests.any(axis=1).sum())


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 3,000 of the least pieces."""
    folder = tmp_path_factory.mktemp("longer") / "model"
    write_checkpoint(
        *(folder, "llama", torch.bfloat16),
        **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6},
    )
    return folder


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_run_again_it_writes_the_same(
    num_kills: int, longer: Path, tmp_path: Path
) -> None:
    words: dict[str, Any] = {"scheme": "w4a16", "symmetric": False, "chunk_bytes": 4 * SMALLEST}
    made(longer, tmp_path / "expected", **words)
    journal = tmp_path / ".out.quantizing" / "journal"
    points = sorted(random.Random(num_kills).sample(range(2500), num_kills))
    num_kept = []
    for point in points:
        with started(longer, tmp_path / "out", **words) as run:
            wait_until(
                lambda point=point, run=run: num_done(journal) > point or run.poll() is not None,
                f"{point} units",
            )
            run.kill()
        num_kept.append(num_done(journal))
        if (tmp_path / "out").exists():
            break
        assert num_kept[-1] > point
    assert num_kept == sorted(num_kept), "what was done stays done"
    if not (tmp_path / "out").exists():
        result = made(longer, tmp_path / "out", **words)
        assert result.resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not journal.parent.exists()


def interrupted(source: Path, destination: Path, **said: Any) -> Path:
    """What a run leaves that was stopped when some of it was done."""

    def stop(progress: Any) -> None:
        if progress.done_bytes > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(
            Request(source, destination, **{"scheme": "w4a16", **said}, chunk_bytes=SMALLEST), stop
        )
    return destination.with_name(f".{destination.name}.quantizing")


def test_what_was_damaged_meanwhile_is_written_again(longer: Path, tmp_path: Path) -> None:
    made(longer, tmp_path / "expected")
    staging = interrupted(longer, tmp_path / "out")
    file = staging / "output" / "model.safetensors"
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), 997):
        content[place] ^= 0x55
    file.write_bytes(content)
    made(longer, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_disk_that_keeps_something_else_is_noticed(
    longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = os.fdatasync

    def rotten(descriptor: int) -> None:
        place = os.fstat(descriptor).st_size - 1
        os.pwrite(descriptor, b"\xff", place)
        os.pwrite(descriptor, b"\xfe", place - 1)
        kept(descriptor)

    monkeypatch.setattr(os, "fdatasync", rotten)
    with pytest.raises(OutputDamaged, match="see whether the disk is sound"):
        made(longer, tmp_path / "out")
    monkeypatch.undo()
    made(longer, tmp_path / "out")
    made(longer, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_source_that_changed_is_noticed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", torch.bfloat16, hidden_size=128)
    staging = interrupted(source, tmp_path / "out")
    os.utime(source / "model.safetensors")
    with pytest.raises(CheckpointChanged, match=f"{staging}.*source has changed"):
        made(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_wish_is_no_continuation(longer: Path, tmp_path: Path) -> None:
    interrupted(longer, tmp_path / "out")
    with pytest.raises(CheckpointChanged, match="the options have changed since: remove it"):
        made(longer, tmp_path / "out", group_size=32)


def test_another_chunk_is_a_continuation(longer: Path, tmp_path: Path) -> None:
    interrupted(longer, tmp_path / "out")
    assert made(longer, tmp_path / "out", chunk_bytes=1 << 20).resumed_bytes > 0
    made(longer, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", torch.bfloat16, hidden_size=128)
    request = Request(source, tmp_path / "out", "w4a16")
    with pytest.raises(CheckpointChanged, match="has changed while it was read"):
        quantize(request, lambda _progress: os.utime(source / "model.safetensors"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists, match="remove it, or choose another name"):
        made(model, tmp_path / "out")
    with pytest.raises(OutputExists, match="is no folder: make it first"):
        made(model, tmp_path / "missing" / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_two_do_not_write_the_same(longer: Path, tmp_path: Path) -> None:
    staging = interrupted(longer, tmp_path / "out")
    journal = Journal.opened(staging / "journal")
    assert journal is not None
    with pytest.raises(OutputExists, match="another process is writing"):
        made(longer, tmp_path / "out")
    journal.close()
    made(longer, tmp_path / "out")


def test_what_ended_behind_the_last_step_leaves_nothing(longer: Path, tmp_path: Path) -> None:
    staging = interrupted(longer, tmp_path / "out")
    made(longer, tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "out")
    for file in (staging / "output").iterdir():
        file.unlink()
    (staging / "output").rmdir()
    with pytest.raises(OutputExists):
        made(longer, tmp_path / "out")
    assert not staging.exists()


def test_a_full_disk_is_found_out_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs(tmp_path)
    few = os.statvfs_result((*status[:3], 1, 1, *status[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _path: few)
    with pytest.raises(DiskFull, match="GB are needed"):
        made(model, tmp_path / "out")


def test_a_file_without_room_is_told_and_gone_on_with(longer: Path, tmp_path: Path) -> None:
    with started(longer, tmp_path / "out", scheme="w4a16", most_file_bytes=1 << 20) as run:
        _, told = run.communicate()
    assert run.returncode == 1
    assert "DiskFull" in told
    assert "has no room for" in told
    made(longer, tmp_path / "out")


@pytest.mark.parametrize("scheme", few_quick(["w4a16", "w8a16", "w8a8"]))
def test_memory_is_that_of_the_chunk(scheme: str, tmp_path: Path) -> None:
    """Of a tensor that is 24 chunks large, and one of which a row is 8."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.ones(3 << 12, 1 << 10, dtype=torch.bfloat16),
        "model.layers.0.mlp.down_proj.weight": torch.ones(3, 4 << 20, dtype=torch.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")
    del tensors
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with started(folder, tmp_path / "out", scheme=scheme, chunk_bytes=1 << 20) as run:
        told, errors = run.communicate()
    assert run.returncode == 0, errors
    assert int(told) <= 8 << 20
