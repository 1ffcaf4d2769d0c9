"""Control groups: as files of both versions show them, and as the kernel enforces them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from allocator import OutOfDeviceMemory, RuntimeDir, connect
from allocator.backends.capacity import headroom_bytes, memory_bounds, shareable_room
from allocator.backends.control_group import ControlGroup, limited_groups
from tests.control_group import memory_group
from tests.daemon_process import ROOT, DaemonProcess

GIB = 1 << 30
MIB = 1 << 20

# --- files, as such systems have them


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        # systemd, version 2: the slice above allows less than the unit itself.
        (
            {
                "proc/self/cgroup": "0::/system.slice/onecopy-server.service\n",
                "sys/fs/cgroup/system.slice/onecopy-server.service/memory.max": "max\n",
                "sys/fs/cgroup/system.slice/memory.max": "4294967296\n",
            },
            4 * GIB,
        ),
        # The unit itself allows less.
        (
            {
                "proc/self/cgroup": "0::/system.slice/onecopy-server.service\n",
                "sys/fs/cgroup/system.slice/onecopy-server.service/memory.max": "1073741824\n",
                "sys/fs/cgroup/system.slice/memory.max": "4294967296\n",
            },
            GIB,
        ),
        # A container, version 2: its group is the root of what it sees.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "2147483648\n"}, 2 * GIB),
        # A container, version 1: the path is the host's, the mount the container's.
        (
            {
                "proc/self/cgroup": "12:cpu,cpuacct:/docker/8ab1\n4:memory:/docker/8ab1\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3221225472\n",
            },
            3 * GIB,
        ),
        # Version 1 without a limit: the largest whole page.
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
        ),
        # The host itself, version 2: the root group has no such file.
        ({"proc/self/cgroup": "0::/init.scope\n"}, None),
        ({}, None),
    ],
)
def test_the_least_limit_from_our_group_up_to_the_root(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    put(tmp_path, files)
    found = limited_groups(tmp_path)
    assert min((group.limit_bytes for group in found), default=None) == limit


VERSION_1 = {
    "proc/self/cgroup": "12:cpu:/\n4:memory:/kubepods/burstable/pod1/abc\n0::/\n",
    "proc/meminfo": "MemTotal: 65641148 kB\nMemAvailable: 48390196 kB\n",
    "sys/fs/cgroup/memory/kubepods/memory.limit_in_bytes": "33554432000\n",
    "sys/fs/cgroup/memory/kubepods/memory.usage_in_bytes": "32000000000\n",
    "sys/fs/cgroup/memory/kubepods/memory.stat": (
        "cache 9000000000\ninactive_file 7\ntotal_inactive_file 4000000000\n"
    ),
    "sys/fs/cgroup/memory/kubepods/burstable/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/kubepods/burstable/pod1/abc/memory.limit_in_bytes": "1073741824\n",
    "sys/fs/cgroup/memory/kubepods/burstable/pod1/abc/memory.usage_in_bytes": "900000000\n",
    "sys/fs/cgroup/memory/kubepods/burstable/pod1/abc/memory.stat": (
        "total_rss 500000000\ntotal_shmem 300000000\ntotal_inactive_file 100000000\n"
    ),
}
VERSION_2 = {
    "proc/self/cgroup": "0::/system.slice/onecopy.service\n",
    "proc/meminfo": "MemTotal: 65641148 kB\nMemAvailable: 48390196 kB\n",
    "sys/fs/cgroup/system.slice/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/memory.high": "max\n",
    "sys/fs/cgroup/system.slice/onecopy.service/memory.max": "2147483648\n",
    "sys/fs/cgroup/system.slice/onecopy.service/memory.high": "1610612736\n",
    "sys/fs/cgroup/system.slice/onecopy.service/memory.current": "1000000000\n",
    "sys/fs/cgroup/system.slice/onecopy.service/memory.stat": (
        "anon 600000000\nfile 400000000\nshmem 200000000\ninactive_file 150000000\n"
    ),
}


def test_what_is_used_is_less_what_the_kernel_takes_back_first(tmp_path: Path) -> None:
    put(tmp_path / "1", VERSION_1)
    assert limited_groups(tmp_path / "1") == [
        ControlGroup("/kubepods/burstable/pod1/abc", GIB, 800_000_000),
        ControlGroup("/kubepods", 33_554_432_000, 28_000_000_000),
    ]
    put(tmp_path / "2", VERSION_2)
    [group] = limited_groups(tmp_path / "2")
    assert group == ControlGroup("/system.slice/onecopy.service", 1_610_612_736, 850_000_000)
    assert group.free_bytes == 760_612_736


def test_the_machine_and_every_group_are_bounds(tmp_path: Path) -> None:
    put(tmp_path, VERSION_1)
    bounds = memory_bounds(tmp_path)
    assert [(one.bound, one.available_bytes) for one in bounds] == [
        ("machine", 48390196 * 1024),
        ("group", GIB - 800_000_000),
        ("group", 5_554_432_000),
    ]
    assert "--memory 1124m" in bounds[1].remedy(100 * MIB)
    assert "MemoryMax=1124M" in bounds[1].remedy(100 * MIB)


def test_nothing_that_can_not_be_read_is_a_limit(tmp_path: Path) -> None:
    assert memory_bounds(tmp_path) == []
    put(tmp_path, {"proc/self/cgroup": "nonsense\n\n0::\n", "proc/meminfo": "?\n"})
    assert memory_bounds(tmp_path) == []


def test_a_part_stays_for_the_processes() -> None:
    assert headroom_bytes(GIB) == GIB // 10
    assert headroom_bytes(100 * MIB) == 64 * MIB
    assert headroom_bytes(512 * GIB) == 2 * GIB


# --- a group of our own


def program(part: str, runtime_dir: RuntimeDir) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tests.allocator.backends.test_control_group",
        part,
        str(runtime_dir.path),
    ]


def test_the_room_ends_where_the_group_does(runtime_dir: RuntimeDir) -> None:
    """Whoever asks for more than the group allows is told so, and nobody is ended for it."""
    with memory_group(400 * MIB, "room") as group:
        ended = subprocess.run(
            program("fill", runtime_dir),
            preexec_fn=group.enter,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        assert group.num_oom_kills == 0
        assert group.most_bytes <= 400 * MIB
    assert found["bound"] == "group"
    # What the two processes take themselves, and what is left for them to grow.
    assert 150 * MIB < found["leased_bytes"] < 400 * MIB - headroom_bytes(400 * MIB)
    assert "the control group" in found["refused"]
    assert "419.4 MB" in found["refused"]
    assert "MemoryMax=" in found["refused"]
    assert found["limit_bytes"] < 400 * MIB


def test_a_client_in_a_smaller_group_than_the_allocators(
    runtime_dir: RuntimeDir, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """The allocator can't know: the client sees it before the kernel ends it."""
    daemon = start_daemon()
    with memory_group(300 * MIB, "client") as group:
        ended = subprocess.run(
            program("fill_as_client", runtime_dir),
            preexec_fn=group.enter,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        assert group.num_oom_kills == 0
    assert 100 * MIB < found["leased_bytes"] < 300 * MIB
    assert "the control group" in found["refused"]
    with daemon.connect() as memory:
        assert memory.statistics().pool.leased_bytes == 0


def fill(runtime_dir: RuntimeDir, found: dict[str, object]) -> None:
    """Lease and write until there is no more."""
    with connect(runtime_dir) as memory:
        leases = []
        try:
            while len(leases) < 1000:
                leases.append(memory.lease(4 * MIB))
                leases[-1].buffer[:] = b"\1" * (4 * MIB)
        except OutOfDeviceMemory as error:
            found["refused"] = str(error)
        found["leased_bytes"] = 4 * MIB * len(leases)
        found["limit_bytes"] = memory.statistics().limit_bytes


def main() -> None:
    """Inside the group."""
    runtime_dir = RuntimeDir.open(sys.argv[2])
    found: dict[str, object] = {"bound": shareable_room().bound}
    if sys.argv[1] == "fill":
        daemon = DaemonProcess(runtime_dir)
        try:
            fill(runtime_dir, found)
        finally:
            daemon.stop()
    else:
        fill(runtime_dir, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
