"""Thousands of messages that no client of ours would send; the daemon answers, and is in order.

The dice are seeded, so that a failure can be repeated. Which messages there are is read from their
types.
"""

import contextlib
import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, get_args

import msgspec
import pytest

from allocator import Client, RuntimeDir
from allocator.backends.host import SHM_ROOT
from allocator.messages import (
    MAX_BATCH,
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Abandon,
    Blocks,
    BlockToPut,
    Done,
    Elected,
    Evict,
    Extent,
    Failed,
    GetEvents,
    GetRegions,
    GetStatistics,
    Handle,
    Lease,
    Leased,
    LeaseId,
    LookUpBlocks,
    Message,
    Open,
    PutBlocks,
    Refused,
    Release,
    Request,
    Reserve,
    Reserved,
    Return,
    Seal,
    Sealed,
    SetQuota,
    UnpinBlocks,
    Welcome,
    decode_lifeline,
    decode_request,
    encode,
)
from tests.allocator.daemon.random_messages import RandomMessages, spoiled
from tests.allocator.daemon.raw_session import RawSession, commit, raw_lifeline
from tests.daemon_process import DaemonProcess
from tests.leaks import segments, wait_until

KIB = 1 << 10
MIB = 1 << 20
EXTENT = 64 * KIB
REQUESTS: Final[tuple[type[Message], ...]] = get_args(Request)
ENDINGS: Final = (Abandon, Evict, Release, Return, UnpinBlocks, SetQuota, GetEvents, GetRegions)
WEIGHTS: Final = [1 if kind in ENDINGS else 4 for kind in REQUESTS]
"""What ends something comes seldom, so that there is something to end."""
MOST_ON_THE_WAY = 100
"""Of more unread replies than 1,000 ZeroMQ would drop some."""
CODES_OF_OURS = {"internal", "allocator_gone", "wait_timeout", "journal"}
"""What no message may be answered with."""


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """An allocator with limits that can be reached."""
    return start_daemon(
        *("--memory-limit", str(64 * MIB), "--host-tier-limit", str(8 * MIB), "--quiet")
    )


def num_descriptors(daemon: DaemonProcess) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))  # noqa: PTH208 - the names are numbers


@pytest.fixture
def good(daemon: DaemonProcess) -> Iterator[Client]:
    """A client that is served at any time. Once it is alone everything is free, and in order."""
    with daemon.connect() as client:
        client.lease(EXTENT).release()
        before = num_descriptors(daemon)
        yield client
        assert daemon.process.poll() is None
        wait_until(lambda: client.statistics().num_sessions == 1, "the others have ended")
        client.check_integrity()
        statistics = client.statistics()
        pool = statistics.pool
        assert (pool.leased_bytes, pool.num_leases) == (0, 0)
        assert pool.cached_bytes == pool.evictable_bytes
        assert {s.state for s in statistics.weight_sets} <= {"idle", "asleep"}
        idle_bytes = sum(s.num_bytes for s in statistics.weight_sets if s.state == "idle")
        assert statistics.used_bytes == idle_bytes + pool.cached_bytes
        for quota in statistics.quotas:
            client.set_quota(quota.kind, quota.name, None)
        while found := client.statistics().weight_sets:
            for weight_set in found:
                client.evict(weight_set.key, image=True)
        # Room for all there can be evicts what is left.
        lease = client.lease(64 * MIB)
        lease.release()
        statistics = client.statistics()
        assert (statistics.used_bytes, statistics.host_tier_bytes) == (0, 0)
        assert statistics.pool.largest_free_bytes == 64 * MIB
        client.check_integrity()
        [left] = segments(daemon.runtime_dir.segment_prefix)
        assert (SHM_ROOT / left).stat().st_blocks == 0
        wait_until(lambda: num_descriptors(daemon) <= before, "its descriptors are closed")


