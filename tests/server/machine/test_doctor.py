"""What is said of machines of every kind, from texts that such machines show; then of this one."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allocator import AbandonedRun, Room, RuntimeDir, WeightSetWriter
from allocator.backends.runs import RunOwner
from server.console.checks import checks_line
from server.machine import checks, device_checks, doctor, package_checks
from server.machine.checks import Check
from tests.daemon_process import DaemonProcess
from tests.system.running_server import Outcome, onecopy_here

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
GIB = 1 << 30
UNLIMITED = -1

LAPTOP_MOUNTS = """\
proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0
/dev/nvme0n1p2 / ext4 rw,relatime,errors=remount-ro 0 0
tmpfs /run tmpfs rw,nosuid,nodev,noexec,relatime,size=3278112k,mode=755,inode64 0 0
tmpfs /dev/shm tmpfs rw,nosuid,nodev,inode64 0 0
"""
DOCKER_MOUNTS = """\
overlay / overlay rw,relatime,lowerdir=/var/lib/docker/overlay2/l/4T,upperdir=/var/lib/d 0 0
proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0
tmpfs /dev tmpfs rw,nosuid,size=65536k,mode=755,inode64 0 0
shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k,inode64 0 0
"""
ON_DISK_MOUNTS = LAPTOP_MOUNTS + "/dev/sda1 /dev/shm ext4 rw,relatime 0 0\n"
MEMINFO = """\
MemTotal:       65641148 kB
MemFree:        10182916 kB
MemAvailable:   48390196 kB
Buffers:          524288 kB
"""
MEMINFO_FULL = """\
MemTotal:        2030464 kB
MemFree:           80000 kB
MemAvailable:     612352 kB
"""
DEBIAN_LOGIND = """\
# This file is part of systemd.
# See logind.conf(5) for details.

[Login]
#NAutoVTs=6
#KillUserProcesses=no
#RuntimeDirectorySize=10%
#RemoveIPC=yes
"""
NVIDIA_535 = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
NVIDIA_580_OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  \
(dvs-builder@U22-I3-B17-02-5)  Tue Sep 23 09:55:41 UTC 2025
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04.2)
"""
TWO_GPUS = dict.fromkeys(
    ("/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"), True
)
NO_LIBCUDA = "libcuda.so.1: cannot open shared object file: No such file or directory"


def seen(check: Check, status: str, *words: str) -> None:
    """It has the status, says the words in what was seen or in the fix, and a fix where needed."""
    assert check.status == status, check
    assert bool(check.fix) == (status in ("warning", "problem")), check
    for word in words:
        assert word in f"{check.seen}\n{check.fix}", check


# --- kernel, Python, packages


@pytest.mark.parametrize(
    ("release", "failure", "status", "words"),
    [
        ("6.8.0-45-generic", None, "ok", "6.8.0-45-generic"),
        ("5.3.0", None, "ok", ""),
        ("6.0", None, "ok", ""),
        ("5.15.167.4-microsoft-standard-WSL2", None, "ok", ""),
        ("4.18.0-553.el8_10.x86_64", None, "warning", "older than 5.3"),
        ("4.18.0-553.el8_10.x86_64", "Function not implemented", "problem", "upgrade to Linux 5.3"),
        ("5.2.21", "Function not implemented", "problem", "upgrade to Linux 5.3"),
        ("5.10.0-32-amd64", "Operation not permitted", "problem", "seccomp=unconfined"),
    ],
)
def test_kernel(release: str, failure: str | None, status: str, words: str) -> None:
    seen(checks.kernel("Linux", release, failure), status, words, failure or "")


def test_another_system() -> None:
    seen(checks.kernel("Darwin", "24.1.0", None), "problem", "run onecopy on Linux")


