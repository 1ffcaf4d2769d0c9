"""All of a device's memory at random against a plain model: who holds what, who must give way.

`test_at_random` runs more than 10,000 operations in 70 histories, in the long run three times as
many: sessions come and end, lease, return, put and look up blocks, load, read, pin and evict weight
sets, send them to sleep and wake them, within a limit and within quotas, and err on purpose. The
model is made of dicts; of bins, bit maps and queues it knows nothing. After each operation both
must agree on every byte.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from allocator.daemon.device.budget import DeviceMemory, Holder
from allocator.daemon.device.eviction import AnyEffect, Evicted, FreeExtent
from allocator.daemon.weights.weight_set import Answer, Free, Waiter
from allocator.errors import (
    AllocatorError,
    DoubleFree,
    ForeignExtent,
    OutOfDeviceMemory,
    QuotaExceeded,
    StaleGeneration,
    WeightSetBusy,
)
from allocator.messages import BlockToPut, Elected, Extent, Handle, LeaseId, Open, Sealed
from tests.quick import usual_or_long

pytestmark = pytest.mark.slow

GRANULE = 1024
OPEN = Open(key="k", fingerprint={}, wait_ms=0)
POOL = 32 * GRANULE
MANIFEST = Extent(offset=0, num_bytes=1)
NUM_HISTORIES, NUM_STEPS = usual_or_long(70, 200), 150

NUM_DIGESTS = 8
HOW_OFTEN = {
    **{"begin": 3, "end": 1, "set_quota": 1},
    **{"lease": 8, "lease_many": 4, "give_back": 3, "give_back_one": 8, "give_back_wrongly": 4},
    **{"cache": 10, "put": 2, "put_wrongly": 2, "look_up": 6, "unpin": 5, "unpin_wrongly": 2},
    **{"load": 10, "open": 1, "use": 8, "reserve": 2, "seal": 3, "abandon": 1, "release": 6},
    **{"pin": 1, "sleep": 6, "evict": 1, "evict_one": 1},
}


AT_LEAST = {
    **{"operations": 20_000, "leases": 1500, "put": 700, "put before": 300, "found": 300},
    **{"blocks evicted": 700, "blocks made way for a lease in one piece": 20},
    **{"sealed": 200, "followed by a waiter": 50, "sets evicted": 40, "woken": 15},
    **{"OutOfDeviceMemory": 700, "QuotaExceeded": 300, "WeightSetBusy": 500},
    **{"DoubleFree": 200, "ForeignExtent": 800, "StaleGeneration": 15},
}
"""What must have happened in 200 histories, or they would prove little. About a third of what does,
as another version of Hypothesis may choose otherwise, and as it draws constants from all modules
of ours that happen to be loaded."""


@dataclass
class Block:
    """A block of the index, as the model knows it."""

    extent: Extent
    used: int
    pins: Counter[int] = field(default_factory=Counter)


@dataclass
class Set:
    """A weight set, as the model knows it. `copy` is the sealed one's segment."""

    generation: int
    writer: int | None
    holder: Holder
    target: Handle | None = None
    copy: Handle | None = None
    asleep: bool = False
    readers: Counter[int] = field(default_factory=Counter)
    waiting: list[Waiter] = field(default_factory=list)
    idle_since: int = 0
    pinned: bool = False

    @property
    def num_bytes(self) -> int:
        """On the device."""
        handle = self.target or (None if self.asleep else self.copy)
        return handle.num_bytes if handle is not None else 0

    @property
    def may_go(self) -> bool:
        return self.idle and not self.pinned

    @property
    def idle(self) -> bool:
        return self.copy is not None and not self.asleep and not self.readers.total()


