"""Checkpoints: read from files tensor by tensor, straight into memory that instances share."""

from workers.checkpoint.attach import AttachedWeights, attach, attach_weights
from workers.checkpoint.source import Checkpoint, open_checkpoint

__all__ = ["AttachedWeights", "Checkpoint", "attach", "attach_weights", "open_checkpoint"]