@pytest.mark.parametrize(
    ("version", "wanted", "within"),
    [
        ("2.13.0+cpu", "<2.14,>=2.11", True),
        ("2.11", "<2.14,>=2.11", True),
        ("2.11.0", ">=2.11", True),
        ("2.9.1", "<2.14,>=2.11", False),
        ("2.14.0", "<2.14,>=2.11", False),
        ("2.14.0.dev20261101+cu130", "<2.14,>=2.11", False),
        ("2.100", ">=2.11", True),
        ("27.3.0", ">26", True),
        ("26.0", ">26", False),
        ("26", "<=26.0", True),
        ("26.1", "<=26.0", False),
        ("1.5.0", "==1.5", True),
        ("1.5.1", "==1.5", False),
        ("1.5.0", "!=1.5", False),
        ("anything", "", True),
        ("unknown", ">=1", False),
    ],
)
def test_ranges(version: str, wanted: str, within: bool) -> None:
    assert package_checks.is_within(version, wanted) is within


def test_a_range_that_can_not_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'~=2\.1' can't be judged"):
        package_checks.is_within("2.1", "~=2.1")


def test_the_ranges_of_this_project_can_be_judged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = package_checks.declared(project["dependencies"])
    assert len(ranges) == len(project["dependencies"])
    assert ranges["torch"].startswith(">=")
    for wanted in (*ranges.values(), project["requires-python"]):
        assert not package_checks.is_within("0", wanted)


def test_requirements_as_installers_write_them() -> None:
    lines = [
        "pyzmq (>=26.2)",
        "torch<2.14,>=2.11",
        "uvicorn[standard] >= 0.34, <1",
        "rich",
        'pytest>=8.3; extra == "dev"',
        'tomli>=2; python_version < "3.11"',
    ]
    assert package_checks.declared(lines) == {
        "pyzmq": ">=26.2",
        "torch": "<2.14,>=2.11",
        "uvicorn": ">=0.34,<1",
        "rich": "",
    }


def test_packages() -> None:
    package = package_checks.package
    seen(package("torch", "2.13.0+cpu", "<2.14,>=2.11"), "ok", "2.13.0+cpu (<2.14,>=2.11)")
    seen(package("torch", "2.9.0", "<2.14,>=2.11"), "problem", "pip install 'torch<2.14,>=2.11'")
    seen(package("torch", None, ">=2.11"), "problem", "not installed", "pip install 'torch>=2.11'")
    seen(package("torch", "2.9.0", ""), "ok", "2.9.0")
    good, bad = package("rich", "14.0", ">=13.9"), package("gguf", None, ">=0.17")
    seen(package_checks.other_packages([good, good]), "ok", "2")
    seen(package_checks.other_packages([good, bad]), "problem", "gguf not installed", "gguf>=0.17")
    assert "rich" not in package_checks.other_packages([good, bad]).seen
    seen(package_checks.own_package("0.1.0"), "ok", "0.1.0")
    seen(package_checks.own_package(None), "warning", "pip install -e .")


def test_python() -> None:
    seen(package_checks.python("3.11.7", ">=3.11"), "ok", "3.11.7")
    seen(package_checks.python("3.10.14", ">=3.11"), "problem", "3.10.14, not >=3.11")
    seen(package_checks.python("3.10.14", None), "ok")


# --- memory


def test_shared_memory_of_a_laptop() -> None:
    sizes = (33 * GIB, 32 * GIB)
    seen(checks.shared_memory(LAPTOP_MOUNTS, sizes, True, 64 * GIB), "ok", "35.43 GB", "34.36 GB")


def test_shared_memory_of_a_container() -> None:
    found = checks.shared_memory(DOCKER_MOUNTS, (64 << 20, 64 << 20), True, 8 * GIB)
    seen(found, "warning", "67.1 MB", "--shm-size 4g", "mount -o remount,size=4G /dev/shm")


def test_shared_memory_that_is_full() -> None:
    found = checks.shared_memory(LAPTOP_MOUNTS, (33 * GIB, 5 << 20), True, 64 * GIB)
    seen(found, "warning", "5.2 MB free", "ls -lS /dev/shm")


def test_shared_memory_on_a_disk() -> None:
    sizes = (33 * GIB, 32 * GIB)
    # The last mount is the one that is seen.
    found = checks.shared_memory(ON_DISK_MOUNTS, sizes, True, 4 * GIB)
    seen(found, "warning", "ext4, not tmpfs", "mount -t tmpfs -o size=2G,mode=1777")
    without = LAPTOP_MOUNTS.replace("tmpfs /dev/shm tmpfs", "tmpfs /dev/shmoo tmpfs")
    seen(checks.shared_memory(without, sizes, True, None), "warning", "not a mount", "size=1G")


