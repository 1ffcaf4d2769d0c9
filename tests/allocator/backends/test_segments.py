"""Names in /dev/shm, which others use, too: whose they are, and when they may be removed."""

import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator import RuntimeDir, StaleGeneration, abandoned_runs, connect, remove_abandoned
from allocator.backends import runs, segments
from allocator.backends.host import SHM_ROOT, HostBackend
from allocator.backends.runs import RunLock, RunOwner
from allocator.errors import InvalidMessage, NameTaken, NotWriter
from tests.allocator.backends.small_shm import handle_of, load
from tests.allocator.processes import ClientProcess, in_fork
from tests.daemon_process import ROOT, DaemonProcess
from tests.leaks import Leaks, shared_files

NOBODY = 65534
MIB = 1 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")

StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def run(runtime_dir: RuntimeDir) -> Iterator[str]:
    """A run's name; what is left of it is removed."""
    name = runs.new_run(runtime_dir.segment_prefix)
    yield name
    for left in shared_files(name):
        (SHM_ROOT / left).unlink()


@pytest.fixture
def segment(run: str) -> str:
    """One of two pages, with its memory."""
    segments.create(f"{run}-1", 8192)
    with segments.opened(f"{run}-1", writable=True) as descriptor:
        os.posix_fallocate(descriptor, 0, 8192)
    return f"{run}-1"


@pytest.fixture
def elsewhere(no_leaks: Leaks) -> Iterator[RuntimeDir]:
    """Another runtime directory, which a test may remove."""
    opened = RuntimeDir.open(Path(tempfile.mkdtemp(prefix="onecopy-", dir="/tmp")))
    prefix = opened.segment_prefix
    yield opened
    for name in shared_files(prefix):
        (SHM_ROOT / name).unlink()
    shutil.rmtree(opened.path, ignore_errors=True)


def owned(run: str, directory: Path) -> None:
    """As an allocator of that directory leaves it that is killed."""
    RunLock.take(run, RunOwner.of(directory)).leave()


def found(run: str) -> runs.AbandonedRun | None:
    return next((one for one in abandoned_runs() if one.run == run), None)


# --- what proves that a segment is used


def test_a_mapping_is_seen_as_long_as_it_lives_whatever_was_closed(
    run: str, segment: str, runtime_dir: RuntimeDir
) -> None:
    owned(run, runtime_dir.path)
    assert (one := found(run)) is not None
    assert (one.in_use, one.num_bytes) == (False, 8192 + 4096)
    with segments.opened(segment, writable=False) as descriptor:
        mapped = mmap.mmap(descriptor, 8192, mmap.MAP_SHARED, mmap.PROT_READ)
    view = memoryview(mapped)
    assert (one := found(run)) is not None
    assert one.in_use
    assert remove_abandoned(run) is None
    # A child has it, too, and nothing but its end gives it up.
    inherited = in_fork(lambda: str(remove_abandoned(run)))
    assert inherited.text == "None"
    view.release()
    mapped.close()
    assert (one := found(run)) is not None
    assert not one.in_use
    assert remove_abandoned(run) is not None
    assert shared_files(run) == []


