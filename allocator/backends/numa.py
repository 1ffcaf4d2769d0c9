"""Where host memory lies: on which NUMA nodes, and in pages of which size; and which processors
are beside it.

Owns the wording of `--page-policy` and what it does to a mapping. Invariants: a policy that was
parsed names nodes that this machine has; what the kernel does not offer here has no effect, and
`page_policy_notes` says so once, when the daemon starts.
"""

import errno
import functools
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from allocator.backends.address_space import AddressRange, set_memory_policy, use_huge_pages
from allocator.errors import InvalidSetting

SHM_ROOT: Final = Path("/dev/shm")  # noqa: S108 - where Linux mounts POSIX shared memory
_NODES_WITH_MEMORY: Final = Path("/sys/devices/system/node/has_memory")
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")
_POLICIES: Final = {"preferred": 1, "bind": 2, "interleave": 3}  # linux/mempolicy.h
_MOST_NODES: Final = 1024  # of any kernel
_MOST_CPUS: Final = 1 << 16
_ALLOWED: Final = (
    "a comma-separated list of `huge` and one of `interleave:NODES`, `bind:NODES` and "
    "`preferred:NODE`, where NODES are NUMA nodes such as 0-1 or 0+2"
)
_NOT_PERMITTED: Final = (errno.EPERM, errno.ENOSYS)


@dataclass(frozen=True)
class PagePolicy:
    """`policy` is a key of `interleave`, `bind`, `preferred`, or "" for the kernel's own choice."""

    huge: bool = False
    policy: str = ""
    nodes: tuple[int, ...] = ()

    def apply(self, address: int, num_bytes: int) -> None:
        """To a shared mapping whose memory is still to be committed. Raises InvalidSetting where
        this process may not use the nodes."""
        if self.policy:
            try:
                set_memory_policy(address, num_bytes, _POLICIES[self.policy], self.nodes)
            except OSError as error:
                if error.errno in _NOT_PERMITTED:
                    return  # page_policy_notes has told it
                raise InvalidSetting(
                    f"the kernel refuses {self.policy} on the NUMA nodes {_plus(self.nodes)} to "
                    f"this process ({error.strerror}): check its cpuset, or start the allocator "
                    "with another --page-policy"
                ) from error
        if self.uses_huge_pages:
            use_huge_pages(address, num_bytes)

    @property
    def uses_huge_pages(self) -> bool:
        """Whether huge pages are both wanted and to be had."""
        return self.huge and huge_page_mode() in ("advise", "within_size", "always")


@functools.cache
def parse_page_policy(text: str) -> PagePolicy:
    """`_ALLOWED`, or "". Raises InvalidSetting, naming what is allowed."""
    huge, policy, nodes = False, "", tuple[int, ...]()
    for part in filter(None, text.split(",")):
        name, colon, listed = part.partition(":")
        if part == "huge" and not huge:
            huge = True
        elif name in _POLICIES and colon and not policy:
            policy, nodes = name, _known_nodes(text, listed)
            if name == "preferred" and len(nodes) > 1:
                raise InvalidSetting(f"in the page policy {text!r} `preferred` takes one NUMA node")
        else:
            raise InvalidSetting(f"the page policy {text!r} is not {_ALLOWED}")
    return PagePolicy(huge, policy, nodes)


def page_policy_notes(text: str) -> list[str]:
    """What of this page policy will have no effect on this machine, and what would change that."""
    page_policy, notes = parse_page_policy(text), list[str]()
    mode = huge_page_mode()
    if page_policy.huge and not page_policy.uses_huge_pages:
        if mode in ("", "deny"):
            notes.append(
                f"huge pages are not used: the kernel {'denies' if mode else 'lacks'} them to "
                f"shared memory ({_HUGE_PAGES / 'shmem_enabled'})"
            )
        else:
            notes.append(
                f"huge pages are not used: {SHM_ROOT} is mounted without them. `mount -o "
                f"remount,huge=advise {SHM_ROOT}` turns them on"
            )
    if page_policy.policy:
        probe = AddressRange(mmap.PAGESIZE)
        try:
            set_memory_policy(
                probe.address, probe.num_bytes, _POLICIES[page_policy.policy], page_policy.nodes
            )
        except OSError as error:
            notes.append(
                f"{page_policy.policy} has no effect: the kernel refuses memory policies to this "
                f"process ({error.strerror}). A container needs --cap-add SYS_NICE"
            )
        if len(nodes_with_memory()) == 1:
            notes.append(f"{page_policy.policy} changes nothing: this machine has one NUMA node")
    return notes


def nodes_with_memory() -> tuple[int, ...]:
    """The NUMA nodes of this machine that have memory; none where the kernel knows of no NUMA."""
    if not _NODES_WITH_MEMORY.exists():
        return ()
    return _numbers(_NODES_WITH_MEMORY.read_text().strip(), ",")


def node_cpus(root: Path = Path("/")) -> dict[int, frozenset[int]]:
    """The processors of each NUMA node of this machine, by `root`'s sys; nodes that have none are
    left out. Empty where the kernel knows of no NUMA."""
    found = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        listed = (folder / "cpulist").read_text().strip()
        if listed:
            found[int(folder.name.removeprefix("node"))] = frozenset(
                _numbers(listed, ",", _MOST_CPUS)
            )
    return dict(sorted(found.items()))


@functools.cache
def huge_page_mode() -> str:
    """never, advise, within_size, always or deny, as it holds for /dev/shm; "" without support.

    The kernel's switch for shared memory overrules by `deny` and `force` only; otherwise a tmpfs
    goes by the option that it was mounted with.
    """
    try:
        switches = (_HUGE_PAGES / "shmem_enabled").read_text()
    except FileNotFoundError:
        return ""
    chosen = switches.partition("[")[2].partition("]")[0]
    if chosen in ("deny", "force"):
        return "always" if chosen == "force" else "deny"
    mount_point = str(SHM_ROOT.resolve())
    mode = "never"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == mount_point:  # proc(5); the last one of a mount point is what is seen
            options = fields[-1].split(",")
            given = [o.removeprefix("huge=") for o in options if o.startswith("huge=")]
            mode = given[0] if given else "never"
    return mode


@functools.cache
def huge_page_bytes() -> int:
    """The size of a huge page; that of a page where there are none."""
    try:
        return int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    except FileNotFoundError:
        return mmap.PAGESIZE


def _known_nodes(text: str, listed: str) -> tuple[int, ...]:
    known = nodes_with_memory()
    try:
        nodes = _numbers(listed, "+")
    except ValueError as error:
        raise InvalidSetting(f"the page policy {text!r} is not {_ALLOWED}") from error
    if missing := set(nodes) - set(known):
        raise InvalidSetting(
            f"in the page policy {text!r}, this machine has no memory on the NUMA node "
            f"{min(missing)}: it has it on {_plus(known) or 'none'}"
        )
    return nodes


def _numbers(listed: str, separator: str, end: int = _MOST_NODES) -> tuple[int, ...]:
    """The kernel's way to list numbers, as in "0-2,5", less than `end`. Raises ValueError."""
    found = set[int]()
    for part in listed.split(separator):
        ends = [int(one) for one in part.split("-")]
        if len(ends) > 2 or not 0 <= ends[0] <= ends[-1] < end:
            raise ValueError(part)
        found |= set(range(ends[0], ends[-1] + 1))
    return tuple(sorted(found))


def _plus(nodes: tuple[int, ...]) -> str:
    return "+".join(map(str, nodes))
