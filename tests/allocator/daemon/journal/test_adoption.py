"""The daemon is killed while its clients live: nothing is lost, nothing is loaded again.

All of it with real processes. What is not taken over, and why, is in test_power_loss.py.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from allocator import (
    AllocatorGone,
    Client,
    DoubleFree,
    Manifest,
    OutOfDeviceMemory,
    RuntimeDir,
    WeightSetReader,
    WeightSetWriter,
    messages,
)
from allocator.backends.host import SHM_ROOT
from allocator.client.session.connection import Connection
from allocator.daemon.journal.file import read_journal
from allocator.daemon.journal.records import SessionEnded, decode_record
from allocator.errors import Unanswered
from allocator.messages import SessionStatistics, WeightSetStatistics
from tests.allocator.daemon.raw_session import RawSession
from tests.allocator.processes import ClientProcess, Refused, in_fork
from tests.daemon_process import TIMEOUT_S, DaemonProcess
from tests.leaks import segments, wait_until

KIB = 1 << 10
MIB = 1 << 20
EXTENT = 64 * KIB
DIGEST = "ab" * 16
Start = Callable[..., ClientProcess]
StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def start(runtime_dir: RuntimeDir, start_daemon: StartDaemon) -> Iterator[Start]:
    """Start client processes; they are stopped before the daemons are."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(ClientProcess(runtime_dir, **options))


def digest_of(value: int, num_bytes: int) -> str:
    return hashlib.sha256(bytes([value]) * num_bytes).hexdigest()


def set_of(memory: Client, key: str) -> WeightSetStatistics | None:
    return next((s for s in memory.statistics().weight_sets if s.key == key), None)


def session_of(memory: Client, pid: int) -> SessionStatistics | None:
    return next((s for s in memory.statistics().sessions if s.pid == pid), None)


def committed_bytes(runtime_dir: RuntimeDir) -> int:
    """What all segments of the directory take of the machine's memory."""
    names = segments(runtime_dir.segment_prefix)
    return sum((SHM_ROOT / name).stat().st_blocks * 512 for name in names)


def has_ended_a_session(runtime_dir: RuntimeDir) -> bool:
    records = (decode_record(payload) for payload in read_journal(runtime_dir.journal))
    return any(isinstance(record, SessionEnded) for record in records)


