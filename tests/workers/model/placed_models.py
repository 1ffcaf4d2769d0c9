"""Tiny models whose weights are placed in some way, and what they compute."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tests.workers.model.tiny_families import save, tiny_model
from tests.workers.tiny_models import prompt
from workers.checkpoint import open_checkpoint
from workers.conformance.greedy import read_whole
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.decoder import Model, build_model
from workers.model.stretch import Placement

NATIVE = ["llama", "qwen3", "gemma3", "gpt_neox", "mixtral", "phi"]


def logits_of(model: Model) -> list[torch.Tensor]:
    """Of two sequences together, then of one more token of each."""
    layout = model.geometry.kv_layout
    source = PrivateSource(layout)
    tables = [BlockTable(layout, source.lease(4)) for _ in range(2)]
    most = model.geometry.vocab_size
    beginnings = [[t % most for t in prompt(n, seed=s)] for n, s in ((21, 1), (6, 2))]
    batches = [
        [Part(table, tokens, 2) for table, tokens in zip(tables, beginnings, strict=True)],
        [Part(tables[0], [7], 1), Part(tables[1], [9], 0)],
        [Part(tables[1], [11], 0)],
        [Part(table, [5], 1) for table in tables],
    ]
    return [model.forward(Batch.of(parts)) for parts in batches]


Placed = Callable[[Mapping[str, torch.Tensor]], Placement]


def models_of(family: str, tmp_path: Path, dtype: torch.dtype) -> Callable[[Placed], Model]:
    """The model with its weights placed in some way."""
    checkpoint = open_checkpoint(save(tiny_model(family).to(dtype), tmp_path))
    tensors = read_whole(checkpoint)
    config = json.loads(checkpoint.metadata()["config"])

    return lambda placed: build_model(config, placed(tensors), dtype)