class Memory(RuleBasedStateMachine):
    """The device and the model, side by side."""

    seen: ClassVar[Counter[str]] = Counter()
    """What happened, over all histories: a history in which nothing does would prove nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.num_sessions = 0
        self.num_segments = 0
        self.num_evictions = 0
        self.sessions: dict[int, Holder] = {}
        self.leases: dict[LeaseId, tuple[int, int]] = {}  # whose, bytes
        self.returned: list[LeaseId] = []
        self.blocks: dict[int, Block] = {}
        self.sets: dict[str, Set] = {}
        self.quotas: dict[tuple[str, str], int] = {}
        self.segments: set[str] = set()

    @initialize(limit=st.integers(20 * GRANULE, 40 * GRANULE), quota=st.integers(GRANULE, POOL))
    def begin(self, limit: int, quota: int) -> None:
        self.limit = limit
        self.quotas = {("user", "u"): quota}
        self.memory = DeviceMemory(POOL, GRANULE, limit_bytes=limit, quotas=self.quotas)
        for model, user in (("m", ""), ("m", "u"), ("", "")):
            self.session_begins(model, user)

    @rule(
        what=st.sampled_from([name for name, times in HOW_OFTEN.items() for _ in range(times)]),
        who=st.integers(0, 3),
        key=st.sampled_from(["k", "l", "m"]),
        size=st.sampled_from([*range(1, 10)]),
        picks=st.lists(st.integers(0, 40), min_size=1, max_size=3),
        flag=st.booleans(),
    )
    def step(self, what: str, who: int, key: str, size: int, picks: list[int], flag: bool) -> None:
        """One rule, so that how often each of them comes is up to us: `who` is one of the sessions
        that are there, `picks` are some of whatever there is to choose from."""
        match what:
            case "begin":
                self.session_begins("mn"[who % 2] if flag else "", "u" if who > 1 else "")
            case "end":
                self.session_ends(who)
            case "lease":
                self.lease(who, size * GRANULE - 300 * who, 1)
            case "lease_many":
                self.lease(who, (1 + size // 4) * GRANULE - picks[0], len(picks))
            case "give_back":
                self.give_back(who, picks, honest=True)
            case "give_back_one":
                self.give_back(who, picks[:1], honest=True)
            case "give_back_wrongly":
                self.give_back(who, picks, honest=False)
            case "cache":
                self.cache(who, 1 + size // 3, picks[0], keep=flag)
            case "put":
                self.put(who, picks, picks[0], honest=True)
            case "put_wrongly":
                self.put(who, picks, picks[0], honest=False)
            case "look_up":
                self.look_up(who, [pick % NUM_DIGESTS for pick in picks])
            case "unpin":
                self.unpin(who, picks, honest=True)
            case "unpin_wrongly":
                self.unpin(who, picks, honest=False)
            case "load":
                self.load(who, key, size * GRANULE - picks[0], keep=flag)
            case "open":
                self.open(who, key)
            case "use":
                self.open(who, key)
                self.release(who, key)
            case "reserve":
                self.reserve(key, size * GRANULE + picks[0])
            case "seal":
                self.seal(key)
            case "abandon":
                self.abandon(key)
            case "release":
                self.release(who, key)
            case "pin":
                self.pin(key, pinned=size == 1)
            case "sleep":
                self.sleep(key)
            case "evict":
                self.evict(key)
            case "evict_one":
                self.evict_one()
            case "set_quota":
                quota = (("user", "u"), ("model", "m"), ("model", "n"))[who % 3]
                self.set_quota(quota, picks[0] * GRANULE if flag else None)

    # --- sessions

    def session_begins(self, model: str, user: str) -> None:
        self.seen["operations"] += 1
        if len(self.sessions) < 4:
            self.num_sessions += 1
            self.sessions[self.num_sessions] = Holder(model, user)
            self.memory.begin_session(self.num_sessions, Holder(model, user))

    def session(self, who: int) -> int:
        self.seen["operations"] += 1
        self.now += 1
        return list(self.sessions)[who % len(self.sessions)]

    def session_ends(self, who: int) -> None:
        """All that it held comes back, and the next who waits for a set writes it."""
        session = self.session(who)
        if len(self.sessions) == 1:
            return
        effects, _ = self.memory.end_session(session, float(self.now))
        del self.sessions[session]
        freed = [effect.extent for effect in effects if isinstance(effect, FreeExtent)]
        mine = [lease for lease, (owner, _) in self.leases.items() if owner == session]
        assert sorted((e.offset, e.num_bytes) for e in freed) == sorted(
            (lease.offset, self.leases.pop(lease)[1]) for lease in mine
        )
        for block in self.blocks.values():
            if block.pins.pop(session, 0):
                block.used = self.now
        rest = [effect for effect in effects if not isinstance(effect, FreeExtent)]
        for key, one in list(self.sets.items()):
            one.waiting = [waiter for waiter in one.waiting if waiter.session != session]
            if one.readers.pop(session, 0) and not one.readers.total():
                one.idle_since = self.now
            if one.writer == session:
                rest = self.writer_gone(key, rest)
        assert rest == []

    def writer_gone(self, key: str, effects: Iterable[AnyEffect]) -> list[AnyEffect]:
        """Take what must follow out of the effects."""
        one, rest = self.sets[key], list(effects)
        if one.target is not None:
            rest.remove(Free(one.target))
            self.segments.remove(one.target.segment)
        one.writer = one.target = None
        if not one.waiting:
            del self.sets[key]
            return rest
        waiter = one.waiting.pop(0)
        [answer] = [e for e in rest if isinstance(e, Answer) and e.waiter == waiter]
        self.seen["followed by a waiter"] += 1
        assert isinstance(answer.message, Elected)
        assert answer.message.generation > one.generation
        one.writer, one.generation = waiter.session, answer.message.generation
        rest.remove(answer)
        return rest

    # --- room

    @property
    def used(self) -> int:
        taken = sum(one.num_bytes for one in self.sets.values())
        taken += sum(num_bytes for _, num_bytes in self.leases.values())
        return taken + sum(block.extent.num_bytes for block in self.blocks.values())

    def charged(self, kind: str, name: str) -> int:
        held = sum(one.num_bytes for one in self.sets.values() if getattr(one.holder, kind) == name)
        return held + sum(
            num_bytes
            for session, num_bytes in self.leases.values()
            if getattr(self.sessions[session], kind) == name
        )

    def refusal(self, session: int, num_bytes: int) -> type[AllocatorError] | None:
        """What a wish for so many bytes must be refused with."""
        for (kind, name), most in self.quotas.items():
            ours = getattr(self.sessions[session], kind) == name
            if ours and self.charged(kind, name) + num_bytes > most:
                return QuotaExceeded
        may_go = sum(one.num_bytes for one in self.sets.values() if one.may_go)
        may_go += sum(b.extent.num_bytes for b in self.blocks.values() if not b.pins.total())
        return OutOfDeviceMemory if self.used - may_go + num_bytes > self.limit else None

    def refused(
        self, error: type[AllocatorError], function: Callable[..., object], *arguments: object
    ) -> None:
        with pytest.raises(error):
            function(*arguments)
        self.seen[error.__name__] += 1

    def evicted(
        self, effects: deque[AnyEffect], short: Callable[[], bool], *, sets_too: bool = True
    ) -> None:
        """As long as it is short of something, and not once longer, the one goes that was used
        least recently."""
        while short():
            evicted, free = effects.popleft(), effects.popleft()
            assert isinstance(evicted, Evicted)
            times = [block.used for block in self.blocks.values() if not block.pins.total()]
            if sets_too:
                times += [one.idle_since for one in self.sets.values() if one.may_go]
            if evicted.key:
                assert sets_too
                one = self.sets.pop(evicted.key)
                assert one.may_go
                assert one.idle_since == min(times)
                assert evicted.num_bytes == one.num_bytes
                assert one.copy is not None
                assert free == Free(one.copy)
                self.segments.remove(one.copy.segment)
            else:
                block = self.blocks.pop(int.from_bytes(evicted.digest, "big"))
                assert not block.pins.total()
                assert block.used == min(times)
                assert evicted.num_bytes == block.extent.num_bytes
                assert free == FreeExtent(block.extent)
            self.num_evictions += 1
            self.seen["sets evicted" if evicted.key else "blocks evicted"] += 1

    # --- leases

    def fits(self, num_bytes: int, count: int, *, without_blocks: bool = False) -> bool:
        """Whether the gaps between what is taken hold so many extents."""
        taken = [(lease.offset, num) for lease, (_, num) in self.leases.items()]
        taken += [
            (block.extent.offset, block.extent.num_bytes)
            for block in self.blocks.values()
            if block.pins.total() or not without_blocks
        ]
        found = end = 0
        for offset, taken_bytes in [*sorted(taken), (POOL, 0)]:
            found += (offset - end) // num_bytes
            end = offset + taken_bytes
        return found >= count

    def lease(self, who: int, num_bytes: int, count: int) -> None:
        session = self.session(who)
        rounded = -(-num_bytes // GRANULE) * GRANULE
        error = self.refusal(session, rounded * count)
        if error is None and not self.fits(rounded, count, without_blocks=True):
            error = OutOfDeviceMemory
        if error is not None:
            self.refused(error, self.memory.lease, session, num_bytes, count)
            return
        extents, listed = self.memory.lease(session, num_bytes, count)
        effects = deque(listed)
        self.evicted(effects, lambda: not self.fits(rounded, count), sets_too=False)
        self.seen["blocks made way for a lease in one piece"] += len(listed) > len(effects)
        assert [extent.num_bytes for extent in extents] == [rounded] * count
        for extent in extents:
            lease = LeaseId(extent.offset, self.memory.pool.generation)
            assert not any(lease.generation <= old.generation for old in self.returned[-9:])
            self.leases[lease] = (session, rounded)
        self.seen["leases"] += 1
        self.evicted(effects, lambda: self.used > self.limit)
        assert not effects

    def wrong(self, session: int, leases: list[LeaseId]) -> type[AllocatorError] | None:
        """The name under which the first of them that is wrong must be refused."""
        seen: set[int] = set()
        for lease in leases:
            if lease.offset in seen:
                return DoubleFree
            seen.add(lease.offset)
            now = next((other for other in self.leases if other.offset == lease.offset), None)
            if now is None:
                taken = [(o.offset, o.offset + n) for o, (_, n) in self.leases.items()]
                taken += [
                    (b.extent.offset, b.extent.offset + b.extent.num_bytes)
                    for b in self.blocks.values()
                ]
                inside = any(begin <= lease.offset < end for begin, end in taken)
                return ForeignExtent if inside or lease.offset >= POOL else DoubleFree
            if self.leases[now][0] != session:
                return ForeignExtent
            if now != lease:
                return StaleGeneration
        return None

    def chosen(self, session: int, picks: list[int], honest: bool) -> list[LeaseId]:
        """Of the session's own leases, or of everything that was ever leased."""
        mine = [lease for lease, (owner, _) in self.leases.items() if owner == session]
        among = mine if honest else [*self.returned[-12:], *self.leases, LeaseId(POOL, 1)]
        return [among[pick % len(among)] for pick in picks] if among else []

    def give_back(self, who: int, picks: list[int], *, honest: bool) -> None:
        session = self.session(who)
        leases = self.chosen(session, picks, honest)
        if error := self.wrong(session, leases):
            self.refused(error, self.memory.give_back, session, leases)
            return
        assert self.memory.give_back(session, leases) == [
            FreeExtent(Extent(offset=lease.offset, num_bytes=self.leases.pop(lease)[1]))
            for lease in leases
        ]
        self.returned += leases

    # --- blocks

    def put(self, who: int, picks: list[int], first: int, *, honest: bool) -> None:
        session = self.session(who)
        leases = self.chosen(session, picks, honest)
        numbers = [(first + index) % NUM_DIGESTS for index in range(len(leases))]
        blocks = [
            BlockToPut(digest(number), lease.offset, lease.generation)
            for number, lease in zip(numbers, leases, strict=True)
        ]
        if error := self.wrong(session, leases):
            self.refused(error, self.memory.put, session, blocks, float(self.now))
            return
        stored = self.memory.put(session, blocks, float(self.now))
        for number, lease, taken in zip(numbers, leases, stored, strict=True):
            assert taken == (number not in self.blocks)
            self.seen["put" if taken else "put before"] += 1
            if taken:
                extent = Extent(offset=lease.offset, num_bytes=self.leases.pop(lease)[1])
                self.blocks[number] = Block(extent, self.now, Counter([session]))
                self.returned.append(lease)

    def look_up(self, who: int, numbers: list[int]) -> None:
        session = self.session(who)
        digests = [digest(number) for number in numbers]
        found = self.memory.pool.look_up(session, digests, float(self.now))
        expected = []
        for number in numbers:
            if number not in self.blocks:
                break
            block = self.blocks[number]
            block.pins[session] += 1
            block.used = self.now
            expected.append(block.extent)
        assert found == expected
        self.seen["found"] += len(found)

    def unpin(self, who: int, picks: list[int], *, honest: bool) -> None:
        session = self.session(who)
        pinned = [n for n, block in self.blocks.items() for _ in range(block.pins[session])]
        among = pinned if honest else range(NUM_DIGESTS)
        numbers = [among[pick % len(among)] for pick in picks] if among else []
        digests = [digest(number) for number in numbers]
        if Counter(numbers) - Counter(pinned):
            self.refused(ForeignExtent, self.memory.pool.unpin, session, digests, float(self.now))
            return
        self.memory.pool.unpin(session, digests, float(self.now))
        for number in numbers:
            self.blocks[number].pins[session] -= 1
            self.blocks[number].used = self.now

    def cache(self, who: int, size: int, first: int, *, keep: bool) -> None:
        """Lease and put; whether or not that was refused, unpin what is pinned."""
        session = self.session(who)
        self.lease(who, size * GRANULE, 1)
        mine = [lease for lease, (owner, _) in self.leases.items() if owner == session]
        if mine:
            self.put(who, [len(mine) - 1], first, honest=True)
        if not keep:
            self.unpin(who, [0], honest=True)

    # --- weight sets, in the steps that a device takes

    def load(self, who: int, key: str, num_bytes: int, *, keep: bool) -> None:
        """Whoever is elected writes; everybody reads."""
        self.open(who, key)
        self.reserve(key, num_bytes)
        self.seal(key)
        if not keep:
            self.release(who, key)

    def open(self, who: int, key: str) -> None:
        session, one = self.session(who), self.sets.get(key)
        if one is not None and one.asleep and not self.woken(session, key, one):
            return
        answer = self.memory.sets.open(session, key, {})
        if one is None:
            assert isinstance(answer, Elected)
            holder = self.sessions[session]
            self.sets[key] = Set(answer.generation, session, holder)
            made = self.memory.sets.get(key)
            assert made is not None
            made.model, made.user = holder.model, holder.user
        elif one.writer is not None:
            assert answer is None
            waiter = Waiter(session, (b"", b"%d" % self.now), float("inf"), OPEN)
            self.memory.sets.wait(key, waiter)
            one.waiting.append(waiter)
        else:
            assert isinstance(answer, Sealed)
            assert one.copy is not None
            assert answer.handle.segment == one.copy.segment
            one.readers[session] += 1

    def woken(self, session: int, key: str, one: Set) -> bool:
        """Whether there is room for a set that slept in host memory."""
        assert one.copy is not None
        num_bytes = one.copy.num_bytes
        if error := self.refusal(session, num_bytes):
            self.refused(error, self.memory.make_room, session, num_bytes)
            return False
        effects = deque(self.memory.make_room(session, num_bytes))
        self.evicted(effects, lambda: self.used + num_bytes > self.limit)
        assert not effects
        self.memory.sets.relabel(key, "device")
        one.asleep = False
        self.seen["woken"] += 1
        return True

    def reserve(self, key: str, num_bytes: int) -> None:
        one = self.sets.get(key)
        self.session(0)
        if one is None or one.writer is None or one.target is not None:
            return
        if error := self.refusal(one.writer, num_bytes):
            self.refused(error, self.memory.make_room, one.writer, num_bytes)
            return
        effects = deque(self.memory.make_room(one.writer, num_bytes))
        self.evicted(effects, lambda: self.used + num_bytes > self.limit)
        assert not effects
        self.num_segments += 1
        one.target = Handle(
            backend="host",
            segment=f"/s{self.num_segments}",
            num_bytes=num_bytes,
            generation=one.generation,
        )
        self.segments.add(one.target.segment)
        self.memory.sets.reserve(one.writer, key, one.target)

    def seal(self, key: str) -> None:
        one = self.sets.get(key)
        self.session(0)
        if one is None or one.writer is None or one.target is None:
            return
        _, effects = self.memory.sets.seal(one.writer, key, one.generation, MANIFEST)
        assert [effect.waiter for effect in effects if isinstance(effect, Answer)] == one.waiting
        one.readers = Counter([one.writer, *(waiter.session for waiter in one.waiting)])
        one.copy, one.target, one.writer, one.waiting = one.target, None, None, []
        self.seen["sealed"] += 1

    def abandon(self, key: str) -> None:
        one = self.sets.get(key)
        self.session(0)
        if one is None or one.writer is None:
            return
        effects = self.memory.sets.abandon(one.writer, key, one.generation)
        assert self.writer_gone(key, effects) == []

    def release(self, who: int, key: str) -> None:
        session, one = self.session(who), self.sets.get(key)
        if one is None or not one.readers[session]:
            return
        self.memory.sets.release(session, key, one.generation, float(self.now))
        one.readers[session] -= 1
        if not one.readers.total():
            one.idle_since = self.now

    def pin(self, key: str, *, pinned: bool) -> None:
        self.session(0)
        if key in self.sets:
            self.memory.sets.pin(key, pinned)
            self.sets[key].pinned = pinned

    def sleep(self, key: str) -> None:
        one = self.sets.get(key)
        self.session(0)
        if one is None:
            return
        if one.asleep:
            assert self.memory.sets.sleep(key, "host") == ("asleep", [])
            return
        if not one.idle:
            self.refused(WeightSetBusy, self.memory.sets.sleep, key, "host")
            return
        assert self.memory.sets.sleep(key, "host") == ("copy", [])
        self.memory.sets.relabel(key, "host")
        one.asleep = True

    def evict(self, key: str) -> None:
        one = self.sets.get(key)
        self.session(0)
        if one is None:
            return
        if not one.idle and not one.asleep:
            self.refused(WeightSetBusy, self.memory.sets.evict, key)
            return
        assert one.copy is not None
        assert self.memory.sets.evict(key) == [Free(one.copy)]
        self.segments.remove(one.copy.segment)
        del self.sets[key]

    def evict_one(self) -> None:
        """As when the device is shorter than the limit allows, because of others."""
        self.session(0)
        before = self.num_evictions
        effects = deque(self.memory.eviction.one())
        self.evicted(effects, lambda: bool(effects))
        may_go = [one for one in self.sets.values() if one.may_go]
        may_go += [block for block in self.blocks.values() if not block.pins.total()]
        assert self.num_evictions == before + 1 or not may_go

    def set_quota(self, quota: tuple[str, str], num_bytes: int | None) -> None:
        self.session(0)
        self.memory.set_quota(quota, num_bytes)
        if num_bytes is None:
            self.quotas.pop(quota, None)
        else:
            self.quotas[quota] = num_bytes

    # --- after each of them

    @invariant()
    def within_the_limit_and_nothing_lost(self) -> None:
        self.memory.check()
        assert self.memory.used_bytes == self.used <= self.limit
        pool = self.memory.pool.statistics()
        leased = sum(num_bytes for _, num_bytes in self.leases.values())
        cached = sum(block.extent.num_bytes for block in self.blocks.values())
        assert (pool.leased_bytes, pool.cached_bytes) == (leased, cached)
        free = sum(r.num_bytes for r in self.memory.pool.regions() if r.kind == "free")
        assert leased + cached + free == pool.total_bytes == POOL
        assert self.memory.sets.num_bytes("device") + leased + cached == self.used

    @invariant()
    def no_two_overlap(self) -> None:
        taken = [(lease.offset, num) for lease, (_, num) in self.leases.items()]
        taken += [(b.extent.offset, b.extent.num_bytes) for b in self.blocks.values()]
        end = 0
        for offset, num_bytes in sorted(taken):
            assert end <= offset
            end = offset + num_bytes
        assert end <= POOL

    @invariant()
    def everybody_holds_what_the_model_says(self) -> None:
        for session in self.sessions:
            mine = [num for owner, num in self.leases.values() if owner == session]
            pins = sum(block.pins[session] for block in self.blocks.values())
            assert self.memory.pool.held(session) == (sum(mine), len(mine), pins)
        states = {
            one.key: (one.state, one.writer, +one.readers, one.pinned, one.num_bytes("device"))
            for one in self.memory.sets
        }
        assert states == {
            key: (state_of(one), one.writer, +one.readers, one.pinned, one.num_bytes)
            for key, one in self.sets.items()
        }
        assert {handle.segment for handle in self.memory.sets.handles()} == self.segments

    @invariant()
    def quotas_count_what_is_held(self) -> None:
        told = {(q.kind, q.name): (q.limit_bytes, q.used_bytes) for q in self.quota_statistics()}
        assert told == {
            (kind, name): (most, self.charged(kind, name))
            for (kind, name), most in self.quotas.items()
        }

    def quota_statistics(self) -> Iterable:  # type: ignore[type-arg]
        return self.memory.quota_statistics()

    def teardown(self) -> None:
        """Once all sessions have ended and all is evicted, nothing is used."""
        if not hasattr(self, "memory"):
            return
        self.memory.begin_session(0, Holder())
        self.sessions[0] = Holder()
        while len(self.sessions) > 1:
            self.session_ends(0)
        for key in list(self.sets):
            self.pin(key, pinned=False)
            self.evict(key)
        while self.blocks:
            self.evict_one()
        assert self.memory.used_bytes == 0
        assert self.segments == set()
        assert (
            self.memory.eviction.num_sets + self.memory.pool.statistics().num_block_evictions
            == (self.num_evictions)
        )
        self.within_the_limit_and_nothing_lost()


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def state_of(one: Set) -> str:
    if one.writer is not None:
        return "loading"
    if one.asleep:
        return "asleep"
    return "sealed" if one.readers.total() else "idle"


