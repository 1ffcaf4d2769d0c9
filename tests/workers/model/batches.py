"""Batches in which sequences begin, go on and are left out, for whoever compares two ways of
computing a model."""

import torch

from tests.workers.tiny_models import prompt
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.decoder import Model


def logits_of(model: Model) -> list[torch.Tensor]:
    """Of two sequences together, then of one more token of each."""
    layout = model.geometry.kv_layout
    source = PrivateSource(layout)
    tables = [BlockTable(layout, source.lease(4)) for _ in range(2)]
    beginnings = [prompt(21, seed=1), prompt(6, seed=2)]
    batches = [
        [Part(table, tokens, 2) for table, tokens in zip(tables, beginnings, strict=True)],
        [Part(tables[0], [7], 1), Part(tables[1], [9], 0)],
        [Part(tables[1], [11], 0)],
        [Part(table, [5], 1) for table in tables],
    ]
    return [model.forward(Batch.of(parts)) for parts in batches]