def test_shared_memory_that_holds_nothing() -> None:
    seen(checks.shared_memory(LAPTOP_MOUNTS, None, False, 8 * GIB), "problem", "mount -t tmpfs")
    read_only = checks.shared_memory(LAPTOP_MOUNTS, (GIB, GIB), False, 8 * GIB)
    seen(read_only, "problem", "not writable", "remount,rw")
    endless = checks.shared_memory(LAPTOP_MOUNTS, (0, 0), True, 8 * GIB)
    seen(endless, "problem", "without a size", "remount,size=4G")


def test_shared_memory_where_no_mounts_are_shown() -> None:
    seen(checks.shared_memory(None, (33 * GIB, 32 * GIB), True, None), "ok")


def test_memory() -> None:
    seen(checks.memory(MEMINFO), "ok", "49.55 GB available of 67.22 GB")
    seen(checks.memory(MEMINFO_FULL), "warning", "627.0 MB available", "ps aux")
    seen(checks.memory(None), "problem", "ProcSubset=all")
    seen(checks.memory("MemTotal: 1 kB\n"), "problem")  # before Linux 3.14


def test_memory_limit() -> None:
    def group(limit: int, free: int) -> Room:
        return Room(free, limit, "group", "the control group /docker/8ab1")

    seen(checks.memory_limit(None, MEMINFO), "ok", "none")
    seen(checks.memory_limit(group(128 * GIB, GIB), MEMINFO), "ok", "none")
    seen(checks.memory_limit(group(65641148 * 1024, GIB), MEMINFO), "ok", "none")
    found = checks.memory_limit(group(8 * GIB, 5 * GIB), MEMINFO)
    seen(found, "info", "8.59 GB of 67.22 GB by the control group /docker/8ab1, 5.37 GB free")
    seen(found, "info", "leaves 859.0 MB to processes")
    seen(checks.memory_limit(group(8 * GIB, 5 * GIB), None), "info", "8.59 GB by")
    seen(checks.memory_limit(group(8 * GIB, 300 << 20), None), "warning", "314.6 MB free")
    found = checks.memory_limit(group(512 << 20, 512 << 20), MEMINFO)
    seen(found, "warning", "docker run --memory")


def test_limits_of_processes() -> None:
    seen(checks.address_space(UNLIMITED, None), "ok", "unlimited")
    seen(checks.address_space(GIB, "`ulimit -v unlimited`"), "problem", "1.07 GB", "ulimit -v")
    seen(checks.file_size(UNLIMITED, None), "ok", "unlimited")
    seen(checks.file_size(GIB, "`ulimit -f unlimited`"), "problem", "1.07 GB", "ulimit -f")


def test_huge_pages() -> None:
    offered = "always within_size [advise] never deny force\n"
    seen(checks.huge_pages(offered), "info", "for shared memory: advise")
    seen(checks.huge_pages(None), "info", "not supported")


@pytest.mark.parametrize(
    ("online", "words"),
    [("0\n", "1 node"), ("0-1\n", "2 nodes"), ("0-1,4,8-9\n", "5 nodes"), (None, "1 node")],
)
def test_numa(online: str | None, words: str) -> None:
    found = checks.numa(online)
    assert (found.status, found.seen) == ("info", words)


# --- limits


def test_locked_memory() -> None:
    seen(checks.locked_memory(8 << 20, False, True), "warning", "8.4 MB", "LimitMEMLOCK=infinity")
    seen(checks.locked_memory(8 << 20, False, False), "info", "8.4 MB")
    seen(checks.locked_memory(8 << 20, True, True), "ok", "unlimited")  # CAP_IPC_LOCK
    seen(checks.locked_memory(UNLIMITED, False, True), "ok", "unlimited")


def test_open_files() -> None:
    seen(checks.open_files(1024, 524288), "ok", "1024")
    seen(checks.open_files(UNLIMITED, UNLIMITED), "ok", "unlimited")
    seen(checks.open_files(256, UNLIMITED), "warning", "`ulimit -n 4096`")
    seen(checks.open_files(256, 2048), "warning", "`ulimit -n 2048`")
    seen(checks.open_files(256, 512), "warning", "as root: `ulimit -n 4096`")


