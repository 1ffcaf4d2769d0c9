"""What is asked of the quantizer, and what it tells. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from workers.quantize.policy import Choices

CHUNK_BYTES: Final = 8 << 20

Phase = Literal["rounding", "verifying"]


@dataclass(frozen=True, slots=True)
class Request:
    """Which checkpoint is to be rounded how, and into which folder. Without a scheme all tensors
    are kept: a GGUF file becomes a folder."""

    source: Path
    destination: Path
    scheme: str | None
    group_size: int | None = None
    symmetric: bool = True
    searches_clip: bool = False
    choices: Choices = field(default_factory=Choices)
    chunk_bytes: int = CHUNK_BYTES
    """Of the source, held at the same time by all threads together."""
    tokenizer: Path | None = None
    """A folder with the tokenizer's files, where the source is a GGUF file."""
    num_threads: int | None = None
    """None is one for each processor, and one more."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is: bytes of the source, or of what is read again."""

    phase: Phase
    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    """Of those done, which an earlier run has left."""


Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are treated alike."""

    action: str
    reason: str
    num_tensors: int
    source_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Made:
    """What was written."""

    destination: Path
    scheme: str
    group_size: int | None
    format: str
    rounding: str
    groups: tuple[Group, ...]
    source_bytes: int
    output_bytes: int
    resumed_bytes: int
    bits_per_weight: float | None
    """Of what was rounded, scales and zero points included."""
    seconds: float
    rounded_seconds: float
    """Of these, until everything was written; the rest is waiting for the disk, and reading."""