class Talk:
    """A session with many requests on their way, each of which must be answered once."""

    def __init__(self, runtime_dir: RuntimeDir, messages: RandomMessages):
        self.session = RawSession(runtime_dir)
        self.messages = messages
        self._waiting: dict[bytes, Message | None] = {}
        self.answers: Counter[str] = Counter()

    def ask(self, message: Message) -> None:
        """Send it; the answer comes some time."""
        self.send(encode(message), message=message)

    def send(
        self, payload: bytes, token: bytes | None = None, message: Message | None = None
    ) -> None:
        """Send it; the answer comes some time."""
        self._waiting[self.session.send(payload, token)] = message
        while len(self._waiting) > MOST_ON_THE_WAY or self.session.poll():
            self._receive()

    def finish(self) -> None:
        """Until all is answered."""
        while self._waiting:
            self._receive()

    def _receive(self) -> None:
        request_id, reply = self.session.receive()
        message = self._waiting.pop(request_id)
        if not isinstance(reply, Failed):
            self.messages.learn(message, reply)
        name = reply.code if isinstance(reply, Failed) else type(reply).__name__
        assert name not in CODES_OF_OURS, reply
        self.answers[name] += 1


KNOWN: Final[dict[str, Sequence[object]]] = {
    "key": ("a", "b", "c"),
    "fingerprint": ({}, {}, None),
    "num_bytes": (1, 4096, EXTENT, MIB),
    "count": (1, 2, 5),
    "offset": (0, 0, EXTENT),
    "digest": tuple(bytes([n]) * 16 for n in range(6)),
}


class Crowd:
    """Several sessions. What one was told, another one may use."""

    def __init__(self, runtime_dir: RuntimeDir, seed: int, num_talks: int = 3):
        self.chance = random.Random(seed)
        self.answers: Counter[str] = Counter()
        self._runtime_dir = runtime_dir
        self.talks = [self._new() for _ in range(num_talks)]

    def _new(self) -> Talk:
        return Talk(self._runtime_dir, RandomMessages(self.chance, KNOWN))

    def say(self) -> tuple[Talk, Message]:
        """Who says what: a valid request of any type."""
        talk = self.chance.choice(self.talks)
        [kind] = self.chance.choices(REQUESTS, WEIGHTS)
        message = talk.messages.message(kind)
        assert decode_request(encode(message)) == message
        return (self.chance.choice(self.talks) if self.chance.random() < 0.1 else talk), message

    def load(self) -> None:
        """One does it as it should be done, so that there are sealed and idle sets, too."""
        talk = self.chance.choice(self.talks)
        talk.finish()
        session, key = talk.session, self.chance.choice(("a", "b", "c"))
        reply = session.ask(Open(key=key, fingerprint={}, wait_ms=0))
        if isinstance(reply, Elected):
            answer = session.ask(Reserve(key=key, generation=reply.generation, num_bytes=MIB))
            if isinstance(answer, Reserved):
                commit(answer.handle)
                manifest = Extent(offset=0, num_bytes=0)
                seal = Seal(
                    key=key, generation=reply.generation, manifest=manifest, manifest_digest=""
                )
                talk.messages.learn(seal, session.ask(seal))
                if self.chance.random() < 0.7:
                    session.ask(Release(key=key, generation=reply.generation))
        elif isinstance(reply, Sealed):
            session.ask(Release(key=key, generation=reply.handle.generation))

    def replace_one(self) -> None:
        """One goes, with whatever it has on its way, and another one comes."""
        gone = self.talks.pop(self.chance.randrange(len(self.talks)))
        self.answers += gone.answers
        gone.session.close()
        self.talks.append(self._new())

    def close(self) -> None:
        """All go, once everything is answered."""
        for talk in self.talks:
            talk.finish()
            self.answers += talk.answers
            talk.session.close()


# --- valid requests


