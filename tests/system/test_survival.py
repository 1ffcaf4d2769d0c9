"""Processes are killed while requests run; what must go on goes on, and nothing is left."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from allocator import ProcessIdentity, ProcessState, RuntimeDir
from tests.daemon_process import ROOT, DaemonProcess
from tests.system.running_server import TIMEOUT_S, Server, leftovers, wait_until
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

PROMPT = "Once upon a time, in a small village by the sea,"


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server("demo", "--instances", "2")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """For tests of signals alone: served sooner. Its context holds a stream that lasts."""
    folder = write_checkpoint(tmp_path / "tiny", "llama", max_position_embeddings=65536)
    return write_tokenizer(folder)


@pytest.fixture
def tiny_server(make_server: Callable[..., Server], tiny: Path) -> Server:
    return make_server(str(tiny), "--instances", "2")


class StreamingRequest:
    """One greedy stream in a thread; `begun` is set at its first token."""

    def __init__(self, server: Server, max_tokens: int):
        self.begun = threading.Event()
        self.text = ""
        self.finish_reason: str | None = None
        self._server = server
        self._model = server.model
        self._max_tokens = max_tokens

    def run(self) -> "StreamingRequest":
        stream = self._server.client().completions.create(
            model=self._model,
            prompt=PROMPT,
            max_tokens=self._max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            self.text += chunk.choices[0].text
            self.finish_reason = chunk.choices[0].finish_reason or self.finish_reason
            self.begun.set()
        return self


def test_killed_instance_is_replaced_and_no_stream_is_lost(server: Server) -> None:
    undisturbed = StreamingRequest(server, 120).run()
    before = server.remember()["instances"]
    with ThreadPoolExecutor(2) as pool:
        streams = [StreamingRequest(server, 120) for _ in range(2)]
        running = [pool.submit(stream.run) for stream in streams]
        for stream in streams:
            assert stream.begun.wait(TIMEOUT_S)
        busy = server.status()["instances"]
        assert [one["num_requests"] for one in busy] == [1, 1]
        os.kill(before[0]["pid"], signal.SIGKILL)
        after = server.wait_instances(
            lambda found: (
                [one["state"] for one in found] == ["ready", "ready"]
                and before[0]["pid"] not in [one["pid"] for one in found]
            ),
            "a replacement",
        )
        results = [future.result(timeout=TIMEOUT_S) for future in running]
    # The other instance's stream is exactly as without the kill. The moved one goes on from the
    # tokens it had: its prompt is computed in one piece then, and rounding may differ in bfloat16,
    # so it is held to its length and to what came before.
    assert [result.finish_reason for result in results] == ["length", "length"]
    assert undisturbed.text in {result.text for result in results}
    assert all(result.text[:40] == undisturbed.text[:40] for result in results)
    assert before[1]["pid"] in [one["pid"] for one in after]
    replacement = next(one for one in after if one["pid"] != before[1]["pid"])
    assert replacement["loaded"] is False
    assert server.status()["num_replaced"] == 1
    server.stop()


def test_sigterm_lets_running_requests_end_and_leaves_nothing(tiny_server: Server) -> None:
    server = tiny_server
    with ThreadPoolExecutor(1) as pool:
        stream = StreamingRequest(server, 1000)
        running = pool.submit(stream.run)
        assert stream.begun.wait(TIMEOUT_S)
        server.process.send_signal(signal.SIGTERM)
        assert running.result(timeout=TIMEOUT_S).finish_reason == "length"
    assert server.process.wait(TIMEOUT_S) == 0
    server.assert_nothing_left()


def test_a_second_sigterm_ends_running_requests_with_an_error(tiny_server: Server) -> None:
    server = tiny_server
    with ThreadPoolExecutor(1) as pool:
        stream = StreamingRequest(server, 60_000)
        running = pool.submit(stream.run)
        assert stream.begun.wait(TIMEOUT_S)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.status()["draining"], "the drain")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped"):
            running.result(timeout=TIMEOUT_S)
    assert server.process.wait(TIMEOUT_S) == 0
    server.assert_nothing_left()


def test_killed_server_takes_its_instances_with_it_and_the_next_one_attaches(
    tiny_server: Server, make_server: Callable[..., Server], tiny: Path
) -> None:
    server = tiny_server
    server.remember()
    owner = RuntimeDir.open(server.runtime_dir).owner("allocator")
    assert owner is not None
    dying = [one for one in server.identities if one != owner.process]
    for identity in dying:
        if identity.pid != server.process.pid:  # whether they can react or not
            os.kill(identity.pid, signal.SIGSTOP)
    server.process.kill()
    server.process.wait()
    for identity in dying:
        assert _ended(identity)
    assert owner.process.is_alive()
    successor = make_server(str(tiny), "--instances", "2", runtime_dir=server.runtime_dir)
    assert [one["loaded"] for one in successor.status()["instances"]] == [False, False]
    successor.identities |= server.identities
    successor.stop()


def test_killed_allocator_does_not_stop_the_instances(tiny_server: Server) -> None:
    server = tiny_server
    before = StreamingRequest(server, 40).run()
    server.remember()
    directory = RuntimeDir.open(server.runtime_dir)
    first = directory.owner("allocator")
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    assert StreamingRequest(server, 40).run().text == before.text
    # Another allocator takes its place, and serves an instance that starts later.
    assert server.onecopy("scale", "3").status == 0
    server.wait_instances(
        lambda found: [one["state"] for one in found] == ["ready"] * 3, "a third instance"
    )
    second = directory.owner("allocator")
    assert second is not None
    assert second.pid != first.pid
    # It adopted what its predecessor held: nothing was loaded again, there still is one copy.
    instances = server.remember()["instances"]
    assert [one["loaded"] for one in instances] == [True, False, False]
    verified = server.onecopy("verify")
    assert verified.status == 0, verified.stdout + verified.stderr
    server.stop()


def test_a_stopped_allocator_holds_nobody_up(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "llama", max_position_embeddings=65536)
    server = make_server(str(write_tokenizer(folder)), "--hang-timeout", "0")
    status = server.remember()
    os.kill(status["allocator"]["pid"], signal.SIGSTOP)
    assert StreamingRequest(server, 200).run().finish_reason == "length"
    with ThreadPoolExecutor(32) as pool:  # more than there are threads for what blocks
        scrapes = [
            pool.submit(httpx.get, f"{server.url}/metrics", timeout=TIMEOUT_S) for _ in range(32)
        ]
        assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 200
        answers = [one.result().text for one in scrapes]
    assert all("onecopy_allocator_up 0.0" in one for one in answers)
    wait_until(lambda: server.status()["allocator"]["silent_s"], "an instance to say so")
    os.kill(status["allocator"]["pid"], signal.SIGCONT)
    wait_until(
        lambda: (
            "onecopy_allocator_up 1.0" in httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
        ),
        "the allocator to answer",
    )
    # And where it must end, nothing of it is left.
    os.kill(status["allocator"]["pid"], signal.SIGSTOP)
    server.stop()


LOADS_HALF = """
import os, signal, sys
from allocator import connect
from workers.checkpoint import attach, open_checkpoint
with connect(sys.argv[1]) as memory:
    stop = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    attach(memory, open_checkpoint(sys.argv[2], "auto"), stop)
