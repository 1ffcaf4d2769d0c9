"""Where host memory lies: what a setting may say, and that the kernel does what it says.

Invariant: that a policy holds is read from /proc/self/numa_maps, that huge pages are used from
smaps, and that the kernel refuses is done by the kernel.
"""

import contextlib
import ctypes
import mmap
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocator import RuntimeDir
from allocator.backends import PoolWindow, for_handle
from allocator.backends.address_space import AddressRange
from allocator.backends.host import HostBackend
from allocator.backends.numa import (
    PagePolicy,
    nodes_with_memory,
    page_policy_notes,
    parse_page_policy,
)
from allocator.errors import InvalidSetting
from allocator.messages import Extent, Handle
from tests.allocator.backends.small_shm import on_own_shm
from tests.allocator.processes import in_fork

SIZE = 5 * mmap.PAGESIZE
MIB = 1 << 20
NODES = nodes_with_memory()
HAS_NODES = pytest.mark.skipif(not NODES, reason="this kernel knows of no NUMA nodes")
FIRST = NODES[0] if NODES else 0
ALL = "+".join(map(str, NODES))
MBIND = {"x86_64": 237, "aarch64": 235}.get(platform.machine())


def policies(segment: str) -> set[str]:
    """What numa_maps shows for a segment's mappings in this process (numa(7))."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return {line.split()[1] for line in lines if f"file=/dev/shm{segment}" in line}


@pytest.fixture
def prefix(runtime_dir: RuntimeDir) -> Iterator[str]:
    yield runtime_dir.segment_prefix
    HostBackend().sweep(runtime_dir.segment_prefix)


def reserved(segment: str, page_policy: str) -> Handle:
    HostBackend(page_policy).reserve(segment, SIZE)
    return handle_of(segment, SIZE, page_policy)


def handle_of(segment: str, num_bytes: int, page_policy: str) -> Handle:
    return Handle(
        backend="host",
        device="host",
        segment=segment,
        num_bytes=num_bytes,
        generation=1,
        page_policy=page_policy,
    )


class TestSetting:
    def test_nothing_is_wanted_by_default(self) -> None:
        assert parse_page_policy("") == PagePolicy()
        assert HostBackend().page_policy == ""
        assert page_policy_notes("") == []

    @HAS_NODES
    def test_what_is_allowed(self) -> None:
        assert parse_page_policy("huge") == PagePolicy(huge=True)
        assert parse_page_policy(f"interleave:{ALL}") == PagePolicy(False, "interleave", NODES)
        assert parse_page_policy(f"bind:{FIRST}-{FIRST},huge") == PagePolicy(True, "bind", (FIRST,))
        assert HostBackend(f"huge,preferred:{FIRST}").page_policy == f"huge,preferred:{FIRST}"

    @pytest.mark.parametrize(
        "text",
        [
            "large",
            "huge,huge",
            "huge:1",
            "interleave",
            "interleave:",
            "bind:x",
            "bind:0+",
            "bind:-1",
            "bind:1-0",
            "bind:0-1-2",
            "bind:0-9999999999",
            "bind:0,interleave:0",
            "bind:0 interleave:0",
            "local:0",
        ],
    )
    def test_what_is_not_names_what_is(self, text: str) -> None:
        with pytest.raises(InvalidSetting) as refused:
            HostBackend(text)
        assert repr(text) in str(refused.value)
        for allowed in ("`huge`", "`interleave:NODES`", "`bind:NODES`", "`preferred:NODE`", "0-1"):
            assert allowed in str(refused.value)

    def test_a_node_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(InvalidSetting, match=r"no memory on the NUMA node 1000: it has it on"):
            HostBackend("interleave:1000")

    @pytest.mark.skipif(len(NODES) < 2, reason="this machine has one NUMA node")
    def test_one_node_is_preferred(self) -> None:
        with pytest.raises(InvalidSetting, match="takes one NUMA node"):
            HostBackend(f"preferred:{ALL}")


@HAS_NODES
class TestPolicy:
    @pytest.mark.parametrize(
        ("page_policy", "shown"),
        [
            ("", "default"),
            (f"interleave:{FIRST}", f"interleave:{FIRST}"),
            (f"bind:{FIRST}", f"bind:{FIRST}"),
            (f"preferred:{FIRST}", f"prefer:{FIRST}"),
            (f"huge,bind:{FIRST}", f"bind:{FIRST}"),
        ],
    )
    @pytest.mark.parametrize("commit", [True, False])
    def test_a_segment_has_it_for_whoever_maps_it(
        self, prefix: str, page_policy: str, shown: str, commit: bool
    ) -> None:
        handle = reserved(f"{prefix}1", page_policy)
        client = for_handle(handle)
        with contextlib.closing(client.map(handle, writable=True, commit=commit)) as mapping:
            assert policies(handle.segment) == {shown}
            mapping.write(0, b"x" * SIZE)
        HostBackend().seal(handle.segment)
        with contextlib.closing(HostBackend().map(handle, writable=False)) as mapping:
            assert policies(handle.segment) == {shown}
            assert mapping.buffer == b"x" * SIZE

    def test_an_extent_has_it_and_its_neighbour_has_not(self, prefix: str) -> None:
        pool = handle_of(f"{prefix}pool", MIB, f"bind:{FIRST}")
        HostBackend().reserve_pool(pool.segment, pool.num_bytes)
        placed, other = (Extent(offset=n * MIB // 4, num_bytes=MIB // 4) for n in (1, 2))
        with contextlib.closing(for_handle(pool).open_pool(pool)) as window:
            window.map(placed, writable=True)
            assert policies(pool.segment) == {f"bind:{FIRST}"}
        plain: PoolWindow = HostBackend().open_pool(pool)
        with contextlib.closing(plain):
            plain.map(other, writable=True)
            assert policies(pool.segment) == {"default"}
            plain.map(placed, writable=False)
            assert policies(pool.segment) == {"default", f"bind:{FIRST}"}

    @pytest.mark.parametrize("missing", [63, 64, 130])
    def test_nodes_that_this_process_may_not_use_are_told(self, missing: int) -> None:
        if missing in NODES:
            pytest.skip(f"this machine has a NUMA node {missing}")
        there = AddressRange(mmap.PAGESIZE)
        # Of a mask that is cut short nothing would be left, which `preferred` allows.
        with pytest.raises(InvalidSetting, match=f"refuses preferred on the NUMA nodes {missing} "):
            PagePolicy(policy="preferred", nodes=(missing,)).apply(there.address, there.num_bytes)

    @pytest.mark.skipif(MBIND is None, reason="no number of mbind is known here")
    def test_where_the_kernel_refuses_policies_the_memory_is_there_all_the_same(
        self, prefix: str
    ) -> None:
        handle = reserved(f"{prefix}1", f"bind:{FIRST}")

        def confined() -> str:
            refuse_mbind()
            with contextlib.closing(for_handle(handle).map(handle, writable=True)) as mapping:
                mapping.buffer[:3] = b"abc"
                notes = page_policy_notes(f"bind:{FIRST}")
            return f"{policies(handle.segment)} {notes[0]}"

        text = in_fork(confined).text
        assert "bind has no effect: the kernel refuses memory policies to this process" in text
        assert "--cap-add SYS_NICE" in text

    def test_one_node_is_no_choice(self) -> None:
        notes = page_policy_notes(f"interleave:{ALL}")
        assert notes == (
            ["interleave changes nothing: this machine has one NUMA node"]
            if len(NODES) == 1
            else []
        )


def refuse_mbind() -> None:
    """Do to this process what a container's seccomp profile does: mbind fails with EPERM."""
    load_number, if_equal, answer = 0x20, 0x15, 0x06
    allow, permission_denied = 0x7FFF0000, 0x00050001
    code = b"".join(
        instruction.to_bytes(2, "little") + bytes([if_true, if_false]) + value.to_bytes(4, "little")
        for instruction, if_true, if_false, value in (
            (load_number, 0, 0, 0),
            (if_equal, 0, 1, MBIND or 0),
            (answer, 0, 0, permission_denied),
            (answer, 0, 0, allow),
        )
    )
    text = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    program = Program(4, ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, filter_mode, ctypes.byref(program), 0, 0) == 0