def test_valid_requests_at_random(daemon: DaemonProcess, good: Client) -> None:
    """Of every type, with numbers at their bounds."""
    crowd = Crowd(daemon.runtime_dir, seed=0)
    sent: Counter[str] = Counter()
    for number in range(10_000):
        talk, message = crowd.say()
        sent[type(message).__name__] += 1
        talk.ask(message)
        if crowd.chance.random() < 0.8:  # else it goes on in the dark
            talk.finish()
        if number % 200 == 0:
            good.check_integrity()
        if crowd.chance.random() < 0.05:
            crowd.load()
        if crowd.chance.random() < 0.005:
            crowd.replace_one()
    crowd.close()
    assert sent.keys() == {kind.__name__ for kind in REQUESTS}
    # What is asked for exists often enough that the dice reach deep states.
    reached = {"Elected", "Reserved", "Sealed", "Moving", "Leased", "BlocksPut", "Blocks", "Done"}
    assert reached <= crowd.answers.keys(), crowd.answers
    refused = {"not_writer", "foreign_extent", "double_free", "stale_generation"}
    assert refused <= crowd.answers.keys(), crowd.answers


def test_sessions_that_leave_while_they_wait(daemon: DaemonProcess, good: Client) -> None:
    """With the longest wait there is, hundreds at a time, for writers that leave as well."""
    chance = random.Random(5)
    for _ in range(6):
        sessions = [RawSession(daemon.runtime_dir) for _ in range(5)]
        for session in sessions:
            for key in chance.choices("abc", k=100):
                session.send(encode(Open(key=key, fingerprint={}, wait_ms=60_000)))
        good.check_integrity()
        for session in chance.sample(sessions, len(sessions)):
            session.close()


# --- requests that are not valid


@pytest.mark.parametrize("seed", range(2))
def test_spoiled_requests(daemon: DaemonProcess, good: Client, seed: int) -> None:
    """Valid ones in which bits are flipped, bytes are missing, numbers are others. Each is
    answered, most by a refusal."""
    crowd = Crowd(daemon.runtime_dir, seed)
    for number in range(2500):
        talk, message = crowd.say()
        talk.send(spoiled(crowd.chance, encode(message)))
        if number % 100 == 0:
            crowd.load()
            good.check_integrity()
    crowd.close()
    assert crowd.answers["invalid_message"] > 1000
    assert len(crowd.answers) > 5, crowd.answers  # some mean something else now


def envelopes(chance: random.Random, mine: bytes, others: bytes) -> Iterator[list[bytes]]:
    """Frames around a valid request that are wrong in one way or another; none is answered by
    anything but a refusal, if at all."""
    payload = encode(Lease(num_bytes=EXTENT))
    request_id = b"12345678"
    for length in (*range(8), 9, 100, 5000):
        yield [chance.randbytes(length), mine, payload]
    for length in (*range(16), 17, 1000):
        yield [request_id, chance.randbytes(length), payload]
    yield [request_id, mine[::-1], payload]
    yield [request_id, mine[:-1] + bytes([mine[-1] ^ 1]), payload]
    yield [request_id, mine + others, payload]
    yield [request_id, mine]
    yield [request_id]
    yield [payload]
    yield [b""]
    yield [mine, request_id, payload]
    yield [b"", request_id, mine, payload]
    for count in (1, 2, 10, 1000):
        yield [request_id, mine, payload, *[payload] * count]
        yield [request_id, mine, payload, *[b""] * count]
    yield [request_id, mine, b""]
    yield [request_id, mine, bytes(MAX_FRAME_BYTES)]
    yield [request_id, mine, bytes(MAX_FRAME_BYTES + 1)]


def test_wrong_envelopes(daemon: DaemonProcess, good: Client) -> None:
    chance = random.Random(1)
    mine, other = RawSession(daemon.runtime_dir), RawSession(daemon.runtime_dir)
    cases = list(envelopes(chance, mine.token, other.token))
    for _ in range(20):
        for frames in chance.sample(cases, len(cases)):
            mine.send_frames(frames)
        # Answers come in order: all that come before this one's are for the wrong ones.
        statistics = mine.send(encode(GetStatistics()))
        while (answer := mine.receive())[0] != statistics:
            assert isinstance(answer[1], Failed)
    assert good.statistics().pool.num_leases == 0
    assert isinstance(mine.ask(Lease(num_bytes=EXTENT)), Leased)
    for session in (mine, other):
        session.close()