# --- step by step


def memory_of(limit: int | None, **quotas: int) -> DeviceMemory:
    """Room for 16 granules in the pool. Session 1 is charged to model m and user u, 2 to nobody."""
    memory = DeviceMemory(
        16 * GRANULE,
        GRANULE,
        limit_bytes=None if limit is None else limit * GRANULE,
        quotas={("model", name): size * GRANULE for name, size in quotas.items()},
    )
    memory.begin_session(1, Holder("m", "u"))
    memory.begin_session(2, Holder())
    return memory


def sealed(memory: DeviceMemory, key: str, size: int, session: int = 1) -> Handle:
    """A weight set that this session reads, as `Device` makes it."""
    elected = memory.sets.open(session, key, {})
    assert isinstance(elected, Elected)
    made = memory.sets.get(key)
    assert made is not None
    made.model, made.user = memory.holder(session).model, memory.holder(session).user
    memory.make_room(session, size * GRANULE)
    handle = Handle(
        backend="host",
        segment=f"/{key}",
        num_bytes=size * GRANULE,
        generation=elected.generation,
    )
    memory.sets.reserve(session, key, handle)
    memory.sets.seal(session, key, elected.generation, MANIFEST)
    return handle


def idle(memory: DeviceMemory, key: str, size: int, now: float) -> Handle:
    handle = sealed(memory, key, size)
    memory.sets.release(1, key, handle.generation, now)
    return handle