def test_a_mapping_in_another_namespace_of_processes_is_seen(
    run: str, segment: str, runtime_dir: RuntimeDir
) -> None:
    """As in another container of the pod: its pids mean nothing here."""
    probe = subprocess.run(
        ["unshare", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"this user can't make a namespace of processes: {probe.stderr.strip()}")
    owned(run, runtime_dir.path)
    program = (
        "import mmap, sys\n"
        "from allocator.backends import segments\n"
        "with segments.opened(sys.argv[1], writable=False) as fd:\n"
        "    mapped = mmap.mmap(fd, 8192, mmap.MAP_SHARED, mmap.PROT_READ)\n"
        "print('mapped', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program, segment]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mapped\n"
        assert (one := found(run)) is not None
        assert one.in_use
        assert remove_abandoned(run) is None
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    assert remove_abandoned(run) is not None


def test_what_an_allocator_owns_is_not_abandoned(
    run: str, segment: str, runtime_dir: RuntimeDir
) -> None:
    lock = RunLock.take(run, RunOwner.of(runtime_dir.path))
    assert found(run) is None
    assert remove_abandoned(run) is None
    lock.release()
    assert (one := found(run)) is not None
    assert (one.takes_locks, one.may_be_removed) == (False, False)  # as of an earlier version
    assert remove_abandoned(run) is None
    assert shared_files(run) == [segment.lstrip("/")]


def test_who_opens_what_is_just_removed_is_told_that_it_is_gone(
    run: str, segment: str, runtime_dir: RuntimeDir
) -> None:
    owned(run, runtime_dir.path)
    assert remove_abandoned(run) is not None
    with pytest.raises(StaleGeneration, match="is gone"), segments.opened(segment, writable=False):
        pass


# --- allocators that are gone


def killed_in(elsewhere: RuntimeDir) -> str:
    """A daemon that had loaded a set, and was killed with all its clients. Its run."""
    daemon = DaemonProcess(elsewhere)
    with ClientProcess(elsewhere) as client:
        client.do.load("k", MIB, 7)
        daemon.kill()
        client.kill()
    [run] = runs.runs_of(elsewhere.segment_prefix)
    assert len(shared_files(run)) == 2
    return run


def test_the_next_allocator_removes_what_is_left_of_a_directory_that_is_gone(
    elsewhere: RuntimeDir, start_daemon: StartDaemon
) -> None:
    run = killed_in(elsewhere)
    shutil.rmtree(elsewhere.path)
    daemon = start_daemon()
    assert shared_files(run) == []
    with daemon.connect() as memory:
        [event] = [one for one in memory.events() if one.kind == "removed"]
        assert event.text.startswith("1 segments, 1.1 MB, of an allocator of")
        assert str(elsewhere.path) in event.text


def test_what_a_process_still_maps_stays(elsewhere: RuntimeDir, start_daemon: StartDaemon) -> None:
    daemon = DaemonProcess(elsewhere)
    with ClientProcess(elsewhere) as client:
        client.do.load("k", MIB, 7)
        daemon.kill()
        run = runs.runs_of(elsewhere.segment_prefix)[0]
        shutil.rmtree(elsewhere.path)
        start_daemon()
        assert len(shared_files(run)) == 2
        assert (one := found(run)) is not None
        assert one.in_use
        client.kill()
    assert remove_abandoned(run) is not None


def test_an_allocator_that_lives_keeps_what_it_has_though_its_directory_was_removed(
    elsewhere: RuntimeDir, start_daemon: StartDaemon
) -> None:
    other = DaemonProcess(elsewhere)
    with connect(elsewhere) as memory:
        assert load(memory, "k", MIB) == "loaded"
    run = runs.runs_of(elsewhere.segment_prefix)[0]
    shutil.rmtree(elsewhere.path)
    start_daemon()
    assert len(shared_files(run)) == 2
    other.stop()
    assert shared_files(run) == []


def test_where_the_directory_is_still_there_its_own_next_allocator_takes_over(
    elsewhere: RuntimeDir, start_daemon: StartDaemon
) -> None:
    run = killed_in(elsewhere)
    start_daemon()
    assert len(shared_files(run)) == 2
    successor = DaemonProcess(elsewhere)
    with connect(elsewhere) as memory:
        assert [one.state for one in memory.statistics().weight_sets] == ["idle"]
    assert found(run) is None  # it answers for it now
    assert len(runs.runs_of(elsewhere.segment_prefix)) == 2
    successor.stop()
    assert shared_files(elsewhere.segment_prefix) == []


@pytest.fixture
def own_shm() -> Iterator[Path]:
    """A folder of the file system of segments, to be mounted as /dev/shm."""
    with tempfile.TemporaryDirectory(prefix="test-", dir=SHM_ROOT) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_the_doctor_tells_of_what_is_left_behind_and_removes_it(
    elsewhere: RuntimeDir, runtime_dir: RuntimeDir, own_shm: Path
) -> None:
    """In a /dev/shm where nothing else is: other tests have allocators that were killed just now,
    whose segments it would remove, too."""
    run = killed_in(elsewhere)
    for name in shared_files(run):
        (own_shm / name).hardlink_to(SHM_ROOT / name)

    def doctor(*options: str) -> subprocess.CompletedProcess[str]:
        mount = 'mount --bind "$0" /dev/shm && exec "$@"'
        arguments = ["doctor", "--runtime-dir", str(runtime_dir.path), *options]
        command = [sys.executable, "-m", "server.cli", *arguments]
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", mount, str(own_shm), *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "400"},
        )

    if "unshare" in (told := doctor()).stderr:
        pytest.skip(f"this user can't make a mount namespace: {told.stderr.strip()}")
    assert f"1 segments ({shared_files(run)[0]}" in told.stdout.replace("(/", "(")
    assert f"left by an allocator of {elsewhere.path}" in told.stdout
    assert len(list(own_shm.iterdir())) == 2
    fixed = doctor("--fix")
    assert f"removed 1 segments, 1.1 MB: {run}-*" in fixed.stderr
    assert list(own_shm.iterdir()) == []
    assert str(elsewhere.path) not in doctor().stdout


# --- others, who may write to /dev/shm as well


@as_root
@pytest.mark.parametrize("kind", ["file", "directory", "full directory", "pipe", "link", "owner"])
def test_what_others_put_there_keeps_no_allocator_from_starting(
    runtime_dir: RuntimeDir, start_daemon: StartDaemon, kind: str
) -> None:
    name = "deadbeef-owner" if kind == "owner" else "evil"
    path = SHM_ROOT / f"{runtime_dir.segment_prefix.lstrip('/')}{name}"

    def put() -> str:
        match kind:
            case "file" | "owner":
                path.touch()
            case "directory" | "full directory":
                path.mkdir()
                if kind == "full directory":
                    (path / "more").touch()
            case "pipe":
                os.mkfifo(path)
            case _:
                path.symlink_to("/etc/passwd")
        return "put"

    assert in_fork(put, uid=NOBODY).text == "put"
    try:
        for key in ("a", "b"):
            daemon = start_daemon()
            with daemon.connect() as memory:
                assert load(memory, key, MIB) == "loaded"
                memory.lease(MIB).release()
            daemon.kill()
        daemon = start_daemon()
        with daemon.connect() as memory:
            assert [one.state for one in memory.statistics().weight_sets] == ["idle", "idle"]
        assert daemon.stop() == 0
        assert path.lstat().st_uid == NOBODY  # it is none of our business
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def test_a_name_that_is_taken_is_told_apart_from_a_full_device(run: str) -> None:
    backend = HostBackend()
    (SHM_ROOT / f"{run}-1".lstrip("/")).touch()
    with pytest.raises(NameTaken):
        backend.reserve(f"{run}-1", 4096)
    with pytest.raises(NameTaken):
        backend.reserve_pool(f"{run}-1", 4096)


def test_names_can_not_be_guessed(daemon: DaemonProcess) -> None:
    """Or another user could take the next ones."""
    with daemon.connect() as memory:
        for key in ("a", "b"):
            assert load(memory, key, 4096) == "loaded"
        names = [one.segment.rpartition("-")[2] for one in memory.statistics().weight_sets]
    assert len({*names}) == 2
    assert all(len(name) == 6 for name in names)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "another user's"])
