"""What a model thinks of the tokens of a text, and how far its opinion is from another's.

Owns the sums. Invariants: a window is computed in pieces, whose logits alone are held; sums are of
fp32 values, in fp64; what is compared are the distributions behind the same tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from workers.checkpoint import Checkpoint, metadata_of
from workers.config.encoder_settings import task_of
from workers.conformance.greedy import read_whole
from workers.errors import UnsupportedCheckpoint
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.decoder import Model, build_model
from workers.packed_format import decoded
from workers.placement.kept import check_kept, require_kept
from workers.placement.resident import Resident
from workers.settings import EngineSettings
from workers.weight_format import float_dtype

_STEP_TOKENS: Final = 64
"""As many have logits at a time: 64 MB each of a vocabulary of 262,144."""


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the tokens of a window that have one before them: of -log p; of the divergence of
    the reference's distribution from the model's; of how often both have the same favourite."""

    num_tokens: int
    loss: float
    divergence: float = 0.0
    num_same: int = 0


def loaded(checkpoint: Checkpoint, window_tokens: int, settings: EngineSettings) -> Model:
    """In private memory, computing as an instance of these settings would. Raises WorkerError."""
    metadata = _metadata(checkpoint)
    check_kept(checkpoint, settings)
    tensors = read_whole(checkpoint)
    dtype = checkpoint.dtype or float_dtype(tensors)
    model = build_model(
        json.loads(metadata["config"]),
        Resident(tensors),
        dtype,
        packed=decoded(metadata),
        kv_bits=settings.kv_bits,
    )
    reason = model.accelerate(_STEP_TOKENS, window_tokens, torch.get_num_threads())
    require_kept(settings, dtype, reason)
    return model


def score(model: Model, window: Sequence[int], reference: Model | None) -> Score:
    """Raises UnsupportedCheckpoint where vocabularies differ."""
    num_tokens, num_same, loss, divergence = 0, 0, 0.0, 0.0
    theirs = None if reference is None else log_probabilities(reference, window)
    for begin, ours in log_probabilities(model, window):
        other = None if theirs is None else next(theirs)[1]
        targets = torch.tensor(window[begin + 1 : begin + 1 + len(ours)])
        rows = ours[: len(targets)]  # nothing follows the last one
        num_tokens += len(targets)
        loss -= float(rows.gather(1, targets[:, None]).double().sum())
        if other is not None:
            if other.shape != ours.shape:
                raise UnsupportedCheckpoint(
                    f"the reference has {other.shape[1]} tokens and the model {ours.shape[1]}: "
                    "they can't be compared"
                )
            wanted = other[: len(targets)]
            divergence += float((wanted.exp() * (wanted - rows)).double().sum())
            num_same += int((wanted.argmax(-1) == rows.argmax(-1)).sum())
    return Score(num_tokens, loss, divergence, num_same)


def log_probabilities(model: Model, window: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Of what follows each token # [some tokens, vocab_size] fp32, with the place of the first."""
    layout = model.geometry.kv_layout
    memory = PrivateSource(layout, model.device, layout.num_bytes(len(window)))
    table = BlockTable(layout)
    for begin in range(0, len(window), _STEP_TOKENS):
        part = window[begin : begin + _STEP_TOKENS]
        blocks = memory.lease(table.num_missing(begin + len(part)))
        memory.release(table.grow(begin + len(part), blocks))
        logits = model.forward(Batch.of([Part(table, part, len(part))]))
        yield begin, logits.float().cpu().log_softmax(-1)


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Of a model that generates. Raises UnsupportedCheckpoint, CheckpointError."""
    metadata = metadata_of(checkpoint)
    if task_of(metadata) == "embed":
        raise UnsupportedCheckpoint(f"{checkpoint.path} embeds texts, and predicts none")
    return metadata