def unpinned(memory: DeviceMemory, number: int, size: int, now: float) -> Extent:
    """A block that nobody pins, last used at `now`."""
    [extent], _ = memory.lease(1, size * GRANULE, 1)
    block = BlockToPut(digest(number), extent.offset, memory.pool.generation)
    memory.put(1, [block], now)
    memory.pool.unpin(1, [digest(number)], now)
    return extent


def gone(effects: Iterable[AnyEffect]) -> list[str]:
    """The keys of sets and the numbers of blocks, in the order in which they had to go."""
    return [
        effect.key or str(int.from_bytes(effect.digest, "big"))
        for effect in effects
        if isinstance(effect, Evicted)
    ]


def test_sets_and_blocks_go_in_one_order() -> None:
    memory = memory_of(16)
    idle(memory, "a", 2, now=1.0)
    unpinned(memory, 5, 2, now=2.0)
    idle(memory, "b", 2, now=3.0)
    unpinned(memory, 6, 2, now=4.0)
    unpinned(memory, 7, 2, now=5.0)
    assert gone(memory.make_room(2, 6 * GRANULE)) == []
    assert gone(memory.make_room(2, 12 * GRANULE)) == ["a", "5", "b"]
    memory.check()
    assert gone(memory.make_room(2, 16 * GRANULE)) == ["6", "7"]
    assert (memory.eviction.num_sets, memory.pool.statistics().num_block_evictions) == (2, 3)


