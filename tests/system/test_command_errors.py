"""Every command where what it needs is missing, broken, silent or not ours: one line that names the
fix, exit status 1, and no long wait."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from allocator import RuntimeDir
from tests.daemon_process import DaemonProcess
from tests.system.running_server import (
    Outcome,
    Server,
    leftovers,
    onecopy,
    onecopy_here,
    wait_until,
)
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

OF_THE_SERVER = (("ps",), ("scale", "2"), ("verify",))
OF_THE_ALLOCATOR = (
    ("ps", "--memory"),
    ("pin", "tiny"),
    ("evict", "tiny"),
    ("sleep", "tiny"),
    ("wake", "tiny"),
)
ALL = (*OF_THE_SERVER, *OF_THE_ALLOCATOR, ("stop",))
NOBODY = 65534


@pytest.fixture
def directory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="onecopy-t-"))
    yield folder
    shutil.rmtree(folder)


def run(command: Sequence[str], directory: Path) -> Outcome:
    return onecopy_here(*command, "--runtime-dir", str(directory))


def assert_one_line(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 1, outcome
    assert outcome.stdout == ""
    *before, line = outcome.stderr.rstrip("\n").split("\n")
    assert before == []
    assert line.startswith("onecopy: ")
    for word in words:
        assert word in line, line


# --- nothing runs


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_nothing_runs(command: tuple[str, ...], directory: Path) -> None:
    outcome = run(command, directory)
    if command == ("stop",):
        assert (outcome.status, outcome.stdout) == (0, f"nothing runs in {directory}\n")
        return
    fix = "`onecopy serve`" if command in OF_THE_SERVER else "`onecopy allocator --runtime-dir"
    assert_one_line(outcome, str(directory), fix)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("command", OF_THE_ALLOCATOR[1:], ids=" ".join)
def test_an_allocator_without_a_model(command: tuple[str, ...], daemon: DaemonProcess) -> None:
    assert_one_line(run(command, daemon.runtime_dir.path), "load one with `onecopy serve`")


# --- a directory that can't be used


def as_it_is_not(folder: Path) -> None:
    folder.rmdir()


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


def open_to_others(folder: Path) -> None:
    folder.chmod(0o755)


def of_another_user(folder: Path) -> None:
    os.chown(folder, NOBODY, -1)


def with_a_folder_for_a_lock(folder: Path) -> None:
    (folder / "server.lock").mkdir()
    (folder / "allocator.lock").mkdir()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (as_it_is_not, "No such file or directory. Choose another"),
    "a file": (a_file, "is not a directory"),
    "open to others": (open_to_others, "chmod 700"),
    "of another user": (of_another_user, "run as that user, or choose another"),
}


@pytest.mark.parametrize("state", BROKEN)
@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_a_directory_that_is_broken(command: tuple[str, ...], state: str, tmp_path: Path) -> None:
    if state == "of another user" and os.geteuid() != 0:
        pytest.skip("needs root, to give the directory away")
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    make, fix = BROKEN[state]
    make(folder)
    assert_one_line(run(command, folder), str(folder), fix)


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_a_directory_behind_one_that_may_not_be_entered(
    command: tuple[str, ...], directory: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    inner = directory / "run"
    inner.mkdir(mode=0o700)
    os.seteuid(NOBODY)
    try:
        outcome = run(command, inner)
    finally:
        os.seteuid(0)
    assert_one_line(outcome, str(inner), "Permission denied. Choose another")


@pytest.mark.slow
def test_a_lock_that_is_no_file(directory: Path) -> None:
    with_a_folder_for_a_lock(directory)
    assert_one_line(run(("stop",), directory), "server.lock is no file: remove what lies there")
    for command in ("serve", "allocator"):
        model = ["demo"] if command == "serve" else []
        outcome = onecopy(command, *model, "--runtime-dir", str(directory))
        assert (outcome.status, outcome.stdout) == (1, "")
        assert f"{command.replace('serve', 'server')}.lock can't be used" in outcome.stderr
        assert "remove what lies there" in outcome.stderr
        assert "Traceback" not in outcome.stderr


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/run-\xff"
    outcome = run(("ps",), Path(os.fsdecode(folder)))
    assert_one_line(outcome, "is no UTF-8", "--runtime-dir")


# --- a server that answers wrongly


@contextlib.contextmanager
def answering(directory: Path, answer: bytes) -> Iterator[None]:
    """Something that listens where the admin API does, and says `answer` whatever it is asked."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(RuntimeDir.open(directory).admin))
        listening.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\n{}", ("with status 500", "its log")),
        (b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", ("with status 503", "its log")),
        (b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", ("with status 404", "upgrade")),
        (b"HTTP/1.1 409 No\r\ncontent-length: 0\r\n\r\n", ("with status 409", "upgrade")),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", ("with status 200", "upgrade")),
        (b"", ("broke off its answer", "its log")),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ("broke off its answer", "its log")),
    ],
)
@pytest.mark.parametrize("command", [*OF_THE_SERVER, ("sleep",), ("wake",)], ids=" ".join)
def test_a_server_that_answers_wrongly(
    command: tuple[str, ...], answer: bytes, words: tuple[str, ...], directory: Path
) -> None:
    with answering(directory, answer):
        assert_one_line(run(command, directory), str(directory), *words)


