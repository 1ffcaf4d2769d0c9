"""Whether a checkpoint's quantized weights stay packed in memory.

Owns that choice. Invariant: they do where the kernels compute on them, since transformers' modules
would unpack all of them for each pass; whoever asks for it where it can't be is told why.
"""

import json
import logging
from pathlib import Path
from typing import Final

import torch

from workers.checkpoint import open_checkpoint
from workers.checkpoint.formats.checkpoint import Checkpoint
from workers.errors import InvalidSetting, UnsupportedCheckpoint
from workers.model.native.decoder import supports
from workers.model.tensor_parallel import narrow
from workers.packed_format import decoded
from workers.settings import EngineSettings
from workers.skeleton.decoder import skeleton
from workers.skeleton.packed import NO_PARTS, put_packed

log = logging.getLogger(__name__)

_DTYPES: Final = ("auto", "bfloat16")


def open_as_served(path: Path | str, settings: EngineSettings) -> Checkpoint:
    """The checkpoint at `path` as these settings lay it out. Raises as `open_checkpoint` does, and
    InvalidSetting where packed weights are asked for and can't be had."""
    plain = open_checkpoint(path, settings.dtype)
    if settings.weights == "bf16":
        return plain
    reason = _against(settings)
    if reason is None:
        packed = open_checkpoint(path, settings.dtype, packs=True)
        if (reason := _not_computed(packed, settings)) is None:
            return packed
    if settings.weights == "packed":
        raise InvalidSetting(f"--weights packed: {reason}")
    log.debug("weights are not packed: %s", reason)
    return plain


def _against(settings: EngineSettings) -> str | None:
    """What these settings have against it, whatever the model."""
    if settings.dtype not in _DTYPES:
        return f"with packed weights kernels compute in bfloat16, and --dtype is {settings.dtype}"
    if not settings.device.startswith("host"):
        return f"they are computed on the processor, and --device is {settings.device}"
    return None


def _not_computed(checkpoint: Checkpoint, settings: EngineSettings) -> str | None:
    """Why the kernels do not compute it, or a rank's part of it; or that nothing in it can be
    packed."""
    metadata = checkpoint.metadata()
    formats = decoded(metadata)
    if not formats:
        return f"nothing in {checkpoint.path} can be packed"
    config, size = json.loads(metadata["config"]), settings.tensor_parallel_size
    for rank in range(size):
        module, parts = skeleton(config, torch.bfloat16), NO_PARTS
        if size > 1:
            try:
                parts = narrow(module, rank, size, formats).first_columns
            except (InvalidSetting, UnsupportedCheckpoint) as error:
                return str(error)
        put_packed(module, formats, torch.bfloat16, parts)
        module.eval()
        if (reason := supports(module, torch.bfloat16, settings.cpu_kernels)) is not None:
            return reason
    return None