def test_only_a_file_of_ours_is_a_segment(run: str, kind: str) -> None:
    backend = HostBackend()
    path = SHM_ROOT / f"{run}-1".lstrip("/")
    target = SHM_ROOT / f"{run}-2".lstrip("/")
    match kind:
        case "link":
            target.write_bytes(bytes(4096))
            path.symlink_to(target)
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case _:
            if os.geteuid():
                pytest.skip("giving a file away needs root")
            path.write_bytes(bytes(4096))
            os.chown(path, NOBODY, NOBODY)
    try:
        for writable in (True, False):
            with pytest.raises((StaleGeneration, NotWriter)):
                backend.map(handle_of(f"{run}-1", 4096), writable=writable)
        assert backend.identity(f"{run}-1") == ""
        with pytest.raises(StaleGeneration):
            backend.seal(f"{run}-1")
        backend.free(f"{run}-1")
        assert backend.sweep(run) == ([f"{run}-2"] if kind == "link" else [])
        assert os.path.lexists(path)
    finally:
        if kind == "directory":
            path.rmdir()


# --- nothing sparse is sealed


def test_a_segment_that_lacks_memory_is_not_sealed(run: str) -> None:
    backend = HostBackend()
    backend.reserve(f"{run}-1", MIB)
    with pytest.raises(InvalidMessage, match=r"of the 1048576 bytes .* only 0 have memory"):
        backend.seal(f"{run}-1")
    handle = handle_of(f"{run}-1", MIB)
    mapping = backend.map(handle, writable=True, commit=False)
    mapping.write(0, b"x" * 4096)
    mapping.complete()
    mapping.close()
    backend.seal(f"{run}-1")
    assert backend.committed_bytes(f"{run}-1") == MIB
