"""What every checkpoint format offers.

Owns the interface between file formats and the loader. Invariant: a `Checkpoint` reads its files
tensor by tensor into memory that it is given, and holds at most `SCRATCH_BYTES` of its own beside
one tensor that must be rearranged as a whole. Knows nothing of where the tensors go.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch

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
        """JSON texts under "config" and, where the checkpoint has such, "sentence" (see
        `sentence_files`): what changes what is computed."""

    def eos_token_ids(self) -> tuple[int, ...] | None:
        """The tokens that end an answer, where a file beside the config names them."""

    def tensors(self) -> list[SourceTensor]:
        """All tensors, in the order in which they should lie."""

    def stored_runs(self, name: str) -> tuple[StoredBytes, ...]:
        """Where the bytes lie in files that, one run after the other, are the tensor exactly as it
        is laid out; none where it must be converted, or is empty."""

    def copy_into(self, name: str, out: torch.Tensor, on_copied: OnCopied) -> None:
        """Fill `out`, which has the shape and dtype that `tensors` announced."""


def digest(*parts: str) -> str:
    """A short, stable digest of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
