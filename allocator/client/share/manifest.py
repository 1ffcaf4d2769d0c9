"""What the manifest of a shared module says beyond its tensors, and whether a module fits it. Pure.

Owns two notes in the manifest's metadata: which tensors are buffers, and which names are one tensor
object. Knows nothing of torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from allocator.errors import FingerprintMismatch, InvalidMessage
from allocator.messages import Manifest, TensorEntry

LAYOUT_VERSION: Final = 1
"""Goes up whenever the same module would be laid out or described differently."""

_BUFFERS: Final = "buffers"
_SAME_OBJECT: Final = "same_object"
_MOST_NAMED: Final = 8
"""Differences that a message spells out."""


@dataclass(frozen=True)
class Form:
    """What of a tensor must be the same in all processes. `kind` is "parameter" or "buffer"."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"a {self.kind}, {self.dtype}{list(self.shape)}"


def make_manifest(
    entries: Mapping[str, TensorEntry], buffers: list[str], same_object: list[list[str]]
) -> Manifest:
    """`buffers` are names; `same_object` has the names of each object that has more than one."""
    metadata = {_BUFFERS: _text([buffers]), _SAME_OBJECT: _text(same_object)}
    return Manifest(version=LAYOUT_VERSION, tensors=dict(entries), metadata=metadata)


def buffers_of(manifest: Manifest) -> frozenset[str]:
    """The names that are buffers. Raises InvalidMessage where it is not that of a module."""
    return frozenset(name for group in _noted(manifest, _BUFFERS) for name in group)


def groups_of(manifest: Manifest) -> list[list[str]]:
    """All names in their order, those of one tensor object together. Raises InvalidMessage."""
    tied = {group[0]: group for group in _noted(manifest, _SAME_OBJECT)}
    others = {name for group in tied.values() for name in group[1:]}
    return [tied.get(name, [name]) for name in manifest.tensors if name not in others]


def check_forms(key: str, manifest: Manifest, ours: Mapping[str, Form]) -> None:
    """Raises FingerprintMismatch, which names what differs, where the tensors are not `ours`."""
    buffers = buffers_of(manifest)
    theirs = {
        name: Form("buffer" if name in buffers else "parameter", entry.dtype, entry.shape)
        for name, entry in manifest.tensors.items()
    }
    differing = [
        f"{name!r} was {theirs.get(name, 'absent')} and is now {ours.get(name, 'absent')}"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        more = len(differing) - _MOST_NAMED
        raise FingerprintMismatch(
            f"the module that was shared as {key!r} has other tensors than this one: "
            + "; ".join(differing[:_MOST_NAMED])
            + (f"; and {more} more" if more > 0 else "")
        )


def _text(groups: list[list[str]]) -> str:
    return msgspec.json.encode(groups).decode()


def _noted(manifest: Manifest, field: str) -> list[list[str]]:
    try:
        groups = msgspec.json.decode(manifest.metadata[field], type=list[list[str]])
    except (KeyError, msgspec.DecodeError) as error:
        raise InvalidMessage(f"the manifest is not that of a module: {field!r}") from error
    if all(name in manifest.tensors for group in groups for name in group):
        return groups
    raise InvalidMessage(f"the manifest notes tensors in {field!r} that it does not describe")