def test_sysctls() -> None:
    seen(checks.memory_maps("65530\n"), "ok", "65530")
    seen(checks.memory_maps("1048576\n"), "ok")
    seen(checks.memory_maps("4096\n"), "warning", "sysctl vm.max_map_count=65530")
    seen(checks.memory_maps(None), "info")
    seen(checks.overcommit("0\n"), "ok")
    seen(checks.overcommit("1\n"), "ok")
    seen(checks.overcommit("2\n"), "warning", "sysctl vm.overcommit_memory=0")
    seen(checks.overcommit(None), "info")


@pytest.mark.parametrize(
    ("configurations", "uid", "lingers", "status"),
    [
        (None, 1000, False, "ok"),
        ([], 1000, False, "warning"),
        ([DEBIAN_LOGIND], 1000, False, "warning"),
        ([DEBIAN_LOGIND], 999, False, "ok"),
        ([DEBIAN_LOGIND], 0, False, "ok"),
        ([DEBIAN_LOGIND], 1000, True, "ok"),
        (["[Login]\nRemoveIPC=no\n"], 1000, False, "ok"),
        (["[Login]\n  RemoveIPC = False\n"], 1000, False, "ok"),
        (["[Login]\nRemoveIPC=no\n", "[Login]\nRemoveIPC=yes\n"], 1000, False, "warning"),
        (["[Login]\nRemoveIPC=yes\n", "[Login]\nRemoveIPC=off\n"], 1000, False, "ok"),
        (["[Login]\nRemoveIPC=no\nRemoveIPC=nonsense\n"], 1000, False, "ok"),
        (["[Manager]\nRemoveIPC=no\n"], 1000, False, "warning"),
        (["[Login]\n;RemoveIPC=no\n"], 1000, False, "warning"),
    ],
)
def test_remove_ipc(configurations: list[str] | None, uid: int, lingers: bool, status: str) -> None:
    found = checks.remove_ipc(configurations, uid, "ada", lingers)
    seen(found, status, "loginctl enable-linger ada" if status == "warning" else "")


def test_the_order_of_logind_files(tmp_path: Path) -> None:
    assert doctor.logind_configurations(tmp_path) is None  # no logind has ever run
    put(
        tmp_path,
        {
            "run/systemd/seats/seat0": "",
            "usr/lib/systemd/logind.conf": "vendor",
            "etc/systemd/logind.conf": "main",
            "usr/lib/systemd/logind.conf.d/20-b.conf": "masked",
            "etc/systemd/logind.conf.d/20-b.conf": "second",
            "run/systemd/logind.conf.d/10-a.conf": "first",
            "usr/lib/systemd/logind.conf.d/90-c.conf": "last",
            "etc/systemd/logind.conf.d/README": "not one of them",
        },
    )
    assert doctor.logind_configurations(tmp_path) == ["main", "first", "second", "last"]


# --- onecopy


def test_what_runs() -> None:
    seen(checks.allocator(71, None), "ok", "71")
    seen(checks.allocator(None, None), "info", "none runs")
    seen(checks.allocator(None, 72), "warning", "onecopy stop")
    seen(checks.server(72, "http://127.0.0.1:8000"), "ok", "72", "http://127.0.0.1:8000")
    seen(checks.server(72, ""), "ok", "starting")
    seen(checks.server(None, ""), "info")


def test_segments() -> None:
    seen(checks.segments("/onecopy-ab-", [], None), "ok", "none")
    seen(checks.segments("/onecopy-ab-", [269_000_000], 71), "ok", "269.0 MB")
    found = checks.segments("/onecopy-ab-", [2_000_000_000, 500_000_000], None)
    seen(found, "warning", "2, 2.50 GB", "onecopy doctor --fix")


