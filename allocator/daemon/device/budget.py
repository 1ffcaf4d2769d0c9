"""All memory of one device as numbers: weight sets, the pool, who may hold how much. Pure.

Owns the limit and the quotas, and says how much has to be given up to make room; which goes first
is `device.eviction`'s. Two bounds count: the limit, for all that is used, and what the device has
room for now (`see`), for what takes its memory: files that are mapped where they lie do not. What
is reserved counts whether or not it is committed yet. Invariants: nothing is given out beyond
either bound; nothing is given up unless that makes the room; who asks for more than its quota is
refused before anything is given up for it. Knows nothing of bytes, sockets or backends.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from allocator.backends.room import Room, size
from allocator.books import SessionId
from allocator.daemon.device.eviction import AnyEffect, Evicted, Eviction, FreeExtent
from allocator.daemon.pool.kv_pool import KVPool
from allocator.daemon.weights.sets import WeightSets
from allocator.daemon.weights.weight_set import WeightSet
from allocator.errors import OutOfDeviceMemory, QuotaExceeded
from allocator.messages import MAX_BYTES, BlockToPut, Extent, LeaseId, QuotaStatistics

QuotaKey = tuple[str, str]
"""("model" or "user", name)."""
_RAISE: Final = "raise --memory-limit"


@dataclass(frozen=True)
class Holder:
    """Whom the memory of a session is charged to; "" for nobody."""

    model: str = ""
    user: str = ""

    def charges(self) -> list[QuotaKey]:
        """The quotas that apply."""
        named = (("model", self.model), ("user", self.user))
        return [(kind, name) for kind, name in named if name]


class DeviceMemory:
    """One device. Every method that can fail leaves everything as it was when it does."""

    def __init__(
        self,
        pool_bytes: int,
        granularity: int,
        *,
        limit_bytes: int | None = None,
        quotas: dict[QuotaKey, int] | None = None,
    ) -> None:
        """`limit_bytes` None leaves it to the device."""
        self.sets = WeightSets()
        self.pool = KVPool(pool_bytes, granularity)
        self.limit_bytes = limit_bytes
        self.device_bytes = MAX_BYTES
        """What the device has room for, as it was last seen."""
        self._room: Room | None = None
        self._quotas: dict[QuotaKey, int] = dict(quotas or {})
        self._holders: dict[SessionId, Holder] = {}
        self._tolerated_bytes = 0
        self.eviction = Eviction(self.sets, self.pool)

    # --- sessions

    def begin_session(self, session: SessionId, holder: Holder) -> None:
        """From now on what it holds is charged to `holder`."""
        self._holders[session] = holder

    def end_session(self, session: SessionId, now: float) -> tuple[list[AnyEffect], list[str]]:
        """All that it held comes back; also the keys of the weight sets that this changed."""
        effects, changed = self.sets.end_session(session, now)
        freed = [FreeExtent(extent) for extent in self.pool.end_session(session, now)]
        self._holders.pop(session, None)
        return [*effects, *freed], changed

    def holder(self, session: SessionId) -> Holder:
        """Whom the session is charged to."""
        return self._holders.get(session, Holder())

    # --- room

    def tolerate_present_use(self) -> None:
        """What an earlier daemon left may exceed a limit that is lower now: nothing is added then,
        but nothing is wrong either."""
        self._tolerated_bytes = self.used_bytes

    @property
    def used_bytes(self) -> int:
        """Weight sets on the device, leased extents and cached blocks."""
        return self.sets.num_bytes("device") + self.pool.leased_bytes + self.pool.cached_bytes

    @property
    def owned_bytes(self) -> int:
        """What of it takes the device's memory: all but files that are mapped where they lie."""
        sets = sum(weight_set.owned_bytes for weight_set in self.sets)
        return sets + self.pool.leased_bytes + self.pool.cached_bytes

    @property
    def bound_bytes(self) -> int:
        """The lesser of limit and room, for what takes the device's memory."""
        return min(self._most_bytes, self.device_bytes)

    @property
    def overdrawn_bytes(self) -> int:
        """What is owned beyond the device's room, since others took of it."""
        return max(0, self.owned_bytes - self.device_bytes)

    @property
    def leasable_bytes(self) -> int:
        """What all sessions together could hold of the pool, once all that is idle is gone."""
        busy = sum(s.owned_bytes for s in self.sets if s.state != "idle" or s.pinned)
        return max(0, min(self.pool.total_bytes, self.bound_bytes - busy))

    def see(self, device_bytes: int, room: Room | None = None) -> None:
        """What the device has room for now, what is owned already included; `room` says for
        people what bounds that."""
        self.device_bytes = max(0, device_bytes)
        self._room = room

    def make_room(
        self, session: SessionId, num_bytes: int, *, mapped_bytes: int = 0
    ) -> list[AnyEffect]:
        """Give up what nobody uses until `num_bytes` more fit, and beside them `mapped_bytes` of
        files, which take none of the device's memory.

        Raises QuotaExceeded, or OutOfDeviceMemory, which says who holds what and what would help.
        """
        self._check_room(session, num_bytes, mapped_bytes)
        return self._evict_down_to(num_bytes, mapped_bytes, owned=num_bytes > 0)

    def relieve(self) -> list[AnyEffect]:
        """Give up what nobody uses as long as more is owned than the device has room for. May not
        be enough."""
        return self.eviction.until(lambda: not self.overdrawn_bytes, owned=True)

    def give_way(self, num_bytes: int) -> list[AnyEffect]:
        """As `relieve`, and then go on until what was given up took `num_bytes`. May not be
        enough."""
        effects = self.relieve()
        freed = sum(one.num_bytes for one in effects if isinstance(one, Evicted))
        while freed < num_bytes and (evicted := self.eviction.one(owned=True)):
            freed += sum(one.num_bytes for one in evicted if isinstance(one, Evicted))
            effects += evicted
        return effects

    def lease(
        self, session: SessionId, num_bytes: int, count: int
    ) -> tuple[list[Extent], list[AnyEffect]]:
        """`count` extents, all or none. Raises as `make_room` does."""
        rounded = self.pool.rounded(num_bytes)
        self._check_room(session, rounded * count)
        extents = self.pool.lease(session, num_bytes, count)
        effects: list[AnyEffect] = []
        if extents is None:  # there is room, but in pieces, or where blocks are
            if self.pool.most_leases(num_bytes) < count:
                raise OutOfDeviceMemory(self._no_extents(rounded, count))
            while extents is None:
                evicted = self.eviction.block()
                if not evicted:
                    raise AssertionError("the pool without blocks has not the extents it promised")
                effects += evicted
                if self.pool.free_bytes >= rounded * count:
                    extents = self.pool.lease(session, num_bytes, count)
        return extents, effects + self._evict_down_to(0, owned=True)

    def give_back(self, session: SessionId, leases: Sequence[LeaseId]) -> list[AnyEffect]:
        """Leases end. Raises as `KVPool.give_back` does."""
        return [FreeExtent(extent) for extent in self.pool.give_back(session, leases)]

    def put(self, session: SessionId, blocks: Sequence[BlockToPut], now: float) -> list[bool]:
        """See `KVPool.put`."""
        return self.pool.put(session, blocks, now)

    # --- quotas

    def set_quota(self, quota: QuotaKey, num_bytes: int | None) -> None:
        """None lifts it. What is held already stays."""
        if num_bytes is None:
            self._quotas.pop(quota, None)
        else:
            self._quotas[quota] = num_bytes

    def quotas(self) -> Iterable[tuple[QuotaKey, int]]:
        """All that are set."""
        return self._quotas.items()

    def quota_statistics(self) -> tuple[QuotaStatistics, ...]:
        """Each with what is held under it."""
        held = self._held()
        return tuple(
            QuotaStatistics(kind=kind, name=name, limit_bytes=limit, used_bytes=held[kind, name])
            for (kind, name), limit in sorted(self._quotas.items())
        )

    def _check_quotas(self, session: SessionId, num_bytes: int) -> None:
        charges = [charge for charge in self.holder(session).charges() if charge in self._quotas]
        if not charges:
            return
        held = self._held()
        for kind, name in charges:
            limit, used = self._quotas[kind, name], held[kind, name]
            if used + num_bytes > limit:
                raise QuotaExceeded(
                    f"{size(num_bytes)} more are asked for, but the {kind} {name!r} may hold "
                    f"{size(limit)} and holds {size(used)}: free some of it, or raise the quota"
                )

    def _held(self) -> Counter[QuotaKey]:
        held: Counter[QuotaKey] = Counter()
        for weight_set in self.sets:
            for charge in Holder(weight_set.model, weight_set.user).charges():
                held[charge] += weight_set.num_bytes("device")
        for session, holder in self._holders.items():
            leased_bytes = self.pool.held(session)[0]
            for charge in holder.charges():
                held[charge] += leased_bytes
        return held

    def shortage(self, num_bytes: int) -> str:
        """What who can't have so much of the device's memory is told."""
        busy = self.owned_bytes - self.pool.evictable_bytes
        return self._beyond_room(num_bytes, busy)

    # --- steps

    @property
    def _most_bytes(self) -> int:
        # Without a limit the device says when it is full, but what is written down of it ends here.
        return MAX_BYTES if self.limit_bytes is None else self.limit_bytes

    def _check_room(self, session: SessionId, num_bytes: int, mapped_bytes: int = 0) -> None:
        """Raises as `make_room` does, and changes nothing."""
        self._check_quotas(session, num_bytes + mapped_bytes)
        idle = [s for s in self.sets if s.state == "idle" and not s.pinned]
        evictable_bytes = self.pool.evictable_bytes
        busy_bytes = self.used_bytes - evictable_bytes
        busy_bytes -= sum(weight_set.num_bytes("device") for weight_set in idle)
        if busy_bytes + num_bytes + mapped_bytes > self._most_bytes:
            raise OutOfDeviceMemory(self._beyond_limit(num_bytes + mapped_bytes, busy_bytes))
        busy_bytes = self.owned_bytes - evictable_bytes
        busy_bytes -= sum(weight_set.owned_bytes for weight_set in idle)
        if num_bytes and busy_bytes + num_bytes > self.device_bytes:
            raise OutOfDeviceMemory(self._beyond_room(num_bytes, busy_bytes))

    def _evict_down_to(
        self, num_bytes: int, mapped_bytes: int = 0, *, owned: bool
    ) -> list[AnyEffect]:
        """Until so much fits, as `_check_room` has found that it can; `owned`: into the device's
        room as well as below the limit."""
        more = num_bytes + mapped_bytes
        effects = self.eviction.until(lambda: self.used_bytes + more <= self._most_bytes)
        if owned:
            effects += self.eviction.until(
                lambda: self.owned_bytes + num_bytes <= self.device_bytes, owned=True
            )
        return effects

    def _beyond_limit(self, num_bytes: int, busy_bytes: int) -> str:
        limit = self._most_bytes
        return self._full(num_bytes, busy_bytes, f"the limit is {size(limit)}", _RAISE)

    def _beyond_room(self, num_bytes: int, busy_bytes: int) -> str:
        room, ours = self._room, size(self.device_bytes)
        if room is None:
            return self._full(num_bytes, busy_bytes, f"the device has room for {ours}", "")
        bound = f"{room.words}, of which {ours} can be onecopy's now"
        short = busy_bytes + num_bytes - self.device_bytes
        return self._full(num_bytes, busy_bytes, bound, room.remedy(short))

    def _full(self, num_bytes: int, busy_bytes: int, bound: str, remedy: str) -> str:
        if not busy_bytes:
            helps = f" {remedy[:1].upper()}{remedy[1:]}." if remedy else ""
            return f"{size(num_bytes)} are needed, but {bound}.{helps}"
        verb = "Stop one of them"
        if any(s.pinned and s.state == "idle" for s in self.sets):
            verb = "Unpin or stop one of them"
        helps = f"{verb}, or {remedy}." if remedy else f"{verb}."
        return (
            f"{size(num_bytes)} are needed, but {bound}, and {size(busy_bytes)} of it are in use: "
            f"{', '.join(self._holdings())}. {helps}"
        )

    def _no_extents(self, num_bytes: int, count: int) -> str:
        statistics = self.pool.statistics()
        return (
            f"{count} extents of {size(num_bytes)} are needed, but the largest free one of the "
            f"pool has {size(statistics.largest_free_bytes)} of {size(statistics.total_bytes)}: "
            f"return extents first. In use: {', '.join(self._holdings())}."
        )

    def _holdings(self) -> list[str]:
        """Who holds what, the largest first."""
        found: list[tuple[int, str]] = []
        for weight_set in self.sets:
            num_bytes = weight_set.num_bytes("device")
            if num_bytes and (weight_set.state != "idle" or weight_set.pinned):
                state = f"{weight_set.state}, pinned" if weight_set.pinned else weight_set.state
                found.append((num_bytes, f"{weight_set.key} ({state}, {size(num_bytes)})"))
        for session, holder in self._holders.items():
            leased_bytes, num_leases, _ = self.pool.held(session)
            if leased_bytes:
                who = " of ".join(filter(None, [holder.model, holder.user])) or f"session {session}"
                found.append((leased_bytes, f"{who} ({num_leases} leases, {size(leased_bytes)})"))
        pinned_bytes = self.pool.cached_bytes - self.pool.evictable_bytes
        if pinned_bytes:
            found.append((pinned_bytes, f"pinned prefix blocks ({size(pinned_bytes)})"))
        found.sort(reverse=True)
        most = [text for _, text in found[:8]]
        return [*most, f"{len(found) - 8} more"] if len(found) > 8 else most

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        self.pool.check()
        limit = max(self.limit_bytes or 0, self._tolerated_bytes)
        if self.limit_bytes is not None and self.used_bytes > limit:
            raise AssertionError(f"{self.used_bytes} bytes are used of {self.limit_bytes}")
        known = self._holders.keys()
        for weight_set in self.sets:
            check_set(weight_set, known)
        for session, _, _ in self.pool.leases():
            if session not in known:
                raise AssertionError(f"session {session} is gone and holds leases")
        for session, _, _ in self.pool.pins():
            if session not in known:
                raise AssertionError(f"session {session} is gone and pins blocks")


def check_set(weight_set: WeightSet, sessions: Iterable[SessionId]) -> None:
    """Raise AssertionError where the set breaks one of `WeightSets`' invariants."""
    known = set(sessions)
    holders = {*weight_set.readers, *(w.session for w in weight_set.waiters)}
    if weight_set.writer is not None:
        holders.add(weight_set.writer)
    if not holders <= known:
        raise AssertionError(f"{weight_set.key}: a session that is gone holds it")
    if weight_set.readers and "device" not in weight_set.copies:
        raise AssertionError(f"{weight_set.key}: it is read, but not on the device")
    if weight_set.readers and weight_set.writer is not None:
        raise AssertionError(f"{weight_set.key}: it is read and written")
    if weight_set.waiters and weight_set.writer is None:
        raise AssertionError(f"{weight_set.key}: sessions wait, and nobody writes")
    if weight_set.state == "absent":
        raise AssertionError(f"{weight_set.key}: it is absent, and still listed")
