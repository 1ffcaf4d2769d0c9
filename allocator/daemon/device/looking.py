"""A device's state as messages, for people and programs that look at it.

Owns the handlers of requests that only look, and the bounds that keep their answers within a frame.
Invariant: looking changes nothing.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from msgspec.structs import replace

from allocator.daemon.clients.sessions import Session, Sessions
from allocator.daemon.device.budget import DeviceMemory
from allocator.daemon.device.parts import Around, Asked, Parts
from allocator.daemon.weights.weight_set import WeightSet
from allocator.messages import (
    MAX_BYTES,
    MAX_FRAME_BYTES,
    BlockHeld,
    Events,
    GetEvents,
    GetHoldings,
    GetRegions,
    GetSegments,
    GetStatistics,
    Handle,
    Holdings,
    Region,
    Regions,
    SegmentHandedOut,
    Segments,
    SessionStatistics,
    SetHeld,
    Statistics,
    WeightSetStatistics,
    encode,
)

_MAX_SETS: Final = 500
_MAX_READERS: Final = 1000
_MAX_FILES: Final = 64
_MAX_SESSIONS: Final = 1000
_MAX_QUOTAS: Final = 500
_MAX_REGIONS: Final = 4096
_SETS_A_PAGE: Final = 200
_EXTENTS_A_PAGE: Final = 4000
_SEGMENTS_A_PAGE: Final = 100
"""Each names a path, which can be long."""


class Looking:
    """At one device."""

    def __init__(
        self,
        parts: Parts,
        around: Around,
        host_tier_limit: int | None,
        num_adopted_sets: int,
    ) -> None:
        self._parts = parts
        self._memory = parts.memory
        self._around = around
        self._host_tier_limit = host_tier_limit
        self._num_adopted_sets = num_adopted_sets

    def statistics(self, asked: Asked, _request: GetStatistics) -> Statistics:
        """Everything in one picture; the lists end where a frame would."""
        share = 1
        while True:
            statistics = self._statistics(asked.now, share)
            if len(encode(statistics)) <= MAX_FRAME_BYTES:
                return statistics
            share *= 2  # names can be long: of every list only a part, then

    def _statistics(self, now: float, share: int) -> Statistics:
        """With lists of 1/`share` of the length that would usually fit."""
        memory, sets, sessions = self._memory, self._memory.sets, self._around.sessions
        name = self._parts.backend.device
        ours = [session for session in sessions if session.device == name]
        return Statistics(
            pid=os.getpid(),
            uptime_s=now - self._around.began,
            device=name,
            limit_bytes=memory.bound_bytes,
            used_bytes=memory.used_bytes,
            weights_bytes=sets.num_bytes("device"),
            host_tier_bytes=sets.num_bytes("host"),
            host_tier_limit_bytes=min(
                self._host_tier_limit or MAX_BYTES, self._parts.host_tier.limit_bytes()
            ),
            num_sessions=len(ours),
            num_adopted_sets=self._num_adopted_sets,
            num_evictions=memory.eviction.num_sets,
            num_events=self._around.history.num_events,
            weight_sets=tuple(
                _weight_set(one, sessions, now, share) for one in islice(sets, _MAX_SETS // share)
            ),
            sessions=tuple(_sessions(memory, ours[: _MAX_SESSIONS // share])),
            pool=memory.pool.statistics(),
            quotas=memory.quota_statistics()[: _MAX_QUOTAS // share],
        )

    def regions(self, _asked: Asked, _request: GetRegions) -> Regions:
        """The device's pool by offset."""
        pool, sessions = self._memory.pool, self._around.sessions
        found: list[Region] = []
        truncated = False
        for region in pool.regions():
            if len(found) == _MAX_REGIONS:
                truncated = True
                break
            pid = sessions.pid(region.holder) if region.holder else 0
            found.append(Region(region.offset, region.num_bytes, region.kind, region.holder, pid))
        return Regions(total_bytes=pool.total_bytes, regions=tuple(found), truncated=truncated)

    def holdings(self, asked: Asked, request: GetHoldings) -> Holdings:
        """What the session that asks holds of the device, one page of it."""
        number, pool, page = asked.number, self._memory.pool, request.page
        sets = [
            SetHeld(one.key, one.generation, one.readers[number], one.writer == number)
            for one in self._memory.sets
            if one.readers[number] or one.writer == number
        ]
        leases, pins = pool.leases_of(number), pool.pins_of(number)
        first_set, first = page * _SETS_A_PAGE, page * _EXTENTS_A_PAGE
        return Holdings(
            sets=tuple(sets[first_set : first_set + _SETS_A_PAGE]),
            leases=tuple(leases[first : first + _EXTENTS_A_PAGE]),
            blocks=tuple(BlockHeld(*pin) for pin in pins[first : first + _EXTENTS_A_PAGE]),
            more=len(sets) > first_set + _SETS_A_PAGE
            or max(len(leases), len(pins)) > first + _EXTENTS_A_PAGE,
        )

    def segments(self, _asked: Asked, request: GetSegments) -> Segments:
        """What clients of the device may map, one page of it."""
        found, first = list(self._handed_out()), request.page * _SEGMENTS_A_PAGE
        identity = self._parts.segments.identity
        return Segments(
            segments=tuple(
                SegmentHandedOut(key=key, handle=replace(handle, identity=identity(handle)))
                for key, handle in found[first : first + _SEGMENTS_A_PAGE]
            ),
            more=len(found) > first + _SEGMENTS_A_PAGE,
        )

    def events(self, _asked: Asked, request: GetEvents) -> Events:
        """What happened after a certain one."""
        return Events(events=self._around.history.after(request.after))

    def _handed_out(self) -> Iterator[tuple[str, Handle]]:
        """(key of the set, handle); the key of the pool's segment is ""."""
        for weight_set in self._memory.sets:
            for handle in weight_set.mapped():
                yield weight_set.key, handle
        if self._parts.pool.handle is not None:
            yield "", self._parts.pool.handle


def _weight_set(
    weight_set: WeightSet, sessions: Sessions, now: float, share: int
) -> WeightSetStatistics:
    writer = weight_set.writer
    copy = weight_set.highest
    handle = copy.handle if copy is not None else weight_set.target
    return WeightSetStatistics(
        key=weight_set.key,
        state=weight_set.state,
        tier=weight_set.tier,
        generation=weight_set.generation,
        segment=handle.segment if handle is not None else "",
        files=tuple(
            (file.segment, file.num_bytes)
            for file in (copy.files[: _MAX_FILES // share] if copy is not None else ())
        ),
        num_bytes=weight_set.num_bytes(weight_set.tier),
        written_bytes=weight_set.written_bytes,
        writer_pid=sessions.pid(writer) if writer is not None else None,
        reader_pids=tuple(
            sessions.pid(number)
            for number in islice(weight_set.readers.elements(), _MAX_READERS // share)
        ),
        idle_s=now - weight_set.idle_since if weight_set.state == "idle" else 0.0,
        pinned=weight_set.pinned,
        model=weight_set.model,
        user=weight_set.user,
        has_image="disk" in weight_set.copies,
    )


def _sessions(memory: DeviceMemory, sessions: Iterable[Session]) -> Iterable[SessionStatistics]:
    for session in sessions:
        leased_bytes, num_leases, num_pinned = memory.pool.held(session.number)
        yield SessionStatistics(
            number=session.number,
            pid=session.process.pid,
            label=session.label,
            model=session.model,
            user=session.user,
            leased_bytes=leased_bytes,
            num_leases=num_leases,
            num_pinned_blocks=num_pinned,
            adopted=session.adopted,
        )