def test_left_behind() -> None:
    def run(owner: RunOwner | None, takes_locks: bool, in_use: bool) -> AbandonedRun:
        segments = ("/onecopy-ab-cd-1", "/onecopy-ab-cd-2")
        return AbandonedRun("/onecopy-ab-cd", segments, 269_000_000, owner, takes_locks, in_use)

    owner = RunOwner("/run/user/7/onecopy", 1, 2)
    seen(checks.left_behind([]), "ok", "nothing")
    found = checks.left_behind([run(owner, True, False)])
    seen(found, "warning", "269.0 MB", "/onecopy-ab-cd-1", "/run/user/7/onecopy", "--fix")
    seen(checks.left_behind([run(owner, True, True)]), "info", "still in use")
    found = checks.left_behind([run(None, False, False)])
    seen(found, "warning", "earlier version", "rm /dev/shm/onecopy-ab-cd-*")
    many = checks.left_behind([run(owner, True, False)] * 9)
    seen(many, "warning", "1.34 GB by 5 more")


def test_smaps() -> None:
    seen(checks.smaps(None), "ok")
    seen(checks.smaps("PermissionError: [Errno 13]"), "warning", "[Errno 13]", "/proc")


def test_a_directory_that_can_be_made(tmp_path: Path) -> None:
    assert doctor.can_be_made(tmp_path / "a" / "b")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert not doctor.can_be_made(tmp_path / "nowhere")
    (tmp_path / "program").touch(0o755)
    assert not doctor.can_be_made(tmp_path / "program" / "a")


# --- devices


@pytest.mark.parametrize(
    ("version", "usable", "failure", "status", "words"),
    [
        (None, {}, NO_LIBCUDA, "info", "no NVIDIA GPU: onecopy runs on host memory"),
        (None, {}, None, "info", "no NVIDIA GPU"),  # an image with CUDA on a machine without
        (NVIDIA_535, TWO_GPUS, None, "ok", "driver 535.183.01, 2 GPUs, libcuda.so.1 loads"),
        (NVIDIA_580_OPEN, TWO_GPUS, None, "ok", "driver 580.95.05, 2 GPUs"),
        (NVIDIA_580_OPEN, {}, NO_LIBCUDA, "warning", "--gpus all"),
        (NVIDIA_535, TWO_GPUS, NO_LIBCUDA, "warning", "NVIDIA_DRIVER_CAPABILITIES"),
        (NVIDIA_535, TWO_GPUS | {"/dev/nvidia1": False}, None, "warning", "ls -l /dev/nvidia1"),
        (NVIDIA_535, {"/dev/nvidia0": True, "/dev/nvidiactl": True}, None, "warning", "1 GPU, but"),
        (None, TWO_GPUS, None, "ok", "no driver shown"),
    ],
)
def test_nvidia(
    version: str | None, usable: dict[str, bool], failure: str | None, status: str, words: str
) -> None:
    seen(device_checks.nvidia(version, usable, failure), status, words)


@pytest.mark.parametrize(
    ("mode", "status", "words"),
    [
        ("default", "ok", "Some GPU, 70.00 GB free"),
        ("unknown", "ok", ""),
        ("exclusive", "warning", "one instance"),
        ("exclusive thread", "warning", "nvidia-smi -i GPU-1 -c DEFAULT"),
        ("prohibited", "problem", "lets no program use it"),
    ],
)
def test_gpu(mode: str, status: str, words: str) -> None:
    seen(device_checks.gpu("GPU-1", "Some GPU", 70_000_000_000, mode), status, words)


def test_cpu() -> None:
    sapphire = (
        "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\n"
        "flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n\n"
        "processor\t: 1\nmodel name\t: other\nflags\t\t: fpu\n"
    )
    graviton = "processor\t: 0\nFeatures\t: fp asimd sve asimdhp i8mm bf16\nCPU part\t: 0xd40\n"
    old = "model name\t: Pentium\nflags\t\t: fpu sse2\n"
    platinum = "Intel(R) Xeon(R) Platinum 8481C: amx_bf16, avx512_bf16, avx2"
    assert device_checks.cpu(sapphire).seen == platinum
    assert device_checks.cpu(graviton).seen == "sve, bf16, i8mm"
    assert device_checks.cpu(old).seen == "Pentium: no amx_bf16, avx512_bf16, avx2"
    amd = old.replace("sse2", "avx2 avx512_bf16")
    assert device_checks.cpu(amd).seen == "Pentium: avx512_bf16, avx2; no amx_bf16"
    seen(device_checks.cpu(amd), "info")
    seen(device_checks.cpu(None), "info", "can't be read")