def test_a_pinned_set_stays_and_the_message_says_that_it_could_go() -> None:
    memory = memory_of(16)
    idle(memory, "kept", 6, now=1.0)
    memory.sets.pin("kept", True)
    idle(memory, "other", 6, now=2.0)
    assert gone(memory.make_room(2, 10 * GRANULE)) == ["other"]
    idle(memory, "third", 6, now=3.0)
    with pytest.raises(OutOfDeviceMemory, match=r"kept \(idle, pinned, 0\.0 MB\)\. Unpin or stop"):
        memory.make_room(2, 11 * GRANULE)
    assert memory.sets.get("third") is not None  # it would have gone in vain
    assert memory.eviction.one() != []
    assert memory.eviction.one() == []


def test_the_message_names_the_largest_holders_and_counts_the_rest() -> None:
    memory = memory_of(10_000)
    memory.pool.end_session(1, 0.0)
    for number in range(10):
        sealed(memory, f"set {number}", 100 * (number + 1), session=2)
    memory.lease(1, 9 * GRANULE, 1)
    [extent], _ = memory.lease(2, 3 * GRANULE, 1)
    memory.put(2, [BlockToPut(digest(1), extent.offset, memory.pool.generation)], 0.0)
    memory.lease(2, GRANULE, 1)
    with pytest.raises(OutOfDeviceMemory) as caught:
        memory.make_room(2, 9000 * GRANULE)
    text = str(caught.value)
    assert "9.2 MB are needed, but the limit is 10.2 MB, and 5.6 MB of it are in use" in text
    assert text.index("set 9 (sealed, 1.0 MB)") < text.index("set 8 (sealed, 0.9 MB)")
    assert "set 2" in text
    assert "set 1 " not in text
    assert ", 5 more. Stop one of them, or raise --memory-limit." in text
    with pytest.raises(OutOfDeviceMemory, match=r"extents of 0\.0 MB are needed, but the largest"):
        memory.lease(2, 4 * GRANULE, 1)


