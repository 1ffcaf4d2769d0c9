"""The proof that instances share one copy on a GPU, from the driver's own figures. Pure.

Owns the criterion. What is in use on the device, less what the allocator owns there and what
processes that are none of its clients have, is what its clients have for themselves: a context
each, kernels, workspaces. A second copy of the weights in any of them would have to be in there.

Invariant: a criterion that can't be judged does not hold. Knows neither how the figures are read
(`allocator.device_usage`) nor how they are shown.
"""

from collections.abc import Collection, Sequence
from typing import Final

from pydantic import BaseModel

from allocator import DeviceUsage
from server.units import size_text

MAX_PRIVATE_BYTES: Final = 1_000_000_000
"""What an instance may have for itself: its context, the kernels that it loaded, workspaces."""


class DeviceInstance(BaseModel):
    """One instance. `driver_bytes` is what the driver counts for its process, if it says so."""

    name: str
    pid: int
    driver_bytes: int | None


class DeviceVerdict(BaseModel):
    """`problems` is empty exactly where one copy serves all instances. Bytes of the device."""

    holds: bool
    device: str
    model: str
    weights_bytes: int
    used_bytes: int
    """Of all processes, by the driver."""
    allocator_bytes: int
    """What the allocator owns, weights included."""
    others_bytes: int
    """Of processes that are not clients of the allocator, by the driver."""
    clients_bytes: int
    """What is left: the clients have it for themselves."""
    num_clients: int
    instances: list[DeviceInstance]
    total_bytes: int
    """What all clients take together, the allocator's memory once."""
    unshared_bytes: int
    """The same, were the weights there once for each instance."""
    problems: list[str]


def judge_device(
    device: str,
    usage: DeviceUsage,
    *,
    weights_bytes: int,
    allocator_bytes: int,
    instances: Sequence[tuple[str, int]],
    readers: Collection[int],
    clients: Collection[int],
    allocator_pid: int | None = None,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> DeviceVerdict:
    """`instances` are (name, pid) of those that should read the weights; `readers` the pids that do
    by the allocator's books, `clients` all that have a session with it. Where the driver counts for
    `allocator_pid` what it owns, that is in `allocator_bytes` already."""
    problems = [] if instances else ["no instance is ready"]
    problems += [
        f"{name}: does not read the weights, by the allocator's books"
        for name, pid in instances
        if pid not in readers
    ]
    ours = {*clients, *(pid for _, pid in instances)}
    others_bytes = sum(
        num_bytes or 0
        for pid, num_bytes in usage.processes.items()
        if pid not in ours and pid != allocator_pid
    )
    clients_bytes = usage.used_bytes - allocator_bytes - others_bytes
    may_have = len(ours) * max_private_bytes
    if clients_bytes < 0:
        problems.append(
            f"the driver tells of {size_text(usage.used_bytes)} in use, "
            f"{size_text(others_bytes)} of them by others, but the allocator says that "
            f"it owns {size_text(allocator_bytes)}"
        )
    elif clients_bytes > may_have:
        problems.append(
            f"{len(ours)} clients have {size_text(clients_bytes)} for themselves, more than "
            f"{size_text(max_private_bytes)} each: part of the weights may be copied"
        )
    elif weights_bytes <= may_have - clients_bytes:
        problems.append(
            f"a copy of the weights ({size_text(weights_bytes)}) would not show: {len(ours)} "
            f"clients have {size_text(clients_bytes)} for themselves, and {size_text(may_have)} "
            "are allowed. Allow less with --max-private"
        )
    return DeviceVerdict(
        holds=not problems,
        device=device,
        model=usage.model,
        weights_bytes=weights_bytes,
        used_bytes=usage.used_bytes,
        allocator_bytes=allocator_bytes,
        others_bytes=others_bytes,
        clients_bytes=clients_bytes,
        num_clients=len(ours),
        instances=[
            DeviceInstance(name=name, pid=pid, driver_bytes=usage.processes.get(pid))
            for name, pid in instances
        ],
        total_bytes=allocator_bytes + clients_bytes,
        unshared_bytes=allocator_bytes + clients_bytes + (len(instances) - 1) * weights_bytes,
        problems=problems,
    )
