"""Whatever a client sends, the worst it gets is a typed error, and others are served as before."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from allocator import Client, RuntimeDir, Unauthorized
from allocator.lifeline import Lifeline
from allocator.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Abandon,
    Done,
    Elected,
    Extent,
    Failed,
    GetShare,
    GetStatistics,
    Hello,
    Message,
    Open,
    Progress,
    Refused,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    Seal,
    Sealed,
    Share,
    Statistics,
    StillLoading,
    decode_lifeline,
    decode_reply,
    encode,
)
from tests.allocator.daemon.raw_session import commit, requests_socket
from tests.allocator.processes import in_fork
from tests.daemon_process import TIMEOUT_S, DaemonProcess
from tests.leaks import wait_until

REQUEST_ID = b"request1"
HELLO = Hello(version=PROTOCOL_VERSION)


class RawClient:
    """A lifeline and a socket on which anything can be sent."""

    def __init__(self, runtime_dir: RuntimeDir, receive_limit: int = 0):
        self.lifeline = Lifeline.connect(runtime_dir.lifeline, TIMEOUT_S, HELLO)
        self.token = self.lifeline.welcome.token
        self._context = zmq.Context(io_threads=1)
        self._context.setsockopt(zmq.RCVHWM, receive_limit)
        self.socket = requests_socket(self._context, self.lifeline.welcome)

    def send(self, payload: bytes, token: bytes | None = None) -> None:
        self.socket.send_multipart([REQUEST_ID, self.token if token is None else token, payload])

    def receive(self) -> Reply:
        assert self.socket.poll(int(TIMEOUT_S * 1000)), "no reply"
        request_id, frame = self.socket.recv_multipart()
        assert request_id == REQUEST_ID
        return decode_reply(frame)

    def ask(self, request: Message) -> Reply:
        self.send(encode(request))
        return self.receive()

    def code(self, payload: bytes, token: bytes | None = None) -> str:
        """The code of the error that this payload is answered with."""
        self.send(payload, token)
        answer = self.receive()
        assert isinstance(answer, Failed), answer
        return answer.code

    def close(self) -> None:
        self.lifeline.close()
        self._context.destroy(0)


@pytest.fixture
def raw(daemon: DaemonProcess) -> Iterator[RawClient]:
    client = RawClient(daemon.runtime_dir)
    yield client
    client.close()


@pytest.fixture
def good(daemon: DaemonProcess) -> Iterator[Client]:
    """A well-behaved client, which must be served whatever happens to others."""
    with daemon.connect() as client:
        yield client
        assert client.statistics().pid == daemon.pid
        assert daemon.process.poll() is None


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


OPEN = {"type": "open", "key": "k", "fingerprint": {}, "wait_ms": 0}

MALFORMED = {
    "nothing": b"",
    "text": b"GET / HTTP/1.1",
    "a number": b"\x07",
    "an array": msgspec.msgpack.encode([1, 2]),
    "no tag": packed(key="k"),
    "an unknown tag": packed(type="explode"),
    "a tag of another direction": packed(type="sealed"),
    "a tag that is no text": packed(type=7),
    "a missing field": packed(type="open", key="k"),
    "an unknown field": packed(**OPEN, force=True),
    "a wrong type": packed(**{**OPEN, "key": 7}),
    "a wrong type inside": packed(**{**OPEN, "fingerprint": {"a": 1}}),
    "an empty key": packed(**{**OPEN, "key": ""}),
    "a long key": packed(**{**OPEN, "key": "k" * 513}),
    "too many fields": packed(**{**OPEN, "fingerprint": {str(n): "" for n in range(257)}}),
    "a long word": packed(**{**OPEN, "fingerprint": {"a": "x" * 4097}}),
    "a negative wait": packed(**{**OPEN, "wait_ms": -1}),
    "a wait of a day": packed(**{**OPEN, "wait_ms": 86_400_000}),
    "a fractional wait": packed(**{**OPEN, "wait_ms": 0.5}),
    "no bytes": packed(type="reserve", key="k", generation=1, num_bytes=0),
    "negative bytes": packed(type="reserve", key="k", generation=1, num_bytes=-1),
    "2**63 bytes": packed(type="reserve", key="k", generation=1, num_bytes=1 << 63),
    "a truncated map": packed(**OPEN)[:-3],
    "more behind it": packed(**OPEN) + b"\0",
    "bytes that are no text": b"\x82\xa4type\xa5evict\xa3key\xa2\xc3\x28",
    "an invalid opcode": b"\x81\xa4type\xc1",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "deep nesting": b"\x82\xa1x" + b"\x91" * 500_000,
    "deep nesting under a tag": b"\x82\xa4type\xa4open\xa1x" + b"\x91" * 500_000,
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(raw: RawClient, good: Client, payload: bytes) -> None:
    assert raw.code(payload) == "invalid_message"
    assert isinstance(raw.ask(GetStatistics()), Statistics)  # the same session goes on


@pytest.mark.parametrize("token", [b"", b"x" * 16, b"x" * 15, b"x" * 1000])
def test_a_token_that_no_lifeline_stands_behind(raw: RawClient, good: Client, token: bytes) -> None:
    assert raw.code(packed(**OPEN), token) == "unauthorized"
    assert not good.statistics().weight_sets


def test_a_token_ends_with_its_lifeline(raw: RawClient, good: Client) -> None:
    assert isinstance(raw.ask(GetStatistics()), Statistics)
    raw.lifeline.close()
    wait_until(lambda: good.statistics().num_sessions == 1, "the session has ended")
    assert raw.code(encode(GetStatistics())) == "unauthorized"


def test_whoever_speaks_on_the_lifeline_ends_its_session(raw: RawClient, good: Client) -> None:
    raw.lifeline.connection.send(b"hello")
    wait_until(lambda: good.statistics().num_sessions == 1, "the session has ended")


@pytest.mark.parametrize("num_frames", [1, 2, 4, 50, 5000])
def test_another_number_of_frames(raw: RawClient, good: Client, num_frames: int) -> None:
    raw.socket.send_multipart([REQUEST_ID, raw.token, encode(GetStatistics()), *[b""] * 5000][
        : num_frames
    ])  # fmt: skip
    answer = raw.receive()
    assert isinstance(answer, Failed)
    assert answer.code == "invalid_message"
    assert f"a request has 3 frames, this one {min(num_frames, 4)}" in answer.message
    assert ("or more" in answer.message) == (num_frames >= 4)
    assert isinstance(raw.ask(Open(key="k", fingerprint={}, wait_ms=0)), Elected)


@pytest.mark.parametrize("request_id", [b"", b"short", b"much longer than eight bytes"])
def test_a_request_id_of_another_length_is_dropped(
    raw: RawClient, good: Client, request_id: bytes
) -> None:
    """There is nothing by which an answer could be recognized."""
    raw.socket.send_multipart([request_id, raw.token, encode(GetStatistics())])
    # Replies come in order: the first that comes is for the request that follows.
    assert isinstance(raw.ask(Open(key="k", fingerprint={}, wait_ms=0)), Elected)


def test_too_long_a_frame_is_told_so_and_a_far_longer_one_ends_the_connection(
    raw: RawClient, good: Client
) -> None:
    for num_bytes in (MAX_FRAME_BYTES, MAX_FRAME_BYTES + 1, 2 * MAX_FRAME_BYTES):
        raw.send(bytes(num_bytes))
        answer = raw.receive()
        assert isinstance(answer, Failed)
        assert answer.code == "invalid_message"
        told = f"a request of {num_bytes} bytes; at most {MAX_FRAME_BYTES} are taken"
        assert (told in answer.message) == (num_bytes > MAX_FRAME_BYTES)
    raw.send(bytes(2 * MAX_FRAME_BYTES + 1))
    assert not raw.socket.poll(200)
    # The socket connects anew by itself.
    assert isinstance(raw.ask(GetStatistics()), Statistics)


def elected(client: RawClient) -> int:
    answer = client.ask(Open(key="k", fingerprint={}, wait_ms=0))
    assert isinstance(answer, Elected)
    return answer.generation


def test_out_of_order(raw: RawClient, good: Client) -> None:
    generation = elected(raw)
    beyond = Extent(offset=1 << 61, num_bytes=1 << 61)

    def seal(extent: Extent) -> Request:
        return Seal(key="k", generation=generation, manifest=extent, manifest_digest="")

    def progress(num_bytes: int) -> Request:
        return Progress(key="k", generation=generation, num_bytes=num_bytes)

    reserve = Reserve(key="k", generation=generation, num_bytes=100)
    release = Release(key="k", generation=generation)
    inside = Extent(offset=90, num_bytes=10)
    stale = Seal(key="k", generation=generation + 1, manifest=inside, manifest_digest="")
    steps: list[tuple[Request, str | type[Reply]]] = [
        (seal(inside), "invalid_message"),  # before there is a segment
        (progress(1), "invalid_message"),
        (release, "unknown_weight_set"),  # a writer does not read yet
        (reserve, Reserved),
        (reserve, "invalid_message"),  # twice
        (progress(101), "invalid_message"),
        (progress(100), Done),
        (seal(Extent(offset=90, num_bytes=11)), "invalid_message"),
        (seal(beyond), "invalid_message"),
        (stale, "stale_generation"),
        (seal(inside), Sealed),
        (seal(inside), "not_writer"),
        (progress(1), "not_writer"),
        (reserve, "not_writer"),
        (Abandon(key="k", generation=generation), "not_writer"),
        (release, Done),
        (release, "unknown_weight_set"),
        (Release(key="l", generation=1), "unknown_weight_set"),
    ]
    for request, expected in steps:
        answer = raw.ask(request)
        got = answer.code if isinstance(answer, Failed) else type(answer)
        assert got == expected, (request, answer)
        if isinstance(answer, Reserved):
            assert raw.code(encode(seal(inside))) == "invalid_message"  # it has no memory yet
            commit(answer.handle)


def test_a_session_cannot_touch_what_another_writes(
    raw: RawClient, good: Client, daemon: DaemonProcess
) -> None:
    generation = elected(raw)
    other = RawClient(daemon.runtime_dir)
    for request in (
        Reserve(key="k", generation=generation, num_bytes=100),
        Progress(key="k", generation=generation, num_bytes=0),
        Seal(
            key="k",
            generation=generation,
            manifest=Extent(offset=0, num_bytes=0),
            manifest_digest="",
        ),
        Abandon(key="k", generation=generation),
    ):
        assert other.code(encode(request)) == "not_writer"
    other.close()
    answer = raw.ask(Reserve(key="k", generation=generation, num_bytes=100))
    assert isinstance(answer, Reserved)


def test_a_client_that_never_reads_holds_up_nobody(
    daemon: DaemonProcess, raw: RawClient, good: Client
) -> None:
    slow = RawClient(daemon.runtime_dir, receive_limit=1)
    for _ in range(5000):
        slow.send(encode(GetStatistics()))
    for _ in range(100):
        assert good.statistics().num_sessions == 3
    slow.close()
    wait_until(lambda: good.statistics().num_sessions == 2, "the slow session has ended")


def test_thousands_of_waiters_are_answered_and_forgotten(raw: RawClient, good: Client) -> None:
    """A dozen at a time: of more replies than ZeroMQ holds for one peer (128), some are dropped,
    and no client of ours has more than one request on its way."""
    assert elected(raw)
    for _ in range(250):
        for _ in range(12):
            raw.send(encode(Open(key="k", fingerprint={}, wait_ms=1)))
        for _ in range(12):
            assert type(raw.receive()).__name__ == "StillLoading"
    assert good.statistics().weight_sets[0].state == "loading"


@pytest.mark.parametrize("again", [Open(key="k", fingerprint={}, wait_ms=60_000), GetShare()])
def test_who_asks_again_waits_no_longer_for_what_it_had_asked_before(
    raw: RawClient, good: Client, daemon: DaemonProcess, again: Request
) -> None:
    """As a client does that has given up, or whose answer was lost: elected by that, it would be
    waited for by all others, and itself."""
    waiting = encode(Open(key="k", fingerprint={}, wait_ms=60_000))
    with (
        contextlib.closing(RawClient(daemon.runtime_dir)) as writer,
        contextlib.closing(RawClient(daemon.runtime_dir)) as next_one,
    ):
        assert elected(writer)
        raw.send(waiting)
        raw.send(encode(again))
        assert isinstance(raw.receive(), StillLoading)
        if isinstance(again, GetShare):
            assert isinstance(raw.receive(), Share)
        next_one.send(waiting)
        writer.lifeline.close()
        if isinstance(again, Open):
            assert isinstance(raw.receive(), Elected)
            raw.lifeline.close()
        assert isinstance(next_one.receive(), Elected)


def test_a_hundred_clients_that_come_while_the_daemon_is_busy_all_get_in(
    daemon: DaemonProcess,
) -> None:
    os.kill(daemon.pid, 19)  # SIGSTOP: busy for as long as it takes
    pids = []
    read, write = os.pipe()
    try:
        for _ in range(100):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.write(write, b"s")
                    Lifeline.connect(daemon.runtime_dir.lifeline, TIMEOUT_S, HELLO)
                    status = 0
                finally:
                    os._exit(status)
            pids.append(pid)
        for _ in pids:
            os.read(read, 1)
    finally:
        os.kill(daemon.pid, 18)  # SIGCONT
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        os.close(read)
        os.close(write)
    assert statuses == [0] * 100


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_refused_by_the_kernels_word(daemon: DaemonProcess, good: Client) -> None:
    # Opened up by hand: normally the directory's mode alone keeps others out.
    daemon.runtime_dir.path.chmod(0o711)
    daemon.runtime_dir.lifeline.chmod(0o666)

    def connect() -> str:
        with pytest.raises(Unauthorized) as refused:
            Lifeline.connect(daemon.runtime_dir.lifeline, TIMEOUT_S, HELLO)
        return str(refused.value)

    for _ in range(20):  # it may be refused before or after it has said Hello
        told = in_fork(connect, uid=65534).text
        assert told == "user id 65534 may not use the allocator of user id 0"
    assert good.statistics().num_sessions == 1


HELLOS = {
    "nothing": b"",
    "text": b"GET / HTTP/1.1",
    "a request": encode(GetStatistics()),
    "no version": packed(type="hello"),
    "an unknown field": packed(type="hello", version=PROTOCOL_VERSION, root=True),
    "a long name": packed(type="hello", version=PROTOCOL_VERSION, model="x" * 257),
    "a long token": packed(type="hello", version=PROTOCOL_VERSION, resume=b"x" * 17),
    "deep nesting": b"\x82\xa1x" + b"\x91" * 8000,
    "an older version": packed(type="hello", version=PROTOCOL_VERSION - 1),
    "an unknown device": packed(type="hello", version=PROTOCOL_VERSION, device="tape"),
}


@pytest.mark.parametrize("hello", HELLOS.values(), ids=HELLOS.keys())
def test_a_hello_that_is_none(daemon: DaemonProcess, good: Client, hello: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(60.0)
        connection.connect(os.fspath(daemon.runtime_dir.lifeline))
        connection.send(hello)
        answer = connection.recv(8192)
        if hello:  # an empty one can't be told from an end
            refused = decode_lifeline(answer)
            assert isinstance(refused, Refused)
            assert refused.code in ("invalid_message", "invalid_setting")
            assert connection.recv(1) == b""
        else:
            assert answer == b""
    assert good.statistics().num_sessions == 1


def test_a_token_of_another_process_resumes_nothing(daemon: DaemonProcess, good: Client) -> None:
    token = good._connection.welcome.token

    def connect() -> str:
        lifeline = Lifeline.connect(
            daemon.runtime_dir.lifeline, 5.0, Hello(version=PROTOCOL_VERSION, resume=token)
        )
        return f"{lifeline.welcome.resumed} {lifeline.welcome.token != token}"

    assert in_fork(connect).text == "False True"
    assert good.is_alive()


def test_who_says_nothing_holds_up_nobody(daemon: DaemonProcess, good: Client) -> None:
    """So many that no more could wait: whoever was silent for longest gives way to who comes, and
    is told why; the others have a few seconds."""
    silent = []
    for _ in range(300):
        silent.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        silent[-1].connect(os.fspath(daemon.runtime_dir.lifeline))
        silent[-1].settimeout(60.0)
    assert good.statistics().num_sessions == 1
    lifelines = [Lifeline.connect(daemon.runtime_dir.lifeline, 60.0, HELLO) for _ in range(20)]
    told = []
    for connection in silent:
        answer = connection.recv(4096)
        told.append(decode_lifeline(answer) if answer else None)
        connection.close()
    assert all(isinstance(one, Refused) and one.code == "allocator_busy" for one in told[:44])
    assert told[-200:] == [None] * 200
    for lifeline in lifelines:
        lifeline.close()
    with daemon.connect() as other:
        assert other.statistics().num_sessions == 2


def test_clients_that_leave_before_they_are_welcomed(daemon: DaemonProcess, good: Client) -> None:
    for _ in range(50):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.connect(os.fspath(daemon.runtime_dir.lifeline))
    wait_until(lambda: good.statistics().num_sessions == 1, "they are gone")
