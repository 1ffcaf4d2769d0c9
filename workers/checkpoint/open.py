"""Which format a checkpoint has.

Invariant: what is at a path is told by the path and its first bytes, and nothing else is read here.
"""

import os
from pathlib import Path

import torch

from workers.checkpoint.formats.checkpoint import Checkpoint
from workers.config.model_file import opened, unreadable
from workers.errors import CheckpointNotFound, UnsupportedCheckpoint


def open_checkpoint(path: Path | str, dtype: str = "auto", *, packs: bool = False) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face folder, or a .gguf file.

    `dtype` is "auto", "bfloat16", "float16" or "float32"; with `packs`, quantized weights stay so
    where they can be computed. Raises CheckpointNotFound,
    CheckpointCorrupt, UnsupportedCheckpoint.
    """
    path = Path(path)
    chosen = parse_dtype(dtype)
    try:
        if not path.exists():
            raise CheckpointNotFound(
                f"{path} does not exist: give a Hugging Face folder or a .gguf file"
            )
        if not path.is_dir():
            if path.suffix != ".gguf" and not _begins_like_gguf(path):
                raise UnsupportedCheckpoint(
                    f"{path} is not a GGUF file: give a .gguf file, or the folder that holds "
                    "config.json and *.safetensors"
                )
            from workers.checkpoint.formats.gguf import GGUFCheckpoint

            return GGUFCheckpoint(path, chosen, packs=packs)
        from workers.checkpoint.formats.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, chosen, packs=packs)
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from error


def _begins_like_gguf(path: Path) -> bool:
    with opened(path) as descriptor:
        return os.pread(descriptor, 4, 0) == b"GGUF"


def parse_dtype(name: str) -> torch.dtype | None:
    """None for "auto". Raises UnsupportedCheckpoint for a dtype weights can't be served in."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name == "auto":
        return None
    if name not in known:
        raise UnsupportedCheckpoint(
            f"the dtype {name!r} is not one of auto, {', '.join(sorted(known))}"
        )
    return known[name]
