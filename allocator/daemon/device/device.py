"""One device: the table of what each request does.

    request ─► its row ─► handler ─► pure cores (sets, pool, budget) ─► reply, effects
                 └─► afterwards: what the session holds now goes into the journal

Owns the table, the one place of the daemon in which a request's type is looked at. Invariants: a
change is in the journal before its reply leaves; a refused request changes nothing; a session waits
for one thing at a time. Knows nothing of sockets.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from allocator.backends import Backend
from allocator.books import SessionId
from allocator.daemon.clients.sessions import Session
from allocator.daemon.device.budget import DeviceMemory, Holder
from allocator.daemon.device.looking import Looking
from allocator.daemon.device.parts import Around, Asked, Parts
from allocator.daemon.device.pool_requests import PoolRequests
from allocator.daemon.device.set_requests import SetRequests
from allocator.daemon.device.tier_requests import TierRequests, found_image
from allocator.daemon.journal.records import QuotaKept, Record
from allocator.daemon.weights.weight_set import Answer, ReplyTo, WeightSet
from allocator.messages import (
    Abandon,
    CheckIntegrity,
    Done,
    Evict,
    GetEvents,
    GetHoldings,
    GetRegions,
    GetSegments,
    GetShare,
    GetStatistics,
    Handle,
    Lease,
    LookUpBlocks,
    MakeRoom,
    Moved,
    Open,
    Pin,
    Progress,
    PutBlocks,
    Release,
    Reply,
    Request,
    Reserve,
    Return,
    Seal,
    SetQuota,
    Sleep,
    StillLoading,
    UnpinBlocks,
)

_RELIEVE_EVERY_S: Final = 1.0
"""So soon what nobody uses goes when others take of the device's memory, though nobody asks us."""
_PREFIX_CACHE_PART: Final = 8
"""Unless told otherwise, blocks that nobody pins take an eighth of host memory at most."""


@dataclass(frozen=True)
class Handler:
    """Of one type of request. `do` answers it, or returns None where the answer comes later; raises
    AllocatorError. `about_room`: it is answered by how much room there is. `unpins`: there may be
    more unpinned blocks than the prefix cache holds afterwards."""

    do: Callable[[Asked, Any], Reply | None]
    about_room: bool = False
    unpins: bool = False