class Scene:
    """One client of each kind: a reader, a writer in the middle, and two with leases and blocks."""

    def __init__(self, start: Start):
        self.reader, self.writer, self.owner, self.guest = (
            start(model=model, user="ada") for model in ("r", "w", "o", "g")
        )
        assert self.reader.do.load("sealed", MIB, 1) == "writer"
        assert self.writer.do.open("unfinished", {}) == "writer"
        self.segment = self.writer.do.reserve(MIB)
        self.writer.do.fill(2)
        self.writer.do.progress(MIB // 2)
        self.kept, self.given = self.owner.do.lease(EXTENT, 2)
        self.owner.do.fill_leases([(self.kept, 3), (self.given, 4)])
        assert self.owner.do.put([(DIGEST, self.given)]) == [True]
        assert self.guest.do.look_up([DIGEST]) == [self.given]

    def check_memory(self) -> None:
        """Every process sees the bytes that it saw."""
        assert self.reader.do.digest() == digest_of(1, MIB)
        assert self.owner.do.lease_digest(self.kept) == digest_of(3, EXTENT)
        assert self.owner.do.block_digest(DIGEST) == digest_of(4, EXTENT)
        assert self.guest.do.block_digest(DIGEST) == digest_of(4, EXTENT)

    def check_books(self, memory: Client) -> None:
        """The daemon knows who holds what."""
        statistics = memory.statistics()
        sealed, unfinished = (set_of(memory, key) for key in ("sealed", "unfinished"))
        assert sealed is not None
        assert unfinished is not None
        assert (sealed.state, sealed.pinned, sealed.model, sealed.reader_pids) == (
            *("sealed", True, "r"),
            (self.reader.pid,),
        )
        assert (unfinished.state, unfinished.writer_pid) == ("loading", self.writer.pid)
        assert unfinished.segment == self.segment
        pool = statistics.pool
        assert (pool.leased_bytes, pool.cached_bytes, pool.evictable_bytes) == (EXTENT, EXTENT, 0)
        owner, guest = (session_of(memory, one.pid) for one in (self.owner, self.guest))
        assert owner is not None
        assert guest is not None
        assert (owner.leased_bytes, owner.num_pinned_blocks, owner.user) == (EXTENT, 1, "ada")
        assert (guest.leased_bytes, guest.num_pinned_blocks) == (0, 1)
        quotas = {(q.kind, q.name): (q.limit_bytes, q.used_bytes) for q in statistics.quotas}
        assert quotas == {("user", "ada"): (8 * MIB, 2 * (MIB + 4096) + EXTENT)}
        assert statistics.used_bytes == 2 * (MIB + 4096) + 2 * EXTENT
        memory.check_integrity()


@pytest.fixture
def scene(start: Start, start_daemon: StartDaemon, runtime_dir: RuntimeDir) -> Scene:
    daemon = start_daemon()
    scene = Scene(start)
    with daemon.connect() as memory:
        memory.pin("sealed")
        memory.set_quota("user", "ada", 8 * MIB)
        memory.set_quota("model", "r", 1)
        memory.set_quota("model", "r", None)
        scene.check_books(memory)
    # A session that this process has closed must not look as if it went on.
    wait_until(lambda: has_ended_a_session(runtime_dir), "the end of our session is noted")
    before = segments(runtime_dir.segment_prefix)
    daemon.kill()
    scene.check_memory()
    assert segments(runtime_dir.segment_prefix) == before
    return scene


@pytest.mark.parametrize("num_daemons", [1, 2])
def test_all_that_is_held_is_taken_over(
    scene: Scene, start_daemon: StartDaemon, runtime_dir: RuntimeDir, num_daemons: int
) -> None:
    """Also where the clients have not noticed that there was another daemon in between."""
    before = segments(runtime_dir.segment_prefix)
    for _ in range(num_daemons - 1):
        start_daemon().kill()
    daemon = start_daemon()
    with daemon.connect() as memory:
        scene.check_books(memory)
        statistics = memory.statistics()
        assert statistics.num_adopted_sets == 1
        assert {s.pid for s in statistics.sessions if s.adopted} == {
            one.pid for one in (scene.reader, scene.writer, scene.owner, scene.guest)
        }
        assert segments(runtime_dir.segment_prefix) == before
        scene.check_memory()

        # The writer goes on where it was, and others read what it wrote.
        scene.writer.do.progress(MIB)
        scene.writer.do.seal()
        assert scene.guest.do.load("unfinished", MIB, 9) == "reader"
        assert scene.guest.do.digest() == digest_of(2, MIB)
        assert scene.guest.do.damaged() == []
        assert segments(runtime_dir.segment_prefix) == before

        # What was leased is returned; what was pinned is unpinned; more is leased.
        scene.owner.do.release_leases([scene.kept])
        assert memory.statistics().pool.leased_bytes == 0
        scene.owner.do.release_blocks([DIGEST])
        assert memory.statistics().pool.evictable_bytes == 0
        scene.guest.do.release_blocks([DIGEST])
        assert memory.statistics().pool.evictable_bytes == EXTENT
        assert scene.owner.do.look_up([DIGEST]) == [scene.given]
        [offset] = scene.owner.do.lease(EXTENT)
        scene.owner.do.fill_leases([(offset, 5)])
        assert scene.owner.do.lease_digest(offset) == digest_of(5, EXTENT)
        assert scene.owner.do.block_digest(DIGEST) == digest_of(4, EXTENT)

        # A quota that was set before holds.
        with pytest.raises(Refused, match="QuotaExceeded"):
            scene.owner.do.lease(8 * MIB)
        scene.reader.do.release()
        assert not any(s.adopted for s in memory.statistics().sessions)
        memory.check_integrity()


def test_after_all_clients_have_left_what_was_taken_over_is_free(
    scene: Scene, start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    daemon = start_daemon()
    for client in (scene.reader, scene.writer, scene.owner, scene.guest):
        client.kill()
    with daemon.connect() as memory:
        wait_until(lambda: memory.statistics().num_sessions == 1, "they have ended", 1.0)
        sealed = set_of(memory, "sealed")
        assert sealed is not None
        assert (sealed.state, sealed.pinned) == ("idle", True)
        assert set_of(memory, "unfinished") is None
        pool = memory.statistics().pool
        assert (pool.leased_bytes, pool.evictable_bytes) == (0, EXTENT)
        assert committed_bytes(runtime_dir) == memory.statistics().used_bytes
        memory.evict("sealed")
        memory.check_integrity()


def test_who_died_while_there_was_no_daemon_has_lost_everything(
    scene: Scene, start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    for client in (scene.reader, scene.writer, scene.owner, scene.guest):
        client.kill()
    with start_daemon().connect() as memory:
        statistics = memory.statistics()
        assert [(s.key, s.state) for s in statistics.weight_sets] == [("sealed", "idle")]
        assert statistics.num_sessions == 1
        assert (statistics.pool.leased_bytes, statistics.pool.evictable_bytes) == (0, EXTENT)
        # The block is still there for others, and so are the weights; nothing else is.
        assert committed_bytes(runtime_dir) == statistics.used_bytes == MIB + 4096 + EXTENT
        [block] = memory.look_up_blocks([bytes.fromhex(DIGEST)])
        assert hashlib.sha256(block.buffer).hexdigest() == digest_of(4, EXTENT)
        memory.check_integrity()


def test_one_of_several_died_meanwhile(scene: Scene, start_daemon: StartDaemon) -> None:
    scene.owner.kill()
    scene.writer.kill()
    with start_daemon().connect() as memory:
        assert set_of(memory, "unfinished") is None
        pool = memory.statistics().pool
        assert (pool.leased_bytes, pool.cached_bytes, pool.evictable_bytes) == (0, EXTENT, 0)
        assert scene.guest.do.block_digest(DIGEST) == digest_of(4, EXTENT)
        scene.guest.do.release_blocks([DIGEST])
        assert memory.statistics().pool.evictable_bytes == EXTENT
        memory.check_integrity()


# --- what was on its way


def die_unanswered(
    monkeypatch: pytest.MonkeyPatch, daemon: DaemonProcess, is_done: Callable[[], bool]
) -> None:
    """The next request of this process is done by the daemon, which is killed before its answer
    arrives."""
    ask = Connection._await

    def await_in_vain(self: Connection, request_id: bytes, patience_s: float) -> messages.Reply:
        monkeypatch.undo()
        wait_until(is_done, "the request is done")
        daemon.kill()
        while self._socket.poll(0):
            self._socket.recv_multipart()
        return ask(self, request_id, patience_s)

    monkeypatch.setattr(Connection, "_await", await_in_vain)


def test_a_block_is_not_unpinned_twice(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it, the allocator would give away what is still read here."""
    daemon = start_daemon("--memory-limit", str(MIB))
    with daemon.connect(label="reads") as memory, daemon.connect(label="looks on") as other:
        lease = memory.lease(EXTENT)
        lease.buffer[:] = b"\7" * EXTENT
        blocks = memory.put_blocks([(bytes(16), lease)]) + memory.look_up_blocks([bytes(16)])
        one, two = (block for block in blocks if block is not None)

        def num_pins() -> int:
            sessions = other.statistics().sessions
            return next(s.num_pinned_blocks for s in sessions if s.label == "reads")

        assert num_pins() == 2
        die_unanswered(monkeypatch, daemon, lambda: num_pins() == 1)
        one.release()
        start_daemon("--memory-limit", str(MIB))
        memory.statistics()  # it comes back
        assert num_pins() == 1
        with pytest.raises(OutOfDeviceMemory):
            other.lease(MIB)
        assert bytes(two.buffer) == b"\7" * EXTENT
        memory.check_integrity()


@pytest.mark.parametrize("is_known", [False, True])
def test_a_block_that_was_put_in_the_last_moment_keeps_its_bytes(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Who put it does not know that others may read it by now: it can neither write nor discard
    what it leased."""
    daemon = start_daemon()
    with daemon.connect() as memory, daemon.connect(label="looks on") as other:
        if is_known:
            known = other.lease(EXTENT)
            known.buffer[:] = b"\7" * EXTENT
            assert other.put_blocks([(bytes(16), known)]) != [None]
        lease = memory.lease(EXTENT)
        lease.buffer[:] = b"\7" * EXTENT
        looks = [0]

        def is_done() -> bool:
            looks[0] += 1
            return other.statistics().pool.num_leases == 0 or looks[0] > 30

        die_unanswered(monkeypatch, daemon, is_done)
        with pytest.raises(Unanswered):
            memory.put_blocks([(bytes(16), lease)])
        with pytest.raises(DoubleFree):
            lease.release()
        start_daemon()
        memory.statistics()  # it comes back
        pool = other.statistics().pool
        assert (pool.num_leases, pool.num_blocks) == (0, 1)
        [block] = other.look_up_blocks([bytes(16)])
        assert bytes(block.buffer) == b"\7" * EXTENT
        assert [s.num_pinned_blocks for s in other.statistics().sessions if not s.label] == [0]
        other.check_integrity()


class Held:
    """What a session holds, and one request of each kind that changes it."""

    def __init__(self, memory: Client):
        self.memory = memory
        self.leases = memory.lease_many(EXTENT, 2)
        self.blocks = [
            block
            for block in memory.put_blocks([(bytes(16), memory.lease(EXTENT))])
            if block is not None
        ]
        self.reader = self.loaded("read")
        self.loaded("idle").release()
        writer = memory.open_weight_set("written", {})
        assert isinstance(writer, WeightSetWriter)
        writer.reserve(8192)
        self.writer = writer
        elected = memory.open_weight_set("elected", {})
        assert isinstance(elected, WeightSetWriter)
        self.elected = elected

    def loaded(self, key: str) -> WeightSetReader:
        writer = self.memory.open_weight_set(key, {})
        assert isinstance(writer, WeightSetWriter)
        writer.reserve(8192)
        return writer.seal(EMPTY, 0)


EMPTY = Manifest(version=1, tensors={}, metadata={})
Picture = tuple[int, int, int, dict[str, tuple[str, int]]]


def picture(other: Client) -> Picture:
    """What the session that "holds" does hold, and the states of all weight sets."""
    statistics = other.statistics()
    [holder] = [s for s in statistics.sessions if s.label == "holds"]
    sets = {s.key: (s.state, len(s.reader_pids)) for s in statistics.weight_sets}
    return holder.num_leases, holder.num_pinned_blocks, statistics.pool.num_blocks, sets


def changed(before: Picture, **changes: object) -> Picture:
    leases, pins, blocks, sets = before
    return (
        leases + int(str(changes.get("leases", 0))),
        pins + int(str(changes.get("pins", 0))),
        blocks + int(str(changes.get("blocks", 0))),
        {k: v for k, v in (sets | dict(changes.get("sets", {}))).items() if v},  # type: ignore
    )


IN_THE_LAST_MOMENT: dict[str, tuple[Callable[[Held], object], dict[str, object]]] = {
    # What was acquired is given back by itself: nobody here ever got it.
    "lease": (lambda held: held.memory.lease_many(EXTENT, 3), {}),
    "look up": (lambda held: held.memory.look_up_blocks([bytes(16)]), {}),
    "open what is idle": (lambda held: held.memory.open_weight_set("idle", {}), {}),
    "open what is read": (lambda held: held.memory.open_weight_set("read", {}), {}),
    "be elected": (lambda held: held.memory.open_weight_set("new", {}), {}),
    "begin to move": (lambda held: held.memory.sleep("idle", level=2), {}),
    # A writer that does not know whether it sealed gives the set up, if it has one to give up.
    "seal": (
        lambda held: held.writer.seal(EMPTY, 0),
        {"sets": {"written": ("idle", 0)}},
    ),
    "reserve": (lambda held: held.elected.reserve(8192), {}),
    # What was given up is given up.
    "return": (lambda held: held.leases[0].release(), {"leases": -1}),
    "unpin": (lambda held: held.blocks[0].release(), {"pins": -1}),
    "release": (lambda held: held.reader.release(), {"sets": {"read": ("idle", 0)}}),
    "abandon": (lambda held: held.writer.abandon(), {"sets": {"written": None}}),
}


@pytest.mark.parametrize(
    ("request_it", "outcome"), IN_THE_LAST_MOMENT.values(), ids=IN_THE_LAST_MOMENT.keys()
)
def test_the_last_thing_that_a_daemon_did_is_settled(
    start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
    request_it: Callable[[Held], object],
    outcome: dict[str, object],
) -> None:
    """It was done, but its answer never came."""
    daemon = start_daemon()
    with daemon.connect(label="holds") as memory, daemon.connect(label="looks on") as other:
        held = Held(memory)
        before = picture(other)
        now = [before]

        def is_done() -> bool:
            now.append(picture(other))
            return now[-1] != before or len(now) > 30

        die_unanswered(monkeypatch, daemon, is_done)
        with contextlib.suppress(AllocatorGone):
            request_it(held)
        start_daemon()
        memory.statistics()  # it comes back
        assert picture(other) == changed(before, **outcome)
        memory.check_integrity()
        # And it goes on as if nothing had been.
        memory.lease_many(EXTENT, 3)[0].release()
        for key in ("new", "idle"):
            opened = memory.open_weight_set(key, {}, timeout_s=TIMEOUT_S)
            assert isinstance(opened, WeightSetWriter if key == "new" else WeightSetReader)


# --- what was given up without a daemon


def test_what_is_given_up_meanwhile_is_free_as_soon_as_the_client_is_back(
    start_daemon: StartDaemon, runtime_dir: RuntimeDir
) -> None:
    daemon = start_daemon()
    with daemon.connect(label="gives up") as memory:
        leases = memory.lease_many(EXTENT, 3)
        [block, _] = memory.put_blocks([(bytes(16), leases[0]), (bytes(16), leases[1])])
        assert block is not None
        again = memory.look_up_blocks([bytes(16)])
        writer = memory.open_weight_set("sealed", {})
        assert isinstance(writer, WeightSetWriter)
        writer.reserve(8192)
        readers = [writer.seal(Manifest(version=1, tensors={}, metadata={}), 0)]
        for _ in range(2):
            opened = memory.open_weight_set("sealed", {})
            assert isinstance(opened, WeightSetReader)
            readers.append(opened)
        unfinished = memory.open_weight_set("unfinished", {})
        assert isinstance(unfinished, WeightSetWriter)
        unfinished.reserve(MIB)
        daemon.kill()

        memory.release_many(leases[1:])
        memory.release_blocks(again)
        for reader in readers[:2]:
            reader.release()
        unfinished.progress(MIB // 2)  # nobody hears it
        unfinished.abandon()
        with pytest.raises(AllocatorGone):
            memory.statistics()

        daemon = start_daemon()
        statistics = memory.statistics()
        assert statistics.pool.leased_bytes == 0
        assert [s.num_pinned_blocks for s in statistics.sessions] == [1]
        assert [(s.key, len(s.reader_pids)) for s in statistics.weight_sets] == [("sealed", 1)]
        assert len(segments(runtime_dir.segment_prefix)) == 2
        block.release()
        readers[2].release()
        statistics = memory.statistics()
        assert [s.num_pinned_blocks for s in statistics.sessions] == [0]
        assert [s.state for s in statistics.weight_sets] == ["idle"]
        memory.check_integrity()


# --- resuming


def test_without_a_daemon_calls_say_so_and_with_one_they_go_on(
    start: Start, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon()
    client = start()
    [offset] = client.do.lease(EXTENT)
    for _ in range(3):
        daemon.kill()
        for _ in range(2):  # it says so every time
            with pytest.raises(Refused, match="AllocatorGone"):
                client.do.lease(EXTENT)
        daemon = start_daemon()
        client.do.release_leases([offset])
        [offset] = client.do.lease(EXTENT)
    with daemon.connect() as memory:
        found = session_of(memory, client.pid)
        assert found is not None
        assert (found.leased_bytes, found.adopted) == (EXTENT, False)


def test_who_waited_for_a_writer_is_told_and_waits_again(
    start: Start, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon()
    writer, waiter = start(), start()
    assert writer.do.open("k", {}) == "writer"
    writer.do.reserve(MIB)
    waiter.begin.open("k", {})
    with daemon.connect() as memory:
        wait_until(lambda: memory.statistics().num_sessions == 3, "all are there")
    daemon.kill()
    with pytest.raises(Refused, match="Unanswered"):
        waiter.receive()
    start_daemon()
    waiter.begin.open("k", {})
    writer.do.fill(7)
    writer.do.seal()
    assert waiter.receive() == "reader"
    assert waiter.do.digest() == digest_of(7, MIB)


def test_a_token_is_only_good_for_the_process_that_got_it(
    runtime_dir: RuntimeDir, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon()
    rightful = RawSession(runtime_dir)
    rightful.ask(messages.Lease(num_bytes=EXTENT))

    def steal() -> str:
        session = RawSession(runtime_dir, resume=rightful.token)
        statistics = session.ask(messages.GetStatistics())
        assert isinstance(statistics, messages.Statistics)
        mine = session.lifeline.welcome
        return f"{mine.resumed} {mine.token == rightful.token} {statistics.pool.leased_bytes}"

    # While its lifeline is open there is nothing to resume, for nobody.
    assert in_fork(steal).text == f"False False {EXTENT}"
    daemon.kill()
    start_daemon()
    assert in_fork(steal).text == f"False False {EXTENT}"
    resumed = RawSession(runtime_dir, resume=rightful.token)
    assert (resumed.lifeline.welcome.resumed, resumed.token) == (True, rightful.token)
    for session in (rightful, resumed):
        session.close()


def test_a_token_resumes_once(runtime_dir: RuntimeDir, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    first = RawSession(runtime_dir)
    daemon.kill()
    start_daemon()
    second = RawSession(runtime_dir, resume=first.token)
    assert (second.lifeline.welcome.resumed, second.token) == (True, first.token)
    third = RawSession(runtime_dir, resume=first.token)
    assert (third.lifeline.welcome.resumed, third.token == first.token) == (False, False)
    for session in (first, second, third):
        session.close()