# --- replays


def test_what_was_sent_once_can_be_sent_again(daemon: DaemonProcess, good: Client) -> None:
    """By the same session, by another one, and in the name of a session that has ended: whoever
    does so gets what any session gets, and nothing of another's."""
    crowd = Crowd(daemon.runtime_dir, 9, num_talks=2)
    recorded: list[bytes] = []
    for _ in range(1000):
        talk, message = crowd.say()
        recorded.append(encode(message))
        talk.ask(message)
        talk.finish()
        if len(recorded) % 50 == 0:
            crowd.load()
    first, second = crowd.talks
    held = RawSession(daemon.runtime_dir)
    mine = held.ask(Lease(num_bytes=EXTENT, count=3))
    assert isinstance(mine, Leased)
    for talk in (first, second):
        for payload in recorded:
            talk.send(payload)
        talk.finish()
        good.check_integrity()
    ended = first.session.token
    first.session.close()
    crowd.talks.remove(first)
    wait_until(lambda: good.statistics().num_sessions == 3, "the first has ended")
    second.answers.clear()
    for payload in recorded:
        second.send(payload, ended)
    second.finish()
    assert second.answers == {"unauthorized": len(recorded)}
    # What was leased all the while still is, and nobody else can return it.
    leases = tuple(LeaseId(extent.offset, mine.generation) for extent in mine.extents)
    assert second.session.code(Return(leases=leases)) == "foreign_extent"
    digests = [bytes([n]) * 20 for n in range(3)]
    blocks = tuple(
        BlockToPut(digest, lease.offset, lease.generation)
        for digest, lease in zip(digests, leases, strict=True)
    )
    assert second.session.code(PutBlocks(blocks=blocks)) == "foreign_extent"
    assert isinstance(held.ask(Return(leases=leases)), Done)
    held.close()
    crowd.close()


# --- names at their limits


