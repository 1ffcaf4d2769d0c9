"""What a device can still hold, as it says itself. Pure.

Owns the figures and the words for people. Invariant: whoever is refused for want of room reads what
bounds it, and what would help.
"""

from dataclasses import dataclass
from typing import Final, Literal

Bound = Literal["shm", "machine", "group", "device"]

_MEBIBYTE: Final = 1 << 20


@dataclass(frozen=True)
class Room:
    """`available_bytes` can be committed now, beside what is committed already; what the processes
    need for themselves is left out of it. `total_bytes` is the size of what bounds it."""

    available_bytes: int
    total_bytes: int
    bound: Bound
    name: str
    """For people: /dev/shm, the machine, the control group /system.slice/onecopy.service."""

    @property
    def words(self) -> str:
        """What bounds it."""
        if self.bound == "shm":
            return f"{self.name} holds {size(self.total_bytes)} in all"
        if self.bound == "device":
            return f"{self.name} has {size(self.total_bytes)} of memory"
        return f"{self.name} has {size(self.total_bytes)} of memory for all its processes"

    def remedy(self, short_bytes: int) -> str:
        """How it could be made `short_bytes` larger."""
        wanted = -(-(self.total_bytes + max(0, short_bytes)) // _MEBIBYTE)
        if self.bound == "shm":
            return (
                f"enlarge it with `mount -o remount,size={wanted}M {self.name}`, or in Docker with "
                f"`--shm-size {wanted}m`"
            )
        if self.bound == "group":
            return (
                f"raise its limit to {wanted}M (Docker: `--memory {wanted}m`, systemd: "
                f"`MemoryMax={wanted}M`), start fewer --instances, or serve a smaller model"
            )
        if self.bound == "machine":
            return "stop another program, start fewer --instances, or serve a smaller model"
        return "stop what else uses it, or serve a smaller model"


def size(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