def test_the_message_of_an_empty_device_names_the_option() -> None:
    with pytest.raises(OutOfDeviceMemory, match=r"but the limit is 0\.0 MB\. Raise --memory-limit"):
        memory_of(4).make_room(2, 5 * GRANULE)


def test_a_quota_counts_leases_and_sets_of_all_sessions_and_refuses_before_anything_goes() -> None:
    memory = memory_of(16, m=8)
    memory.begin_session(3, Holder("m", "another"))
    idle(memory, "idle", 2, now=1.0)
    memory.lease(1, 4 * GRANULE, 1)
    with pytest.raises(QuotaExceeded, match=r"the model 'm' may hold 0\.0 MB and holds 0\.0 MB"):
        memory.lease(3, 3 * GRANULE, 1)
    assert memory.sets.get("idle") is not None
    memory.lease(3, 2 * GRANULE, 1)
    memory.lease(2, 8 * GRANULE, 1)  # of no model
    memory.set_quota(("model", "m"), 0)
    [told] = memory.quota_statistics()
    assert (told.limit_bytes, told.used_bytes) == (0, 8 * GRANULE)  # what is held stays
    memory.set_quota(("model", "m"), None)
    memory.set_quota(("model", "m"), None)
    assert memory.quota_statistics() == ()
    assert gone(memory.lease(3, GRANULE, 1)[1]) == ["idle"]


