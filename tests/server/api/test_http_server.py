"""Connections of every kind: idle, slow, many, broken; and who is served meanwhile."""

import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from server.api.connection import Patience
from server.api.http_server import most_connections
from server.text.text import Text
from tests.leaks import wait_until
from tests.server.echo_model import DEADLINE_S, NAME, EchoModel, complete, echo_server

pytestmark = pytest.mark.slow

HURRY = Patience(
    idle_s=1.5, head_s=1.5, body_s=1.5, stuck_s=1.5, linger_s=1.5, linger_bytes=1 << 20
)
MOST = 24
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": NAME, "prompt": "One two."}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def model() -> EchoModel:
    return EchoModel()


Connect = Callable[..., socket.socket]


@pytest.fixture(scope="module")
def address(model: EchoModel, text: Text) -> Iterator[str]:
    with echo_server(model, text, most=MOST) as address:
        yield address


@pytest.fixture(scope="module")
def hurried(model: EchoModel, text: Text) -> Iterator[str]:
    with echo_server(model, text, most=MOST, patience=HURRY) as address:
        yield address


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as stack:

        def to(address: str, sent: bytes = b"") -> socket.socket:
            url = httpx.URL(address)
            made = stack.enter_context(socket.create_connection((url.host, url.port), DEADLINE_S))
            made.sendall(sent)
            return made

        yield to


