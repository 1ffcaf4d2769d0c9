"""The runtime directory: what is refused and how to help, where it lies, whose lock it is."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocator import AlreadyRunning, ProcessIdentity, RuntimeDir, RuntimeDirError
from allocator.runtime_dir import LONGEST_NAME, MAX_SOCKET_PATH_BYTES
from tests.allocator.processes import in_fork
from tests.daemon_process import ROOT
from tests.leaks import shared_files

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory away needs root")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="onecopy-", dir="/tmp") as path:
        yield Path(path)


# --- which may be used


def test_a_missing_directory_is_made_private(folder: Path) -> None:
    opened = RuntimeDir.open(folder / "a" / "b")
    assert opened.path.stat().st_mode & 0o777 == 0o700


def test_a_relative_path_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert RuntimeDir.open("here").path == folder / "here"


def test_a_missing_directory_is_not_made_for_a_client(folder: Path) -> None:
    with pytest.raises(RuntimeDirError, match=r"No such file.*--runtime-dir"):
        RuntimeDir.open(folder / "a", create=False)
    assert not (folder / "a").exists()


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o704, 0o740, 0o755, 0o777])
def test_open_to_others(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    expected = rf"open to other users \(mode {mode:04o}\): run `chmod 700 {folder}`"
    with pytest.raises(RuntimeDirError, match=expected):
        RuntimeDir.open(folder)


# --- what others could put in its place


@as_root
def test_a_link_of_another_users(folder: Path) -> None:
    """Who owns the link decides what it leads to, now and later; a link of our own is fine."""
    ours = folder / "ours"
    ours.mkdir(mode=0o700)
    folder.chmod(0o1777)
    link = folder / "link"

    def make() -> str:
        link.symlink_to(ours)
        return "made"

    assert in_fork(make, uid=NOBODY).text == "made"
    for create in (True, False):
        with pytest.raises(RuntimeDirError, match=f"{link} is a link of user id {NOBODY}"):
            RuntimeDir.open(link, create=create)
        with pytest.raises(RuntimeDirError, match="is a link of user id"):
            RuntimeDir.open(link / "below", create=create)
    assert list(ours.iterdir()) == []
    own = folder / "own"
    own.symlink_to("ours")
    assert RuntimeDir.open(own).path == own
    further = folder / "further"
    further.symlink_to(link)  # a link of ours that leads to theirs
    with pytest.raises(RuntimeDirError, match=f"{link} is a link of user id {NOBODY}"):
        RuntimeDir.open(further)


@as_root
def test_below_a_directory_of_another_users(folder: Path) -> None:
    theirs = folder / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, NOBODY, NOBODY)
    (theirs / "ours").mkdir(mode=0o700)
    with pytest.raises(RuntimeDirError, match=f"{theirs} belongs to user id {NOBODY}"):
        RuntimeDir.open(theirs / "ours")
    # Root may have any directory on the way: of its own, and of whoever uses it.
    os.chown(folder, NOBODY, NOBODY)
    os.chown(theirs / "ours", NOBODY, NOBODY)
    assert in_fork(lambda: str(RuntimeDir.open(theirs / "ours").path), uid=NOBODY).text == str(
        theirs / "ours"
    )


def test_below_a_directory_that_everybody_may_change(folder: Path) -> None:
    (folder / "ours").mkdir(mode=0o700)
    folder.chmod(0o777)
    with pytest.raises(RuntimeDirError, match="is one that everybody may write to"):
        RuntimeDir.open(folder / "ours")
    folder.chmod(0o1777)  # as /tmp is: nobody but us may rename what is ours
    assert RuntimeDir.open(folder / "ours")


def test_a_link_that_leads_to_itself(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(RuntimeDirError, match="--runtime-dir"):
        RuntimeDir.open(folder / "loop")


@pytest.mark.parametrize("kind", ["directory", "pipe", "link", "dangling link"])
def test_what_is_no_lock_file_is_refused_in_a_line(folder: Path, kind: str) -> None:
    path = folder / "allocator.lock"
    match kind:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            (folder / "target").write_text("")
            path.symlink_to("target")
        case _:
            path.symlink_to("nowhere")
    opened = RuntimeDir.open(folder)
    with pytest.raises(RuntimeDirError, match=r"allocator\.lock .*[Rr]emove what lies there"):
        opened.lock("allocator")
    with pytest.raises((RuntimeDirError, OSError)):
        opened.owner("allocator")
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize(
    "name", ["allocator.sock", "allocator-requests.sock", "allocator.journal", "allocator.lock"]
)
def test_an_allocator_that_can_not_have_its_names_says_so_in_a_line(
    folder: Path, name: str
) -> None:
    (folder / name).mkdir()
    (folder / name / "more").touch()
    ended = subprocess.run(
        [sys.executable, "-m", "allocator", "--runtime-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    [line] = [one for one in ended.stderr.splitlines() if one.startswith("onecopy allocator: ")]
    assert str(folder) in line
    assert {path.name for path in folder.iterdir()} == {name}
    assert shared_files(RuntimeDir.open(folder).segment_prefix) == []


@as_root
def test_of_another_user(folder: Path) -> None:
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(RuntimeDirError, match=f"belongs to user id {NOBODY}, not to 0: run as"):
        RuntimeDir.open(folder)


@as_root
def test_not_writable(folder: Path) -> None:
    os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o500)
    refused = in_fork(lambda: str(RuntimeDir.open(folder)), uid=NOBODY).text
    assert re.match(r"RuntimeDirError: .* is not writable: choose another with", refused)


@as_root
def test_below_a_directory_that_cannot_be_entered(folder: Path) -> None:
    refused = in_fork(lambda: str(RuntimeDir.open(folder / "a")), uid=NOBODY).text
    assert re.match(r"RuntimeDirError: .* can't be used: Permission denied. Choose", refused)


def test_where_nothing_can_be_made() -> None:
    with pytest.raises(RuntimeDirError, match=r"can't be used: .*ONECOPY_RUNTIME_DIR"):
        RuntimeDir.open("/proc/onecopy")


@pytest.mark.parametrize("create", [True, False])
def test_a_file_is_no_directory(folder: Path, create: bool) -> None:
    (folder / "file").touch(0o700)
    with pytest.raises(RuntimeDirError):
        RuntimeDir.open(folder / "file", create=create)


@pytest.mark.parametrize("letter", ["x", "ü"])  # the second takes two bytes
def test_the_longest_path_that_a_socket_can_have(folder: Path, letter: str) -> None:
    room = MAX_SOCKET_PATH_BYTES - len(os.fsencode(folder)) - len(LONGEST_NAME) - len("//")
    fits = letter * (room // len(letter.encode()))
    opened = RuntimeDir.open(folder / fits)
    assert len(os.fsencode(opened.allocator_requests.removeprefix("ipc://"))) <= 107
    with pytest.raises(RuntimeDirError, match=r"too long: .* limited to 107 bytes.*--runtime-dir"):
        RuntimeDir.open(folder / (fits + letter))


# --- where it lies


def test_the_default_is_the_first_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECOPY_RUNTIME_DIR", "/named")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/first:/run/second")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", None)  # it remembers what it found first
    found = []
    for name in ("ONECOPY_RUNTIME_DIR", "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        found.append(RuntimeDir.default_path())
        monkeypatch.delenv(name)
    assert found == [Path("/named"), Path("/run/first"), Path("/run/user/7/onecopy")]
    assert RuntimeDir.default_path() == Path(tempfile.gettempdir()) / f"onecopy-{os.getuid()}"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECOPY_RUNTIME_DIR", "")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/onecopy")
    assert RuntimeDir.default_path() == Path("/run/onecopy")


def test_segment_names_are_of_one_directory_only(folder: Path) -> None:
    first, second = RuntimeDir.open(folder / "a"), RuntimeDir.open(folder / "b")
    assert first.segment_prefix == RuntimeDir.open(folder / "a").segment_prefix
    assert first.segment_prefix != second.segment_prefix
    before = first.segment_prefix
    first.path.rename(folder / "kept")  # another directory of the same name
    assert RuntimeDir.open(folder / "a").segment_prefix != before


# --- whose lock it is


def test_one_owner_at_a_time(folder: Path) -> None:
    runtime_dir = RuntimeDir.open(folder)
    assert runtime_dir.owner("server") is None
    lock = runtime_dir.lock("server")
    lock.announce("http://here")
    owner = runtime_dir.owner("server")
    assert owner is not None
    assert (owner.process, owner.url) == (ProcessIdentity.own(), "http://here")
    refused = in_fork(lambda: str(runtime_dir.lock("server"))).text
    assert re.match(rf"AlreadyRunning: another server \(pid {os.getpid()}\) runs in", refused)
    runtime_dir.lock("allocator").release()  # another role is another lock
    lock.release()
    assert list(folder.iterdir()) == []
    runtime_dir.lock("server").release()


def test_a_shorter_announcement_replaces_a_longer_one(folder: Path) -> None:
    runtime_dir = RuntimeDir.open(folder)
    lock = runtime_dir.lock("server")
    lock.announce("http://" + "long" * 20)
    lock.announce("http://short")
    owner = runtime_dir.owner("server")
    assert owner is not None
    assert owner.url == "http://short"
    lock.release()


def test_a_dead_owners_file_is_taken_over(folder: Path) -> None:
    runtime_dir = RuntimeDir.open(folder)

    def die() -> str:
        runtime_dir.lock("server")
        os.kill(os.getpid(), 9)
        return "unreachable"

    assert in_fork(die).signal == 9
    assert (folder / "server.lock").exists()
    assert runtime_dir.owner("server") is None
    runtime_dir.lock("server").release()


def test_an_owner_is_not_confused_with_who_got_its_pid(folder: Path) -> None:
    runtime_dir = RuntimeDir.open(folder)
    lock = runtime_dir.lock("server")
    file = folder / "server.lock"
    owner = json.loads(file.read_text())
    file.write_text(json.dumps({**owner, "start_ticks": owner["start_ticks"] - 1}))
    assert runtime_dir.owner("server") is None
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\xff"])
def test_a_damaged_lock_file_has_no_owner(folder: Path, text: str) -> None:
    runtime_dir = RuntimeDir.open(folder)
    (folder / "server.lock").write_bytes(text.encode("latin-1"))
    assert runtime_dir.owner("server") is None
    runtime_dir.lock("server").release()


def test_handover_among_many_never_gives_two_owners(folder: Path) -> None:
    """Each child takes and releases the lock; inside it, it is alone."""
    runtime_dir = RuntimeDir.open(folder)
    taken, alone = folder / "taken", folder / "inside"
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                done = 0
                while done < 50:
                    try:
                        lock = runtime_dir.lock("server")
                    except AlreadyRunning:
                        continue
                    alone.mkdir()  # fails where another is inside
                    with taken.open("ab") as file:
                        file.write(b"x")
                    alone.rmdir()
                    lock.release()
                    done += 1
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert taken.stat().st_size == 200
    assert not (folder / "server.lock").exists()
