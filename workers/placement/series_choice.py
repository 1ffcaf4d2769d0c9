"""Whether a checkpoint's model has the series that are to be sharded.

Owns that check, which reads headers only. An instance has one rank as yet, which has all linears of
each series, so nothing is sharded by it.
"""

import json

import torch

from workers.checkpoint.formats.checkpoint import Checkpoint
from workers.config.encoder_settings import task_of
from workers.errors import InvalidSetting
from workers.placement.finding import find_series
from workers.settings import EngineSettings
from workers.skeleton.decoder import skeleton
from workers.weight_format import float_dtype


def check_series(checkpoint: Checkpoint, settings: EngineSettings) -> None:
    """Raises InvalidSetting for a name that is no series of the model, with those there are."""
    if not settings.layer_sharding:
        return
    metadata = checkpoint.metadata()
    if task_of(metadata) == "embed":
        raise InvalidSetting("a model that embeds is not sharded: leave out --layer-sharding")
    shapes = {
        one.name: torch.empty(one.shape, dtype=one.dtype, device="meta")
        for one in checkpoint.tensors()
    }
    module = skeleton(json.loads(metadata["config"]), checkpoint.dtype or float_dtype(shapes))
    for name in settings.layer_sharding.split(","):
        try:
            find_series(module, name, 0, None)
        except InvalidSetting as error:
            raise InvalidSetting(f"--layer-sharding: {error}") from error