def test_names_at_their_limits(daemon: DaemonProcess, good: Client) -> None:
    """The longest keys and fingerprints that fit, and one character more; equal but for the last
    one; and such as mean something to shells, paths and terminals."""
    session = RawSession(daemon.runtime_dir)
    longest = "\N{PILE OF POO}" * 511
    keys = [
        longest + "a",
        longest + "b",
        "../../etc/passwd",
        "/",
        ".",
        "\0",
        "\x1b[2J",
        "%s{}",
        " ",
    ]
    fields = {f"{n:03}" + "\N{SNOWMAN}" * 300: "\N{SNOWMAN}" * 900 for n in range(250)}
    almost = fields | {next(reversed(fields)): "\N{SNOWMAN}" * 899 + "x"}
    for key in keys:
        assert isinstance(session.sealed(key, 4096, fields), Handle)
        again = Open(key=key, fingerprint=fields, wait_ms=0)
        assert isinstance(session.ask(again), Sealed)
        mismatch = session.ask(Open(key=key, fingerprint=almost, wait_ms=0))
        assert isinstance(mismatch, Failed)
        assert mismatch.code == "fingerprint_mismatch"
    assert {s.key for s in good.statistics().weight_sets} == set(keys)
    for key, fingerprint in (
        (longest + "ab", {}),
        ("", {}),
        ("k", {"x" * 4097: ""}),
        ("k", {"x": "y" * 4097}),
        ("k", {str(n): "" for n in range(257)}),
    ):
        open_it = Open(key=key, fingerprint=fingerprint, wait_ms=0)
        assert session.code(open_it) == "invalid_message"
    digests = tuple(bytes([n]) * length for n, length in enumerate((16, 64)))
    for wrong in (b"", b"x" * 15, b"x" * 65):
        assert session.code(LookUpBlocks(digests=(*digests, wrong))) == "invalid_message"
    assert isinstance(session.ask(LookUpBlocks(digests=digests * (MAX_BATCH // 2))), Blocks)
    too_many = LookUpBlocks(digests=digests * (MAX_BATCH // 2 + 1))
    assert session.code(too_many) == "invalid_message"
    session.close()


# --- the lifeline


def hello(**changes: object) -> bytes:
    """A valid Hello, but for the changes."""
    fields = {"type": "hello", "version": PROTOCOL_VERSION, **changes}
    return msgspec.msgpack.encode(fields)


HELLOS: Final = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
    "a number": b"\7",
    "zeros": bytes(8192),
    "the longest there is": b"\xc6\x00\x00\x1f\xfb" + bytes(8187),
    "far too long": bytes(100_000),
    "another message": encode(GetStatistics()),
    "no version": msgspec.msgpack.encode({"type": "hello"}),
    "an older version": hello(version=1),
    "a newer version": hello(version=PROTOCOL_VERSION + 1),
    "a huge version": hello(version=(1 << 64) - 1),
    "a text for a version": hello(version="2"),
    "an unknown field": hello(root=True),
    "an unknown device": hello(device="tape:0"),
    "a long label": hello(label="x" * 257),
    "a long token": hello(resume=bytes(17)),
    "cut off": hello()[:-1],
    "followed by more": hello() + b"\0",
}
"""Answered by Refused."""
WELCOME: Final = {
    "plain": hello(),
    "with the longest names": hello(
        **dict.fromkeys(("model", "user", "label"), "\N{PILE OF POO}" * 256)
    ),
    "with a token that nobody has": hello(resume=bytes(16)),
    "with half a token": hello(resume=b"x" * 7),
}


def test_a_hello_that_is_refused(daemon: DaemonProcess, good: Client) -> None:
    for what, frame in HELLOS.items():
        for _ in range(10):
            with raw_lifeline(daemon.runtime_dir) as connection:
                connection.send(frame)
                assert isinstance(decode_lifeline(connection.recv(8192)), Refused), what
                assert connection.recv(8192) == b""


def test_connections_of_every_kind_at_once(daemon: DaemonProcess, good: Client) -> None:
    """Those that say Hello, nothing, or nonsense, with or without descriptors, and leave at any
    moment; the daemon keeps none of what it was sent."""
    chance = random.Random(3)
    kinds = [*HELLOS.values(), *WELCOME.values()]
    opened: list[socket.socket] = []
    for number in range(1500):
        connection = raw_lifeline(daemon.runtime_dir)
        match chance.randrange(7):
            case 0:  # nothing at all
                pass
            case 1:
                connection.send(b"")
            case 2:
                socket.send_fds(connection, [chance.choice(kinds)], [0, 1, 2])
            case 3:
                with contextlib.suppress(ConnectionError):  # it has been hung up on
                    for _ in range(chance.randrange(2, 9)):
                        connection.send(chance.choice(kinds))
            case 4:
                connection.send(spoiled(chance, hello(label="x")))
            case 5:
                connection.send(hello())
                assert isinstance(decode_lifeline(connection.recv(8192)), Welcome)
                connection.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR)))
            case _:
                connection.send(chance.choice(kinds))
        if chance.random() < 0.5:  # a close with unread data is a reset, not an end
            connection.close()
        else:
            opened.append(connection)
        if len(opened) > 100:
            opened.pop(chance.randrange(len(opened))).close()
        if number % 250 == 0:
            good.check_integrity()
    for connection in opened:
        connection.close()


def test_hundreds_that_say_nothing_hold_up_nobody_for_long(
    daemon: DaemonProcess, good: Client
) -> None:
    """Those that were silent for longest are told to go. Who is there already is served, and so is
    who comes."""
    silent = [raw_lifeline(daemon.runtime_dir) for _ in range(300)]
    for connection in silent[:44]:
        assert isinstance(decode_lifeline(connection.recv(8192)), Refused)
    good.lease(EXTENT).release()
    assert good.statistics().num_sessions == 1
    RawSession(daemon.runtime_dir).close()
    for connection in silent[:100]:
        connection.close()
    wait_until(lambda: num_descriptors(daemon) < 200, "the daemon has noticed")
    RawSession(daemon.runtime_dir).close()
    for connection in silent[100:]:
        connection.close()