"""


def test_a_writer_that_is_stopped_is_told_of_and_then_replaced(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    runtime_dir = RuntimeDir.open(tempfile.mkdtemp(prefix="onecopy-t-"))
    daemon = DaemonProcess(runtime_dir)
    folder = write_tokenizer(write_checkpoint(tmp_path / "tiny", "llama"))
    program = [sys.executable, "-c", LOADS_HALF, str(runtime_dir.path), str(folder)]
    with subprocess.Popen(program, cwd=ROOT) as writer:
        wait_until(lambda: (state := ProcessState.of(writer.pid)) and state.is_stopped, "a writer")
        server = make_server(
            str(folder), "--instances", "1", wait=False, runtime_dir=runtime_dir.path
        )
        told = f"process {writer.pid}, which writes, has not come on"
        wait_until(lambda: told in server.log.read_text(), "the log to tell of it")
        server.wait_ready()
        assert [one["loaded"] for one in server.status()["instances"]] == [True]
        writer.kill()
    server.stop()
    assert daemon.stop() == 0


def test_sigterm_while_another_allocator_starts_leaves_nothing(tiny_server: Server) -> None:
    server = tiny_server
    server.remember()
    owner = RuntimeDir.open(server.runtime_dir).owner("allocator")
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    wait_until(lambda: "starting another" in server.log.read_text(), "the start of another")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(TIMEOUT_S) == 0
    server.assert_nothing_left()


def test_everything_killed_leaves_segments_that_the_next_start_removes(
    tiny_server: Server, make_server: Callable[..., Server], tiny: Path
) -> None:
    server = tiny_server
    server.remember()
    owner = RuntimeDir.open(server.runtime_dir).owner("allocator")
    assert owner is not None
    os.kill(owner.pid, signal.SIGSTOP)  # so that it can't react to the others' end
    server.process.kill()
    server.process.wait()
    os.kill(owner.pid, signal.SIGKILL)
    for identity in server.identities:
        assert _ended(identity)
    assert leftovers(server.runtime_dir) != []
    successor = make_server(str(tiny), "--instances", "1", runtime_dir=server.runtime_dir)
    names = [name for name in leftovers(server.runtime_dir) if name.startswith("onecopy-")]
    # Its own and its file, and the file of the run that it cleared up after.
    assert sorted(name.endswith("-owner") for name in names) == [False, True, True]
    successor.stop()


def _ended(identity: ProcessIdentity, timeout: float = TIMEOUT_S) -> bool:
    import select

    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return True
    try:
        return not identity.is_alive() or bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)