def answer(one: socket.socket) -> tuple[int, dict[str, Any], bool]:
    """Status and body of one answer, and whether the connection is closed behind it."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = one.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None
    while len(body) < int(found[1]):
        body += one.recv(65536)
    status = int(head.split()[1])
    return status, json.loads(body[: int(found[1])]), b"connection: close" in head


def is_closed(one: socket.socket) -> bool:
    one.settimeout(DEADLINE_S)
    try:
        return one.recv(1) == b""
    except ConnectionResetError:
        return True


def test_who_comes_is_heard_however_many_are_idle(address: str, connect: Connect) -> None:
    idle = [connect(address) for _ in range(3 * MOST)]
    kept = connect(address, HEALTH)
    assert answer(kept)[0] == 200
    for _ in range(MOST // 2):
        assert httpx.get(f"{address}/health", timeout=DEADLINE_S).status_code == 200
    # Those that have waited longest went first; the one that was heard last is still there.
    assert all(is_closed(one) for one in idle[:MOST])
    kept.sendall(HEALTH)
    assert answer(kept)[0] == 200


def test_streams_are_never_closed_for_newcomers(
    address: str, connect: Connect, model: EchoModel
) -> None:
    model.hold_after = 1
    body = json.dumps({"model": NAME, "prompt": "One two.", "stream": True}).encode()
    request = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    streams = [connect(address, request) for _ in range(MOST)]
    for stream in streams:
        assert b"200 OK" in stream.recv(65536)
    refused = connect(address)
    status, body_of_error, closed = answer(refused)
    assert (status, closed) == (503, True)
    assert body_of_error["error"]["type"] == "server_error"
    streams.pop().close()
    wait_until(lambda: model.num_open == MOST - 1, "the server to notice that a client has gone")
    assert answer(connect(address, HEALTH))[0] == 200
    for stream in streams:
        stream.close()
    wait_until(lambda: model.num_open == 0, "all streams to be closed")
    model.reset()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"GET /hea", 408),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", 408),
        (HEAD.encode() + b"Content-Length: 1000\r\n\r\n{", 408),
        (HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408),
    ],
)
def test_who_does_not_go_on_is_ended(
    hurried: str, connect: Connect, sent: bytes, status: int | None
) -> None:
    one = connect(hurried, sent)
    if status is not None:
        found, error, closed = answer(one)
        assert (found, closed) == (status, True)
        assert error["error"]["type"] == "invalid_request_error"
    assert is_closed(one)


def test_who_sends_a_byte_now_and_then_is_ended_all_the_same(
    hurried: str, connect: Connect
) -> None:
    heads = [connect(hurried, b"GET /health HTTP/1.1\r\nX: ") for _ in range(4)]
    head = f"{HEAD}Content-Length: 100000\r\n\r\n".encode()
    bodies = [connect(hurried, head) for _ in range(4)]
    ended: set[socket.socket] = set()

    def drip() -> bool:
        for one in {*heads, *bodies} - ended:
            try:
                one.settimeout(0.01)
                one.sendall(b"a")
                if b" 408 " in one.recv(65536):
                    ended.add(one)
            except TimeoutError:
                continue
            except OSError:
                ended.add(one)
        return len(ended) == len(heads) + len(bodies)

    wait_until(drip, "all slow ones to be ended")
    assert httpx.get(f"{hurried}/health", timeout=DEADLINE_S).status_code == 200


def test_a_connection_lasts_over_many_requests(hurried: str) -> None:
    with httpx.Client(base_url=hurried, timeout=DEADLINE_S) as http:
        begun_at = time.monotonic()
        while time.monotonic() - begun_at < 2 * HURRY.idle_s:
            assert complete(http).status_code == 200


def test_a_stream_that_says_nothing_for_long_goes_on(
    hurried: str, model: EchoModel, connect: Connect
) -> None:
    model.hold_after = 1
    body = json.dumps({"model": NAME, "prompt": "One two.", "stream": True}).encode()
    stream = connect(hurried, f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert b"200 OK" in stream.recv(65536)
    silent = connect(hurried)
    assert is_closed(silent)  # so that much time has passed
    assert model.num_open == 1
    stream.close()
    wait_until(lambda: model.num_open == 0, "the stream to be closed")
    model.reset()


def test_who_does_not_read_is_ended(hurried: str, model: EchoModel, connect: Connect) -> None:
    url = httpx.URL(hurried)
    prompt = "word " * 200
    fields = {
        "prompt": prompt,
        "max_tokens": 20,
        "logprobs": 20,
        "stream": True,
        "ignore_eos": True,
    }
    body = json.dumps({"model": NAME, "n": 60, **fields}).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((url.host, url.port))
        deaf.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: model.num_open == 60, "the answer to begin")
        wait_until(lambda: model.num_open == 0, "who does not read to be ended")
    model.reset()


def test_pipelined_requests_are_answered_in_their_order(address: str, connect: Connect) -> None:
    post = f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    one = connect(address, (HEALTH + post) * 5)
    for _ in range(5):
        assert answer_within(one) == 200
        assert answer_within(one) == 200


_REST: dict[socket.socket, bytes] = {}


def answer_within(one: socket.socket) -> int:
    """The status of the next of several answers."""
    received = _REST.pop(one, b"")
    while True:
        head, found, rest = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if found and length and len(rest) >= int(length[1]):
            _REST[one] = rest[int(length[1]) :]
            return int(head.split()[1])
        piece = one.recv(65536)
        assert piece
        received += piece


def test_a_flood_of_pipelined_requests_does_not_keep_others_waiting(
    address: str, connect: Connect
) -> None:
    one = connect(address)
    one.setblocking(False)
    sent = 0
    for _ in range(2000):
        try:
            sent += one.send(HEALTH * 100)
        except BlockingIOError:
            break
    assert httpx.get(f"{address}/health", timeout=DEADLINE_S).status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20), 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 100_000, 431),
        (b"GET /" + b"a" * (1 << 20), 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS client says hello\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (HEAD.encode() + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD.encode() + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
def test_what_is_no_http_is_told_so(
    address: str, connect: Connect, head: bytes, status: int
) -> None:
    one = connect(address)
    with suppress(BrokenPipeError, ConnectionResetError):  # answered before all was sent
        one.sendall(head)
    try:
        found, error, closed = answer(one)
    except ConnectionResetError:
        return  # what was still on its way took the answer with it
    assert (found, closed) == (status, True)
    assert error["error"]["type"] == "invalid_request_error"


def test_chunks_of_one_byte_hold_up_nobody(address: str, connect: Connect) -> None:
    """Each costs as much as a large one. Of what arrives at once, 40,000 of them, others would wait
    for all; answered between every 256 KiB, they would be answered some 18 times here."""
    one = connect(address, HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
    left = b"1\r\na\r\n" * 600_000 + b"0\r\n\r\n"
    one.setblocking(False)
    num_answers = 0
    with httpx.Client(base_url=address, timeout=DEADLINE_S) as http:
        while not select.select([one], [], [], 0)[0]:
            with suppress(BlockingIOError):
                left = left[one.send(left[: 1 << 18]) :] if left else b""
            assert http.get("/health").status_code == 200
            num_answers += 1
    one.setblocking(True)
    assert answer(one)[0] == 400
    assert num_answers > 30


def test_the_answer_to_a_body_that_is_still_sent_is_not_lost(
    address: str, connect: Connect
) -> None:
    """The kernel resets a connection that is closed with something unread, and the client loses
    what it had not read yet."""
    values = b'{"prompt": [' + b"1," * 2_000_000
    for _ in range(10):
        head = f"{HEAD}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        one = connect(address, head)
        for start in range(0, len(values), 1 << 16):
            piece = values[start : start + (1 << 16)]
            one.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        status, error, _ = answer(one)
        assert status == 413
        assert "Send less" in error["error"]["message"]
        assert is_closed(one)


def test_the_rest_of_a_refused_body_is_not_read_for_ever(hurried: str, connect: Connect) -> None:
    one = connect(hurried, f"{HEAD}Content-Length: {1 << 40}\r\n\r\n".encode())
    assert answer(one)[0] == 413
    sent = 0

    def broken() -> bool:
        nonlocal sent
        try:
            sent += one.send(b"a" * 65536)
        except OSError:
            return True
        return False

    wait_until(broken, "the connection to be closed")
    assert sent < 64 << 20


def test_descriptors_are_left_for_everything_else() -> None:
    for num_descriptors in (256, 1024, 4096, 65536, 1 << 20):
        for num_instances in (1, 8, 256):
            most = most_connections(num_descriptors, num_instances)
            assert 16 <= most <= max(num_descriptors // 4, num_descriptors - 192)
    assert most_connections(1024, 2) == 828
