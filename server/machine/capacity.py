"""What there is for onecopy on this machine, or on one that a person describes.

Owns the way to these figures. Invariant: what an allocator that runs already holds of the same
model, or would give up for it, is there for the model. Starts nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from allocator import (
    AllocatorError,
    RuntimeDir,
    Statistics,
    connect,
    headroom_bytes,
    memory_bounds,
    shared_memory_bound,
)

_ANSWER_S: Final = 3.0


@dataclass(frozen=True)
class Machine:
    """What there is for onecopy, in bytes. `given`: by a person, not read from this machine."""

    memory_bytes: int
    shared_memory_bytes: int
    given: bool


@dataclass(frozen=True)
class Held:
    """Of an allocator that runs, on one device."""

    free_bytes: int
    """Within its limit."""
    for_model_bytes: int
    """Weights of the model, and those that nobody uses, which give way to it."""


def read_machine(memory: int | None, memory_limit: int | None, held: Held | None = None) -> Machine:
    """What is available here at this moment, in /dev/shm, on the machine and in our control groups,
    or a device of `memory` bytes; the allocator's `memory_limit`, or that of the one that runs,
    bounds what may be shared. What that one holds for the model counts as available."""
    if memory is not None:
        return Machine(memory, min(memory, memory_limit or memory), given=True)
    for_model = held.for_model_bytes if held is not None else 0
    bounds = memory_bounds()
    shared = [one.available_bytes - headroom_bytes(one.total_bytes) for one in bounds]
    try:
        shared.append(shared_memory_bound().available_bytes)
    except AllocatorError:
        shared.append(0)
    if held is not None:
        shared.append(held.free_bytes)
    elif memory_limit is not None:
        shared.append(memory_limit)
    return Machine(
        memory_bytes=min((one.available_bytes for one in bounds), default=1 << 62) + for_model,
        shared_memory_bytes=max(0, min(shared)) + for_model,
        given=False,
    )


def held_there(runtime_dir: Path | None, model: str, device: str) -> Held | None:
    """What the allocator of that directory has for a model of that name; None where none answers,
    or it has no such device."""
    try:
        directory = RuntimeDir.open(runtime_dir, create=False)
        with connect(directory, _ANSWER_S, device=device, label="onecopy plan") as memory:
            return held_of(memory.statistics(), model)
    except AllocatorError:
        return None


def held_of(statistics: Statistics, model: str) -> Held:
    """The same of its own word."""
    return Held(
        free_bytes=max(0, statistics.limit_bytes - statistics.used_bytes),
        for_model_bytes=sum(
            one.num_bytes - sum(num_bytes for _, num_bytes in one.files)
            for one in statistics.weight_sets
            if one.tier == "device"
            and (one.model == model or (one.state == "idle" and not one.pinned))
        ),
    )
