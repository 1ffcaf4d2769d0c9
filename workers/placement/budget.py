"""Which layers stay on the device, and which are read when they are needed. Pure.

Owns the choice. Invariants: what stays and the slots for the rest are within the budget, and no
fewer layers stay than fit; those that go are spread as evenly as they can be, so that what computes
between two of them hides as much of reading the next as possible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.errors import InvalidSetting


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model's weights, in bytes."""

    layers: tuple[int, ...]
    """Of each layer, what would stay on the device with it."""
    slots: tuple[int, ...]
    """Of each layer, what a slot must have for it; 0 for one that can't be read alone."""
    others: int
    """Embeddings, the head and whatever else is in no layer."""

    def needed(self, offloaded: Sequence[int], depth: int) -> int:
        """All that is on the device while `offloaded` layers are read `depth` ahead."""
        gone = sum(self.layers[index] for index in offloaded)
        slots = min(len(offloaded), depth + 1)
        return (
            self.others
            + sum(self.layers)
            - gone
            + slots * max((self.slots[index] for index in offloaded), default=0)
        )


def spread(candidates: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the candidates, at distances that differ by no more than one."""
    total = len(candidates)
    return tuple(
        candidate
        for i, candidate in enumerate(candidates)
        if (i + 1) * count // total > i * count // total
    )


def offloaded_layers(
    sizes: Sizes, offload: str, depth: int, budget_bytes: int | None
) -> tuple[int, ...]:
    """The layers that are read when they are needed: `offload` is "none", "all", a number of them,
    or "auto", as few as the budget allows, none where there is no budget. Raises InvalidSetting
    where they are too many, or what stays is more than the budget."""
    candidates = [index for index, num_bytes in enumerate(sizes.slots) if num_bytes]
    if offload == "auto":
        chosen = _fewest(sizes, candidates, depth, budget_bytes)
    elif offload == "none":
        chosen = ()
    else:
        count = len(candidates) if offload == "all" else int(offload)
        if count > len(candidates):
            raise InvalidSetting(
                f"--offload is {count}, but there are {len(candidates)} layers that can be"
            )
        chosen = spread(candidates, count)
    needed = sizes.needed(chosen, depth)
    if budget_bytes is not None and needed > budget_bytes:
        raise InvalidSetting(
            f"--device-memory is {_mib(budget_bytes)}, but {_mib(needed)} of this model's weights "
            f"are on the device at once with {len(chosen)} of {len(sizes.layers)} layers offloaded "
            f"and {depth} read ahead" + _least(sizes, candidates, depth, budget_bytes)
        )
    return chosen


def _fewest(
    sizes: Sizes, candidates: Sequence[int], depth: int, budget_bytes: int | None
) -> tuple[int, ...]:
    if budget_bytes is None:
        return ()
    for count in range(len(candidates) + 1):
        chosen = spread(candidates, count)
        if sizes.needed(chosen, depth) <= budget_bytes:
            return chosen
    return spread(candidates, len(candidates))


def _least(sizes: Sizes, candidates: Sequence[int], depth: int, budget_bytes: int) -> str:
    """What a person can do about it."""
    everything = spread(candidates, len(candidates))
    if depth > 1 and sizes.needed(everything, 1) <= budget_bytes:
        return ": a smaller --offload-depth would do"
    if sizes.needed(everything, depth) <= budget_bytes:
        return ": offload more of them, or leave it to --offload auto"
    return f": {_mib(sizes.needed(everything, 1))} is the least, with --offload all"


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // (1 << 20)):,} MiB"
