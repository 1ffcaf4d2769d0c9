"""What a daemon is started with, and how that is written on a command line and read from it.

Owns the options and the defaults: whoever offers options, passes them on or reads them does it by
`OPTIONS`. Invariant: a `DaemonSettings` that was parsed can be used as far as its own text goes.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from allocator.errors import InvalidSetting

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS: Final = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def cache_folder() -> Path:
    """`$ONECOPY_CACHE_DIR`, systemd's `$CACHE_DIRECTORY`, or below `$XDG_CACHE_HOME` or
    ~/.cache."""
    if ours := os.environ.get("ONECOPY_CACHE_DIR"):
        return Path(ours)
    if given := os.environ.get("CACHE_DIRECTORY"):
        return Path(given.split(":")[0])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "onecopy"


def default_image_folder() -> Path:
    """`$ONECOPY_IMAGE_DIR`, else in the folder for caches."""
    named = os.environ.get("ONECOPY_IMAGE_DIR")
    return Path(named) if named else cache_folder() / "images"


@dataclass(frozen=True)
class Option:
    """One option of the daemon's command."""

    name: str
    help: str
    metavar: str = "SIZE"
    repeats: bool = False
    """Whether it can be given again; of any other the last one counts."""

    @property
    def field(self) -> str:
        """As a name in Python."""
        return self.name.removeprefix("--").replace("-", "_")


OPTIONS: Final = (
    Option(
        "--device",
        "host, cuda:N or cuda:GPU-UUID; can be given again. Default: host.",
        "DEVICE",
        repeats=True,
    ),
    Option("--memory-limit", "What to use at most of each device, as 800M or 20GiB. Default: all."),
    Option("--host-tier-limit", "What may sleep in host memory. Default: all of /dev/shm."),
    Option(
        "--prefix-cache-limit",
        "What KV blocks that nobody maps may take. Default: what --memory-limit leaves; "
        "without one, an eighth of host memory.",
    ),
    Option(
        "--image-dir", "Where weight sets sleep on disk. Default: ~/.cache/onecopy/images.", "PATH"
    ),
    Option(
        "--page-policy",
        "Of host memory: huge, interleave:0+1, bind:0, preferred:0; or several.",
        "POLICY",
    ),
    Option(
        "--quota",
        "model:NAME=SIZE or user:NAME=SIZE; can be given again.",
        "KIND:NAME=SIZE",
        repeats=True,
    ),
)


def option_arguments(given: Mapping[str, object]) -> list[str]:
    """Options by their fields, as a command takes them: one that repeats as a sequence, one that is
    None or "" not at all. Raises KeyError for a field of none."""
    known = {option.field: option for option in OPTIONS}
    arguments: list[str] = []
    for name, value in given.items():
        option = known[name]
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            arguments += [option.name, str(one)] if one not in (None, "") else []
    return arguments


@dataclass(frozen=True)
class DaemonSettings:
    """Limits in bytes, None for what the machine has. `quotas` by ("model" or "user", name)."""

    devices: tuple[str, ...] = ("host",)
    memory_limit: int | None = None
    host_tier_limit: int | None = None
    prefix_cache_limit: int | None = None
    image_folder: Path = field(default_factory=default_image_folder)
    page_policy: str = ""
    quotas: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Sequence[str]]) -> Self:
        """From what was given for each option, by its field. Raises InvalidSetting."""
        last = {name: texts[-1] for name, texts in given.items() if texts}

        def num_bytes(name: str) -> int | None:
            return parse_bytes(last[name]) if name in last else None

        return cls(
            devices=tuple(given.get("device", ())) or cls.devices,
            memory_limit=num_bytes("memory_limit"),
            host_tier_limit=num_bytes("host_tier_limit"),
            prefix_cache_limit=num_bytes("prefix_cache_limit"),
            image_folder=Path(last.get("image_dir") or default_image_folder()).absolute(),
            page_policy=last.get("page_policy", ""),
            quotas=parse_quotas(given.get("quota", ())),
        )


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
