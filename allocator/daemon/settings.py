"""What a daemon is started with, and how its options are read from a command line.

Owns the defaults. Invariant: a `DaemonSettings` that was parsed can be used as far as its own text
goes. Knows nothing of what the machine has.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from allocator.errors import InvalidSetting

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS: Final = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def default_image_folder() -> Path:
    """`$ONECOPY_IMAGE_DIR`, else below `$ONECOPY_CACHE_DIR`, systemd's `$CACHE_DIRECTORY`,
    `$XDG_CACHE_HOME` or ~/.cache."""
    if named := os.environ.get("ONECOPY_IMAGE_DIR"):
        return Path(named)
    if ours := os.environ.get("ONECOPY_CACHE_DIR"):
        return Path(ours) / "images"
    if given := os.environ.get("CACHE_DIRECTORY"):
        return Path(given.split(":")[0]) / "images"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "onecopy" / "images"


@dataclass(frozen=True)
class DaemonSettings:
    """Limits in bytes, None for what the machine has. `quotas` by ("model" or "user", name)."""

    devices: tuple[str, ...] = ("host",)
    memory_limit: int | None = None
    host_tier_limit: int | None = None
    prefix_cache_limit: int | None = None
    image_folder: Path = field(default_factory=default_image_folder)
    placement: str = ""
    quotas: dict[tuple[str, str], int] = field(default_factory=dict)


def parse_bytes(text: str) -> int:
    """ "800000000", "800M", "1.5GB", "2GiB". Raises InvalidSetting."""
    wanted = text.strip().upper().removesuffix("B")
    digits = wanted.rstrip("KMGTI")
    unit = wanted[len(digits) :]
    factor = _UNITS.get(unit) or _BINARY_UNITS.get(unit)
    try:
        num_bytes = int(float(digits) * (factor or 0))
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes < 1:
        raise InvalidSetting(f"{text!r} is no size: write bytes, or a number with M, G, MiB, GiB")
    return num_bytes


def parse_quotas(texts: Iterable[str]) -> dict[tuple[str, str], int]:
    """Each "model:NAME=SIZE" or "user:NAME=SIZE". Raises InvalidSetting."""
    quotas: dict[tuple[str, str], int] = {}
    for text in texts:
        who, _, amount = text.rpartition("=")
        kind, _, name = who.partition(":")
        if kind not in ("model", "user") or not name:
            raise InvalidSetting(f"{text!r} is no quota: write model:NAME=SIZE or user:NAME=SIZE")
        quotas[kind, name] = parse_bytes(amount)
    return quotas