def test_cpu_kernels() -> None:
    seen(device_checks.cpu_kernels({"avx2": "", "portable": ""}), "info")
    assert (
        device_checks.cpu_kernels({"avx2": "", "portable": ""}).seen
        == "avx2; portable by --cpu-kernels"
    )
    withheld = device_checks.cpu_kernels({"amx": "the kernel does not grant it", "avx2": ""})
    assert withheld.seen == "avx2; not amx: the kernel does not grant it"
    seen(
        device_checks.cpu_kernels({"portable": "not compiled"}),
        "warning",
        "none",
        "apt install g++",
    )


# --- what it adds up to


def test_the_summary() -> None:
    good, known = checks.ok("a", ""), checks.info("b", "")
    doubtful, bad = checks.warning("c", "", "x"), checks.problem("d", "", "y")
    assert checks.worst([good, known]) == "ok"
    assert checks.worst([good, doubtful, known]) == "warning"
    assert checks.worst([bad, doubtful]) == "problem"
    assert checks_line([good, known]) == "Nothing stands in the way."
    line = checks_line([bad, doubtful, doubtful])
    assert line == "1 problem (d), 2 warnings (c, c); each fix is above."


# --- the command, on this machine


def run_doctor(*arguments: str, prefix: tuple[str, ...] = ()) -> Outcome:
    """In a process of its own, which `prefix` may change."""
    ended = subprocess.run(
        [*prefix, sys.executable, "-m", "server.cli", "doctor", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def reported(ended: Outcome) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status, and name → check of the one JSON document on stdout."""
    assert ended.stderr == ""
    document = json.loads(ended.stdout)
    assert ended.status == (1 if document["status"] == "problem" else 0)
    found = {check["name"]: check for check in document["checks"]}
    assert len(found) == len(document["checks"])
    return ended.status, found


def report(*arguments: str, prefix: tuple[str, ...]) -> tuple[int, dict[str, dict[str, Any]]]:
    return reported(run_doctor("--json", *arguments, prefix=prefix))


def report_here(directory: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The same where nothing but the directory matters: in this process, a second sooner."""
    return reported(onecopy_here("doctor", "--json", "--runtime-dir", str(directory)))


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_command(runtime_dir: RuntimeDir) -> None:
    status, found = report("--runtime-dir", str(runtime_dir.path), prefix=())
    # What the tests themselves need is there.
    for name in ("kernel", "python", "torch", "other packages", "smaps", "runtime directory"):
        assert found[name]["status"] == "ok", found[name]
    assert found["runtime directory"]["seen"] == str(runtime_dir.path)
    assert (found["allocator"]["seen"], found["segments"]["seen"]) == ("none runs", "none")
    assert list(runtime_dir.path.iterdir()) == []
    table = run_doctor("--runtime-dir", str(runtime_dir.path))
    assert table.status == status
    assert table.stdout.startswith("CHECK ")
    assert all(f"\n{name} " in table.stdout for name in found)


def test_a_directory_that_is_not_there_yet(runtime_dir: RuntimeDir) -> None:
    missing = runtime_dir.path / "one" / "two"
    _, found = report_here(missing)
    seen(Check(**found["runtime directory"]), "ok", str(missing), "made when onecopy starts")
    assert not missing.parent.exists()


def without_privileges(directory: Path) -> tuple[str, ...]:
    """What to put before a command, so that the mode of our own files holds for us, too."""
    if os.geteuid() != 0:
        return ()
    prefix = ("setpriv", "--bounding-set=-all")
    probe = subprocess.run(
        [*prefix, "test", "-r", str(directory)], capture_output=True, text=True, check=False
    )
    if probe.returncode != 1 or probe.stderr:
        pytest.skip(f"this user can't give up its privileges: {probe.stderr.strip()}")
    return prefix


def test_a_directory_without_permissions(runtime_dir: RuntimeDir) -> None:
    closed = runtime_dir.path / "closed"
    closed.mkdir(mode=0o000)
    prefix = without_privileges(closed)
    status, found = report("--runtime-dir", str(closed), prefix=prefix)
    assert status == 1
    seen(Check(**found["runtime directory"]), "problem", str(closed), "is not writable")
    closed.chmod(0o500)
    status, found = report("--runtime-dir", str(closed / "new"), prefix=prefix)
    assert status == 1
    seen(Check(**found["runtime directory"]), "problem", str(closed), "can't be made there")
    closed.rmdir()


@pytest.mark.parametrize("fault", ["open", "file", "below a file", "long", "lock"])
def test_a_bad_runtime_dir(runtime_dir: RuntimeDir, fault: str) -> None:
    path, words = runtime_dir.path / "bad", "is not a directory"
    match fault:
        case "open":
            path.mkdir(mode=0o755)
            words = f"chmod 700 {path}"
        case "file":
            path.write_text("")
        case "below a file":
            path.write_text("")
            path, words = path / "deeper", "Not a directory"
        case "long":
            path, words = path / ("x" * 100), "is too long"
        case "lock":
            (path / "server.lock").mkdir(parents=True, mode=0o700)
            path.chmod(0o700)
            words = "server.lock is no file"
    status, found = report_here(path)
    assert status == 1
    seen(Check(**found["runtime directory"]), "problem", str(path), words)
    assert "allocator" not in found
    if fault == "open":
        table = onecopy_here("doctor", "--runtime-dir", str(path))
        assert table.status == 1
        assert "runtime directory  problem  " in table.stdout
        assert words in table.stdout
    for entry in runtime_dir.path.glob("bad/*"):
        entry.rmdir()
    bad = runtime_dir.path / "bad"
    if bad.is_dir():
        bad.rmdir()
    bad.unlink(missing_ok=True)


def test_an_allocator_that_runs_is_killed_and_runs_again(
    runtime_dir: RuntimeDir, start_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = start_daemon()
    with daemon.connect() as memory:
        # Not entered: once the daemon is gone, it can't even give up what it writes.
        writer = memory.open_weight_set("doctor", {})
        assert isinstance(writer, WeightSetWriter)
        writer.reserve(3 << 20)[:] = bytes(3 << 20)
        _, found = report_here(runtime_dir.path)
        assert found["allocator"]["seen"] == f"runs, pid {daemon.pid}"
        seen(Check(**found["segments"]), "ok", "1, 3.1 MB, of the allocator")
        daemon.kill()
    _, found = report_here(runtime_dir.path)  # its lock file is still there
    assert found["allocator"]["seen"] == "none runs"
    seen(Check(**found["segments"]), "warning", "1, 3.1 MB", "start onecopy once")
    start_daemon()
    _, found = report_here(runtime_dir.path)
    seen(Check(**found["segments"]), "ok")


def test_a_small_shm(runtime_dir: RuntimeDir) -> None:
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"this user can't make a mount namespace: {probe.stderr.strip()}")
    mount = 'mount -t tmpfs -o size=64m shm /dev/shm && ulimit -n 256 && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", mount, "sh")
    status, found = report("--runtime-dir", str(runtime_dir.path), prefix=prefix)
    assert status == 0
    seen(Check(**found["/dev/shm"]), "warning", "67.1 MB", "--shm-size", "remount")
    seen(Check(**found["open files"]), "warning", "256")


def test_a_proc_of_pids_only(runtime_dir: RuntimeDir) -> None:
    """As under systemd's ProcSubset=pid; nothing else of /proc can be read then."""
    mount = 'mount -t proc -o subset=pid proc /proc && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", mount, "sh")
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"this user can't mount such a /proc: {probe.stderr.strip()}")
    status, found = report("--runtime-dir", str(runtime_dir.path), prefix=prefix)
    assert status == 1
    seen(Check(**found["memory"]), "problem", "ProcSubset=all")
    assert found["smaps"]["status"] == "ok"


def test_torch_stays_out() -> None:
    program = (
        "import sys; from server.machine.doctor import examine; found = examine(None)\n"
        "assert len(found) > 15; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
