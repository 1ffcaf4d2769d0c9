"""`onecopy eval`, as a person calls it: windows, tokenizers, and what it says where it can't."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator import module_command, module_environment
from tests.workers.tiny_models import reference_model, write_checkpoint, write_tokenizer
from workers import QuantizeRequest, quantize_checkpoint

pytestmark = pytest.mark.slow
TEXT = "Nothing is so painful to the human mind as a great and sudden change."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "model"
    write_checkpoint(folder, "llama", torch.float32)
    return write_tokenizer(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def evaluated(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        module_command("server.cli", "eval", *arguments),
        env=module_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_quantized_model_beside_its_source(model: Path, text: Path, tmp_path: Path) -> None:
    quantize_checkpoint(QuantizeRequest(model, tmp_path / "small", "w8a16"), lambda _told: None)
    run = evaluated(
        *(str(tmp_path / "small"), "--against", str(model), "--text", str(text)),
        *("--window", "30", "--json"),
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    reference, small = found["models"]
    assert (reference["model"], small["model"]) == ("model", "small")
    assert reference["num_tokens"] == len(TEXT) - 3, "a byte is a token, and the first has none"
    assert reference["same_percent"] == 100
    assert reference["divergence"] == 0
    assert 0 < small["divergence"] < 0.5
    assert small["bytes_on_disk"] < reference["bytes_on_disk"]
    assert small["loss_percent"] == pytest.approx(
        100 * (small["perplexity"] / reference["perplexity"] - 1)
    )


def test_a_perplexity_is_that_of_transformers(model: Path, text: Path) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    with torch.inference_mode():
        logits = reference_model("llama")(torch.tensor([ids])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    run = evaluated(str(model), "--text", str(text), "--json")
    assert run.returncode == 0, run.stderr
    [found] = json.loads(run.stdout)["models"]
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert found["loss_percent"] is None


def test_what_can_not_be_evaluated_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "long.txt").write_text(TEXT)
    other = write_checkpoint(tmp_path / "other", "llama", torch.float32)
    write_tokenizer(other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    missing = ["--text", str(tmp_path / "missing.txt")]
    for arguments, words in (
        ([str(model), "--text", str(tmp_path / "empty.txt")], "fewer than 2 tokens"),
        ([str(model), *missing], "No such file"),
        ([str(other), "--against", str(model)], "makes other tokens of the text"),
        ([str(model), "--dtype", "int3"], "int3"),
    ):
        run = evaluated(*arguments)
        assert run.returncode == 1, words
        assert words in run.stderr
        assert run.stderr.count("\n") == 1