class Device:
    """What one device's part of the daemon does."""

    def __init__(
        self,
        backend: Backend,
        host_tier: Backend,
        memory: DeviceMemory,
        around: Around,
        *,
        image_folder: Path,
        host_tier_limit: int | None,
        prefix_cache_limit: int | None = None,
        pool: Handle | None = None,
        num_adopted_sets: int = 0,
    ) -> None:
        """`pool` is one that was adopted. Blocks that nobody pins may take `prefix_cache_limit`
        bytes; None is all that the memory limit leaves, or where there is none, a part of host
        memory, which others need as well. Raises DeviceError."""
        if prefix_cache_limit is None and memory.limit_bytes is None and backend.device == "host":
            prefix_cache_limit = backend.limit_bytes() // _PREFIX_CACHE_PART
        self.backend = backend
        self.memory = memory
        self._sessions = around.sessions
        self._parts = parts = Parts(backend, host_tier, memory, pool, image_folder, around)
        self._pool = pool_ = PoolRequests(parts, prefix_cache_limit)
        sets, tiers = SetRequests(parts), TierRequests(parts, host_tier_limit)
        looking = Looking(parts, around, host_tier_limit, num_adopted_sets)
        self._relieve_at = 0.0
        self._may_wait: set[SessionId] = set()
        """Sessions whose last request is answered later, if it has not been since."""
        self._rows: Mapping[type[Request], Handler] = {
            # weight sets
            Open: Handler(sets.open),
            Reserve: Handler(sets.reserve, about_room=True),
            Progress: Handler(sets.progress),
            Seal: Handler(sets.seal, about_room=True),
            Abandon: Handler(sets.abandon),
            Release: Handler(sets.release),
            Evict: Handler(sets.evict),
            Pin: Handler(sets.pin),
            Sleep: Handler(tiers.sleep, about_room=True),
            Moved: Handler(tiers.moved),
            # the pool
            Lease: Handler(pool_.lease, about_room=True),
            MakeRoom: Handler(pool_.make_room),
            Return: Handler(pool_.give_back),
            PutBlocks: Handler(pool_.put),
            LookUpBlocks: Handler(pool_.look_up),
            UnpinBlocks: Handler(pool_.unpin, unpins=True),
            GetShare: Handler(pool_.share, about_room=True),
            # the device
            SetQuota: Handler(self._set_quota),
            CheckIntegrity: Handler(self._check),
            GetStatistics: Handler(looking.statistics, about_room=True),
            GetRegions: Handler(looking.regions),
            GetEvents: Handler(looking.events),
            GetHoldings: Handler(looking.holdings),
            GetSegments: Handler(looking.segments),
        }

    @property
    def name(self) -> str:
        """ "host", or "cuda:GPU-<UUID>"."""
        return self.backend.device

    @property
    def has_pool(self) -> bool:
        """Whether it holds a segment for leases."""
        return self._parts.pool.handle is not None

    # --- requests

    def dispatch(
        self, session: Session, reply_to: ReplyTo, request: Request, now: float
    ) -> Reply | None:
        """Do it. None where the answer comes later, and before the session's next. Raises
        AllocatorError."""
        self.stop_waiting(session)
        row, asked = self._rows[type(request)], Asked(session, reply_to, now)
        reply = self._with_room(row, asked, request) if row.about_room else row.do(asked, request)
        if reply is None:
            self._may_wait.add(session.number)
        else:
            self._parts.notes.changes(session.number, request, reply)
        if row.unpins:
            self._pool.shed()
        return reply

    def stop_waiting(self, session: Session) -> None:
        """Whatever this session waited for, it asks for something else now, or has to ask again: a
        client has one request on its way, and has given up those before."""
        if session.number not in self._may_wait:
            return
        self._may_wait.remove(session.number)
        for weight_set, waiter in self.memory.sets.given_up(session.number):
            self._parts.apply([Answer(waiter, self.still_loading(weight_set))])

    def _with_room(self, row: Handler, asked: Asked, request: Request) -> Reply | None:
        return self._parts.room.while_taking(asked.now, lambda: row.do(asked, request))

    def _set_quota(self, _asked: Asked, request: SetQuota) -> Done:
        kind, name, num_bytes = request.kind, request.name, request.num_bytes
        self.memory.set_quota((kind, name), num_bytes)
        kept = QuotaKept(device=self.name, kind=kind, name=name, num_bytes=num_bytes)
        self._parts.notes.note(kept, sync=True)
        return Done()

    def _check(self, _asked: Asked, _request: CheckIntegrity) -> Done:
        self.memory.check()
        return Done()

    # --- sessions

    def begin_session(self, session: Session) -> None:
        """A client of this device."""
        self.memory.begin_session(session.number, Holder(session.model, session.user))

    def end_session(self, session: Session, now: float) -> None:
        """All that it held comes back."""
        self._may_wait.discard(session.number)
        imaged = [
            (one.key, one.fingerprint)
            for one in self.memory.sets
            if one.writer == session.number and one.target_tier == "disk"
        ]
        effects, changed = self.memory.end_session(session.number, now)
        self._pool.end_session(session.number)
        for key, fingerprint in imaged:
            found_image(self._parts, key, fingerprint)
        for key in changed:
            self._parts.notes.set(key)
        self._parts.apply(effects)
        self._pool.shed()
        if imaged:
            self._parts.images.remove_leftovers(session.process)

    # --- as time goes by

    def relieve(self, now: float) -> None:
        """Give up what nobody uses where others have taken the memory that it lies in: before the
        kernel ends somebody for want of it."""
        if now < self._relieve_at:
            return
        self._relieve_at = now + _RELIEVE_EVERY_S
        self._parts.room.look(now)
        self._parts.apply(self.memory.relieve())

    def next_relief(self) -> float | None:
        """When `relieve` should be asked next; None where nothing could be given up."""
        idle = self.memory.sets.least_recently_used(owned=True) is not None
        return self._relieve_at if idle or self.memory.pool.evictable_bytes else None

    def still_loading(self, weight_set: WeightSet) -> StillLoading:
        """What a waiter whose time is up is told."""
        source = weight_set.highest
        total = weight_set.target or (source.handle if source is not None else None)
        return StillLoading(
            writer_pid=self._sessions.pid(weight_set.writer or 0),
            num_bytes=weight_set.written_bytes,
            total_bytes=total.num_bytes if total is not None else 0,
        )

    # --- beginning and end

    def find_images(self) -> None:
        """What sleeps on disk is there to be woken."""
        self._parts.images.remove_leftovers()
        for key, fingerprint, copy in self._parts.images.all():
            known = self.memory.sets.get(key)
            if known is None:
                self.memory.sets.restore(WeightSet(key, fingerprint, copies={"disk": copy}))
            elif known.fingerprint == fingerprint:
                self.memory.sets.found_image(key, copy)

    def records(self) -> Iterator[Record]:
        """All that the next daemon needs to know, as `Journal.rewrite` takes it. After those of the
        sessions."""
        for (kind, name), num_bytes in self.memory.quotas():
            yield QuotaKept(device=self.name, kind=kind, name=name, num_bytes=num_bytes)
        yield from self._parts.notes.records()

    def close(self) -> None:
        """Give every segment back; images stay."""
        for handle in self.memory.sets.handles():
            self._parts.segments.free(handle)
        self._parts.pool.close()