def test_without_a_limit_the_device_says_when_it_is_full() -> None:
    memory = memory_of(None)
    idle(memory, "a", 1 << 30, now=1.0)
    block = unpinned(memory, 1, 16, now=2.0)
    assert memory.make_room(2, 1 << 60) == []
    with pytest.raises(OutOfDeviceMemory):
        memory.lease(2, 17 * GRANULE, 1)
    assert dict(memory.pool.blocks())[digest(1)] == block
    extents, effects = memory.lease(2, GRANULE, 16)
    assert len(extents) == 16
    assert gone(effects) == ["1"]


def test_what_an_earlier_daemon_left_may_exceed_the_limit_but_not_grow() -> None:
    memory = memory_of(16)
    sealed(memory, "a", 10)
    memory.limit_bytes = 5 * GRANULE
    with pytest.raises(AssertionError, match="bytes are used of"):
        memory.check()
    memory.tolerate_present_use()
    memory.check()
    with pytest.raises(OutOfDeviceMemory):
        memory.lease(2, 1, 1)
    memory.end_session(1, 1.0)
    assert gone(memory.lease(2, GRANULE, 1)[1]) == ["a"]


def test_a_broken_invariant_is_found() -> None:
    """Each of them by itself: a daemon that finds one ends, so none may be overlooked."""

    def broken(change: Callable[[DeviceMemory], object]) -> None:
        memory = memory_of(16)
        sealed(memory, "a", 2)
        memory.lease(1, GRANULE, 2)
        unpinned(memory, 1, 1, now=1.0)
        memory.pool.look_up(2, [digest(1)], 1.0)
        memory.check()
        change(memory)
        with pytest.raises(AssertionError):
            memory.check()

    broken(lambda memory: memory.pool._leases.popitem())
    broken(lambda memory: memory.pool._index._blocks.popitem())
    broken(lambda memory: memory.pool._index._pins.clear())
    broken(lambda memory: memory.pool._held.clear())
    broken(lambda memory: memory.pool._index._unpinned.update({digest(1): None}))
    broken(lambda memory: memory.pool._arena.allocate(GRANULE))
    broken(lambda memory: setattr(memory.pool._index, "cached_bytes", 0))
    broken(lambda memory: setattr(memory.pool._index, "evictable_bytes", 5))
    broken(lambda memory: memory._holders.clear())
    broken(lambda memory: memory._holders.pop(2))
    broken(lambda memory: next(iter(memory.sets)).copies.clear())
    broken(lambda memory: setattr(next(iter(memory.sets)), "writer", 2))
    broken(lambda memory: next(iter(memory.sets)).waiters.append(Waiter(1, (b"", b""), 1.0, OPEN)))


def test_at_random() -> None:
    Memory.seen.clear()
    run_state_machine_as_test(
        Memory,
        settings=settings(
            max_examples=NUM_HISTORIES,
            stateful_step_count=NUM_STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Of few histories what is rare is rarer still, or more frequent.
    share = 200 if NUM_HISTORIES >= 200 else 800
    for what, times in AT_LEAST.items():
        least = max(1, times * NUM_HISTORIES // share)
        assert Memory.seen[what] >= least, f"{what}: {dict(Memory.seen)}"
