"""Logits of one pass after the other: memory that nobody holds any more is used again, no other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.workers.model.placed_models import models_of
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.placement.resident import Resident

Pass = Callable[[int], torch.Tensor]


@pytest.fixture
def compute(tmp_path: Path) -> Pass:
    """The logits of so many tokens in a row."""
    model = models_of("llama", tmp_path, torch.bfloat16)(Resident)
    assert model.accelerate(8, 128, 1) is None
    layout = model.geometry.kv_layout
    table = BlockTable(layout, PrivateSource(layout).lease(layout.num_blocks(128)))
    return lambda num_tokens: model.forward(Batch.of([Part(table, [7] * num_tokens, num_tokens)]))


@pytest.mark.parametrize("held", [lambda logits: logits, lambda logits: logits[1:].view(-1)[3:]])
def test_logits_that_somebody_holds_stay(
    compute: Pass, held: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    kept = held(compute(4))
    before = kept.clone()
    others = [compute(3), compute(4)]
    assert torch.equal(kept, before)
    assert len({one.data_ptr() for one in (kept, *others)}) == 3


def test_memory_that_nobody_holds_is_used_again(compute: Pass) -> None:
    address = compute(4).data_ptr()
    for num_rows in (4, 1, 3):
        logits = compute(num_rows)
        assert logits.data_ptr() == address
        assert bool(logits.isfinite().all())
        del logits