class TestHugePages:
    @pytest.mark.parametrize("mode", ["advise", "within_size", "always"])
    def test_they_are_used_where_the_mount_allows(self, runtime_dir: RuntimeDir, mode: str) -> None:
        switch = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        if not switch.exists() or "[deny]" in switch.read_text():
            pytest.skip("this kernel has no huge pages for shared memory")
        found = on_own_shm("huge", runtime_dir, f"size=16m,huge={mode}")
        assert (found["mode"], found["notes"]) == (mode, [])
        # The tail of a segment may be too short for a huge page of its own.
        for bytes_in_huge_pages in found["huge"].values():
            assert bytes_in_huge_pages >= 4 * MIB
        if mode == "advise":
            assert set(found["none"].values()) == {0}
        assert "Enlarge it with" in found["commit"]  # and not SIGBUS

    def test_without_them_there_is_a_note_and_no_harm(self, runtime_dir: RuntimeDir) -> None:
        found = on_own_shm("huge", runtime_dir, "size=16m,huge=never")
        (note,) = found["notes"]
        if found["mode"] == "never":
            assert "`mount -o remount,huge=advise /dev/shm` turns them on" in note
        assert set(found["huge"].values()) == set(found["none"].values()) == {0}
        assert "Enlarge it with" in found["commit"]
