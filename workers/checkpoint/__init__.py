"""Checkpoints: read from files tensor by tensor, straight into memory that instances share."""

from workers.checkpoint.attach import (
    AttachedWeights,
    attach,
    attach_served,
    attach_weights,
    metadata_of,
)
from workers.checkpoint.formats.checkpoint import Checkpoint
from workers.checkpoint.open import open_checkpoint

__all__ = [
    "AttachedWeights",
    "Checkpoint",
    "attach",
    "attach_served",
    "attach_weights",
    "metadata_of",
    "open_checkpoint",
]