# --- one that does not answer


@pytest.fixture(scope="module")
def server(
    make_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder, "llama", max_position_embeddings=65536)
    # By itself it would replace an allocator that hangs.
    options = ("--instances", "1", "--dtype", "float32", "--hang-timeout", "0")
    server = make_server(str(write_tokenizer(folder)), *options)
    yield server
    if server.process.poll() is None:  # the last test stops it
        server.remember()
        server.stop()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def at_once(server: Server, commands: Sequence[tuple[str, ...]]) -> list[Outcome]:
    """What they say; each waits a while, so they wait together."""
    with ThreadPoolExecutor(len(commands)) as threads:
        return list(threads.map(lambda command: server.onecopy_process(*command), commands))


def test_a_server_that_hangs(server: Server) -> None:
    with stopped(server.process.pid):
        for outcome in at_once(server, [*OF_THE_SERVER, ("sleep",), ("wake",)]):
            assert_one_line(outcome, f"(pid {server.process.pid})", "does not answer within 10 s")
    assert server.onecopy("ps").status == 0


def test_an_allocator_that_hangs(server: Server) -> None:
    owner = RuntimeDir.open(server.runtime_dir).owner("allocator")
    assert owner is not None
    with stopped(owner.pid):
        for outcome in at_once(server, [*OF_THE_ALLOCATOR[:3], ("verify",)]):
            assert_one_line(outcome, "the allocator in", "does not answer within 10 s")
        # Its absence is no reason not to see the instances.
        assert "ready" in server.onecopy("ps").stdout
    assert server.onecopy("verify").status == 0


def test_stopping_twice_cuts_no_stream(server: Server) -> None:
    """The second `stop` waits with the first one; only `--now` does not wait."""
    num_tokens = 0
    begun, cut = threading.Event(), threading.Event()

    def stream() -> None:
        nonlocal num_tokens
        for _ in server.client().completions.create(
            model="tiny",
            prompt="a b c",
            max_tokens=60_000,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            num_tokens += 1
            begun.set()

    server.remember()
    with ThreadPoolExecutor(4) as threads:
        streaming = threads.submit(stream)
        assert begun.wait(600)
        stops = [threads.submit(server.onecopy_process, "stop") for _ in range(2)]
        wait_until(lambda: server.status()["draining"], "the server to drain")
        third = threads.submit(server.onecopy_process, "stop")
        before = num_tokens
        wait_until(lambda: num_tokens > before + 20, "the stream to go on")
        assert not any(one.done() for one in (*stops, third))
        assert server.onecopy("stop", "--now").status == 0
        cut.set()
        assert all(one.result().status == 0 for one in (*stops, third))
        with pytest.raises(Exception, match=r"stopped before|peer closed|incomplete"):
            streaming.result()
    server.process.wait(600)
    assert leftovers(server.runtime_dir) == []
