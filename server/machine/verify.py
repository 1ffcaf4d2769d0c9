"""The proof that instances share one copy, from the kernel's figures alone. Pure.

Owns the criteria. Invariant: a criterion that can't be judged does not hold. Knows neither how the
figures are read (`process_memory`) nor how they are shown.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import BaseModel

from server.machine.process_memory import ProcessMemory
from server.units import size_text

MAX_PRIVATE_BYTES: Final = 60_000_000
"""What an instance may have for itself: its interpreter, its activations, its sockets."""

NO_RANKS: Final[Mapping[int, int]] = {}
_PARTS_SHOWN: Final = 3


class InstanceFigures(BaseModel):
    """A process of an instance, in bytes, as the kernel counts."""

    name: str
    pid: int
    rank: int
    """Of the instance's processes that compute together; 0 is the instance itself."""
    mapped_bytes: int
    resident_bytes: int
    weights_pss_bytes: int
    private_bytes: int
    kv_bytes: int


class Verdict(BaseModel):
    """`problems` is empty exactly where one copy serves all instances."""

    holds: bool
    segment: str
    inode: str
    weights_bytes: int
    weights_pss_bytes: int
    """The instances' proportional shares of the weights together: at most one copy."""
    instances: list[InstanceFigures]
    total_bytes: int
    """What all instances take together, weights once."""
    unshared_bytes: int
    """What as many instances with a copy each would take, their ranks counted as one."""
    problems: list[str]
    max_private_bytes: int
    """What each process was granted for itself: a copy that is smaller would not show."""

    @property
    def num_instances(self) -> int:
        """Those that have several ranks counted once."""
        return sum(one.rank == 0 for one in self.instances)


def judge_all(
    segments: Mapping[str, int],
    instances: Sequence[tuple[str, ProcessMemory | None]],
    max_private_bytes: int = MAX_PRIVATE_BYTES,
    ranks: Mapping[int, int] = NO_RANKS,
) -> Verdict:
    """Judge weights that lie in several segments (name → bytes): the verdict on the largest, with
    the problems of all."""
    verdicts = {
        name: judge(name, num_bytes, instances, max_private_bytes, ranks)
        for name, num_bytes in segments.items()
    }
    largest = verdicts[max(segments, key=lambda name: segments[name])]
    problems = list(dict.fromkeys(p for verdict in verdicts.values() for p in verdict.problems))
    return largest.model_copy(update={"holds": not problems, "problems": problems})


def judge(
    segment: str,
    weights_bytes: int,
    instances: Sequence[tuple[str, ProcessMemory | None]],
    max_private_bytes: int = MAX_PRIVATE_BYTES,
    ranks: Mapping[int, int] = NO_RANKS,
) -> Verdict:
    """Judge the instances (name, memory) that should map `segment` of `weights_bytes` bytes; of
    those among them that are further ranks of one, `ranks` says which, by process id."""
    problems: list[str] = [] if instances else ["no instance is ready"]
    figures: list[InstanceFigures] = []
    inodes: set[str] = set()
    for name, memory in instances:
        if memory is None:
            problems.append(f"{name}: its process is gone")
            continue
        mappings = [one for one in memory.segments if one.name == segment]
        if len(mappings) != 1:
            problems.append(f"{name}: maps {len(mappings)} segments called {segment}, not one")
        inodes.update(one.inode for one in mappings)
        mapped = sum(one.mapped_bytes for one in mappings)
        if mapped < weights_bytes:
            problems.append(f"{name}: maps {mapped} of the {weights_bytes} bytes of the weights")
        if any(one.writable or not one.shared for one in mappings):
            problems.append(f"{name}: its mapping is writable or private")
        if memory.private_bytes > max_private_bytes:
            problems.append(
                f"{name}: holds {size_text(memory.private_bytes)} of its own, more than "
                f"{size_text(max_private_bytes)}: part of the weights may be copied "
                f"({_largest(memory.private_parts)})"
            )
        figures.append(
            InstanceFigures(
                name=name,
                pid=memory.pid,
                rank=ranks.get(memory.pid, 0),
                mapped_bytes=mapped,
                resident_bytes=sum(one.resident_bytes for one in mappings),
                weights_pss_bytes=sum(one.pss_bytes for one in mappings),
                private_bytes=memory.private_bytes,
                kv_bytes=memory.kv_bytes,
            )
        )
    if len(inodes) > 1:
        problems.append(f"the instances map {len(inodes)} different objects: {sorted(inodes)}")
    weights_pss = sum(one.weights_pss_bytes for one in figures)
    page = 4096
    if weights_pss > -(-weights_bytes // page) * page + page * max(1, len(figures)):
        problems.append(f"the weights are counted {weights_pss / weights_bytes:.2f} times")
    private = sum(one.private_bytes + one.kv_bytes for one in figures)
    return Verdict(
        holds=not problems,
        segment=segment,
        inode=min(inodes, default=""),
        weights_bytes=weights_bytes,
        weights_pss_bytes=weights_pss,
        instances=figures,
        total_bytes=weights_bytes + private,
        unshared_bytes=weights_bytes * sum(one.rank == 0 for one in figures) + private,
        problems=problems,
        max_private_bytes=max_private_bytes,
    )


def _largest(parts: Mapping[str, int]) -> str:
    largest = sorted(parts.items(), key=lambda part: part[1], reverse=True)[:_PARTS_SHOWN]
    return ", ".join(f"{size_text(num_bytes)} in {name}" for name, num_bytes in largest)
