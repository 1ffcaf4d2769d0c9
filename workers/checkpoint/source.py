"""What every checkpoint format offers, and how the right one is found.

Owns the interface between file formats and the loader. Invariant: a `Checkpoint` reads its files
tensor by tensor into memory that it is given, and holds at most `SCRATCH_BYTES` of its own beside
one tensor that must be rearranged as a whole. Knows nothing of where the tensors go.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from workers.errors import CheckpointCorrupt, CheckpointNotFound, UnsupportedCheckpoint

SCRATCH_BYTES: Final = 8 << 20
"""How much of a tensor is read or converted at a time."""

OnCopied = Callable[[int], None]
"""Called with the number of bytes that were just written."""


@dataclass(frozen=True)
class SourceTensor:
    """One tensor as it will be laid out: contiguous, under the name the architecture gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size when laid out."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StoredBytes:
    """Bytes [begin, begin + num_bytes) of a file."""

    file: Path
    begin: int
    num_bytes: int


class Checkpoint(Protocol):
    """One model on disk. Methods that read raise CheckpointCorrupt or UnsupportedCheckpoint."""

    @property
    def path(self) -> Path:
        """The folder or the file."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its floating-point tensors once laid out; None keeps each as it is stored."""

    def fingerprint(self) -> dict[str, str]:
        """What distinguishes this checkpoint in this layout. Cheap: reads headers at most."""

    def metadata(self) -> dict[str, str]:
        """JSON texts under "config" and, where the checkpoint has such, "generation_config" and
        "sentence" (see `sentence_files`)."""

    def tensors(self) -> list[SourceTensor]:
        """All tensors, in the order in which they should lie."""

    def stored_runs(self, name: str) -> tuple[StoredBytes, ...]:
        """Where the bytes lie in files that, one run after the other, are the tensor exactly as it
        is laid out; none where it must be converted, or is empty."""

    def copy_into(self, name: str, out: torch.Tensor, on_copied: OnCopied) -> None:
        """Fill `out`, which has the shape and dtype that `tensors` announced."""


def open_checkpoint(path: Path | str, dtype: str = "auto") -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face folder, or a .gguf file.

    `dtype` is "auto", "bfloat16", "float16" or "float32". Raises CheckpointNotFound,
    CheckpointCorrupt, UnsupportedCheckpoint.
    """
    path = Path(path)
    chosen = parse_dtype(dtype)
    if not path.exists():
        raise CheckpointNotFound(
            f"{path} does not exist: give a Hugging Face folder or a .gguf file"
        )
    try:
        if path.is_file():
            if path.suffix != ".gguf" and path.open("rb").read(4) != b"GGUF":
                raise UnsupportedCheckpoint(
                    f"{path} is not a GGUF file: give a .gguf file, or the folder that holds "
                    "config.json and *.safetensors"
                )
            from workers.checkpoint.gguf import GGUFCheckpoint

            return GGUFCheckpoint(path, chosen)
        from workers.checkpoint.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, chosen)
    except PermissionError as error:
        raise unreadable(Path(error.filename or path), error) from error


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


def file_identity(path: Path) -> str:
    """Changes whenever the file's content may have changed, without reading it. Raises
    CheckpointNotFound."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def unreadable(path: Path, error: OSError) -> CheckpointNotFound:
    """What to say of a file that is there no more, or may not be read."""
    return CheckpointNotFound(
        f"{path} can't be read ({error.strerror}): check its permissions as user id "
        f"{os.geteuid()}, or download the model again"
    )


def digest(*parts: str) -> str:
    """A short, stable digest of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointCorrupt, CheckpointNotFound."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"{path} does not hold a JSON object")
    return value
