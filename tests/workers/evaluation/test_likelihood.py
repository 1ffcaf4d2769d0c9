"""The sums over a window, beside those of torch over the logits of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.tiny_models import prompt, reference_model, write_checkpoint
from workers.checkpoint import open_checkpoint
from workers.errors import InvalidSetting, UnsupportedCheckpoint
from workers.evaluation.likelihood import loaded, score
from workers.model.decoder import Model
from workers.settings import checked


def model_of(folder: Path, longest: int, **settings: str) -> Model:
    return loaded(open_checkpoint(folder), longest, checked(settings))


@pytest.mark.parametrize("length", [2, 64, 65, 150])
def test_sums_are_those_of_torch(length: int, tmp_path: Path) -> None:
    """Over the borders of what is computed at a time."""
    ids = prompt(length)
    logits: list[Any] = []
    models = []
    for changes in ({}, {"rms_norm_eps": 0.3}):
        name = tmp_path / str(len(models))
        write_checkpoint(name, "llama", torch.float32, **changes)
        models.append(model_of(name, length))
        with torch.inference_mode():
            theirs = reference_model("llama", torch.float32, **changes)
            logits.append(theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1))
    reference, ours = logits
    expected = torch.nn.functional.nll_loss(ours, torch.tensor(ids[1:]), reduction="sum")
    divergence = torch.nn.functional.kl_div(ours, reference, reduction="sum", log_target=True)
    with torch.inference_mode():
        found = score(models[1], ids, models[0])
        alone = score(models[1], ids, None)
    assert found.num_tokens == alone.num_tokens == length - 1
    assert found.loss == alone.loss == pytest.approx(float(expected), rel=1e-4)
    assert found.divergence == pytest.approx(float(divergence), rel=1e-3, abs=1e-4)
    assert found.num_same == int((ours.argmax(-1) == reference.argmax(-1)).sum())


def test_other_vocabularies_are_not_compared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", "llama")
    write_checkpoint(tmp_path / "b", "llama", vocab_size=400)
    models = [model_of(tmp_path / name, 8) for name in "ab"]
    with pytest.raises(UnsupportedCheckpoint, match="has 320 tokens and the model 400"):
        score(models[1], prompt(8), models[0])


def test_keys_and_values_are_kept_as_an_instance_would(tmp_path: Path) -> None:
    folder, ids = write_checkpoint(tmp_path / "bf16", "llama", torch.bfloat16), prompt(150)
    names = ("auto", "bf16", "int8", "int4")
    with torch.inference_mode():
        losses = [score(model_of(folder, 150, kv_cache_dtype=n), ids, None).loss for n in names]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    folder = write_checkpoint(tmp_path / "fp32", "llama", torch.float32)
    with pytest.raises(InvalidSetting, match="--kv-cache-dtype is int8"):
        model_of(folder, 150, kv_cache_dtype="int8")
