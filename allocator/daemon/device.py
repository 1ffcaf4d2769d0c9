"""One device: its numbers, its backend and its journal, joined.

Owns what a request about memory does. Invariants: the backend holds exactly the segments that
`DeviceMemory` counts; a change is in the journal before its reply leaves; a refused request changes
nothing. Knows nothing of sockets.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from allocator.backends import Backend, for_handle
from allocator.backends.room import size
from allocator.daemon.budget import AnyEffect, DeviceMemory, Evicted, FreeExtent, Holder
from allocator.daemon.device_room import DeviceRoom
from allocator.daemon.events import History
from allocator.daemon.journal.records import (
    BlockGone,
    Note,
    QuotaKept,
    ReadersChanged,
    SetGone,
    SetKept,
)
from allocator.daemon.pool.device_pool import DevicePool
from allocator.daemon.sessions import Session
from allocator.daemon.weights.image_folder import ImageFolder
from allocator.daemon.weights.state import Answer, Discard, Free, ReplyTo, Waiter, WeightSet
from allocator.errors import (
    DeviceError,
    DiskError,
    InvalidMessage,
    NameTaken,
    OutOfDeviceMemory,
    RoomTaken,
    UnknownWeightSet,
)
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
    LowerTier,
    MakeRoom,
    Message,
    Moved,
    Open,
    Pin,
    Progress,
    PutBlocks,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    Return,
    Seal,
    Sealed,
    SetQuota,
    Sleep,
    StillLoading,
    UnpinBlocks,
)

log = logging.getLogger("onecopy.allocator")

_ABOUT_ROOM: Final = (Open, Reserve, Seal, Sleep, Lease, GetShare)
"""Requests that are answered by how much room there is."""
_POOL_SUFFIX: Final = "-pool"
"""Tells the pool's segment from those of weights where the kernel shows its name."""
_RELIEVE_EVERY_S: Final = 1.0
"""So soon what nobody uses goes when others take of the device's memory, though nobody asks us."""
_NAMES_TRIED: Final = 64
_PREFIX_CACHE_PART: Final = 8
"""Unless told otherwise, blocks that nobody pins take an eighth of host memory at most."""


@dataclass(frozen=True)
class Answers:
    """Where a device's words go: to the clients, and to the journal."""

    reply: Callable[[ReplyTo, int, Reply], None]
    """(whom to, session number, message)."""
    note: Note
    pid: Callable[[int], int]
    """Of a session number."""


class Device:
    """What one device's part of the daemon does."""

    def __init__(
        self,
        backend: Backend,
        host_tier: Backend,
        memory: DeviceMemory,
        names: Iterator[str],
        answers: Answers,
        history: History,
        *,
        image_folder: Path,
        host_tier_limit: int | None,
        prefix_cache_limit: int | None = None,
        pool: Handle | None = None,
    ) -> None:
        """`names` gives segment names that never repeat; `pool` is one that was adopted. Blocks
        that nobody pins may take `prefix_cache_limit` bytes; None is all that the memory limit
        leaves, or where there is none, a part of host memory, which others need as well. Raises
        DeviceError."""
        self.backend = backend
        self.host_tier = host_tier
        self.memory = memory
        self._names = names
        self._answers = answers
        self._history = history
        self._images = ImageFolder(image_folder)
        self.host_tier_limit = host_tier_limit
        self._prefix_cache_limit = prefix_cache_limit
        if prefix_cache_limit is None and memory.limit_bytes is None and backend.device == "host":
            self._prefix_cache_limit = backend.limit_bytes() // _PREFIX_CACHE_PART
        self._pool = DevicePool(
            backend,
            memory,
            self._make_pool,
            self._apply,
            self._note,
            pool,
        )
        self._pool.hold()
        self._room = DeviceRoom(backend, memory, lambda: self._pool.handle)
        self._relieve_at = 0.0
        self.num_adopted_sets = 0

    @property
    def name(self) -> str:
        """ "host", or "cuda:GPU-<UUID>"."""
        return self.backend.device

    @property
    def has_pool(self) -> bool:
        """Whether it holds a segment for leases."""
        return self._pool.handle is not None

    def find_images(self) -> None:
        """What sleeps on disk is there to be woken."""
        self._images.remove_leftovers()
        for key, fingerprint, copy in self._images.all():
            known = self.memory.sets.get(key)
            if known is None:
                self.memory.sets.restore(WeightSet(key, fingerprint, copies={"disk": copy}))
            elif known.fingerprint == fingerprint:
                self.memory.sets.found_image(key, copy)

    # --- sessions

    def begin_session(self, session: Session) -> None:
        """A client of this device."""
        self.memory.begin_session(session.number, Holder(session.model, session.user))

    def end_session(self, session: Session, now: float) -> None:
        """All that it held comes back."""
        imaged = [
            (one.key, one.fingerprint)
            for one in self.memory.sets
            if one.writer == session.number and one.target_tier == "disk"
        ]
        effects, changed = self.memory.end_session(session.number, now)
        self._pool.end_session(session.number)
        for key, fingerprint in imaged:
            self._find_image(key, fingerprint)
        for key in changed:
            self._note_set(key)
        self._apply(effects)
        self._shed()
        if imaged:
            self._images.remove_leftovers(session.process)

    def _find_image(self, key: str, fingerprint: Mapping[str, str]) -> None:
        """Whoever wrote it may have come to its end between the last byte and its word."""
        image = self._images.find(key, fingerprint)
        if image is not None:
            self.memory.sets.found_image(key, image)

    # --- requests

    def dispatch(
        self, session: Session, reply_to: ReplyTo, request: Request, now: float
    ) -> Reply | None:
        """Do it. None where the answer comes later. Raises AllocatorError."""
        if not isinstance(request, _ABOUT_ROOM):
            return self._do(session, reply_to, request, now)
        self._room.look(now)
        try:
            return self._do(session, reply_to, request, now)
        except OutOfDeviceMemory:
            if not self._room.look_again(now):
                raise
            return self._do(session, reply_to, request, now)

    def _do(
        self, session: Session, reply_to: ReplyTo, request: Request, now: float
    ) -> Reply | None:
        match request:
            case Open() | Reserve() | Progress() | Seal() | Abandon() | Release():
                return self._load(session, reply_to, request, now)
            case Evict() | Pin() | Sleep() | Moved():
                return self._move(session, reply_to, request, now)
            case MakeRoom(num_bytes=num_bytes):
                return self._make_room(session, num_bytes, now)
            case Lease() | Return() | PutBlocks() | LookUpBlocks() | UnpinBlocks() | GetShare():
                reply = self._pool.dispatch(session.number, request, now)
                if isinstance(request, UnpinBlocks):
                    self._shed()
                return reply
            case SetQuota(kind=kind, name=name, num_bytes=num_bytes):
                self.memory.set_quota((kind, name), num_bytes)
                self._note(
                    QuotaKept(device=self.name, kind=kind, name=name, num_bytes=num_bytes), True
                )
                return Done()
            case CheckIntegrity():
                self.memory.check()
                return Done()
            case GetStatistics() | GetRegions() | GetEvents() | GetHoldings() | GetSegments():
                raise InvalidMessage("these are the daemon's to answer")

    def look(self, now: float) -> None:
        """See how much room there is, for who asks."""
        self._room.look(now)

    def relieve(self, now: float) -> None:
        """Give up what nobody uses where others have taken the memory that it lies in: before the
        kernel ends somebody for want of it."""
        if now < self._relieve_at:
            return
        self._relieve_at = now + _RELIEVE_EVERY_S
        self._room.look(now)
        self._apply(self.memory.relieve())

    def next_relief(self) -> float | None:
        """When `relieve` should be asked next; None where nothing could be given up."""
        idle = self.memory.sets.least_recently_used(owned=True) is not None
        return self._relieve_at if idle or self.memory.pool.evictable_bytes else None

    def still_loading(self, weight_set: WeightSet) -> StillLoading:
        """What a waiter whose time is up is told."""
        source = weight_set.highest
        total = weight_set.target or (source.handle if source is not None else None)
        return StillLoading(
            writer_pid=self._answers.pid(weight_set.writer or 0),
            num_bytes=weight_set.written_bytes,
            total_bytes=total.num_bytes if total is not None else 0,
        )

    def _shed(self) -> None:
        """Nobody needs more unpinned blocks than the prefix cache may hold."""
        if self._prefix_cache_limit is not None:
            self._apply(self.memory.evict_blocks(self._prefix_cache_limit))

    def _make_room(self, session: Session, num_bytes: int, now: float) -> Done:
        """The device refused to commit what fits by our count: others use it, and may use other
        bounds than we see. Raises RoomTaken, OutOfDeviceMemory."""
        self._room.look_anew(now)
        memory = self.memory
        effects = memory.relieve()
        freed = sum(effect.num_bytes for effect in effects if isinstance(effect, Evicted))
        while freed < num_bytes and (evicted := memory.evict_one(owned=True)):
            freed += sum(one.num_bytes for one in evicted if isinstance(one, Evicted))
            effects += evicted
        self._apply(effects)
        self._room.look_anew(now)
        if effects or not memory.overdrawn_bytes:
            return Done()
        problem = memory.shortage(num_bytes)
        if self._pool.lacks_room(session.number, now):
            raise RoomTaken(problem)
        raise OutOfDeviceMemory(problem)

    # --- weight sets

    def _load(
        self,
        session: Session,
        reply_to: ReplyTo,
        request: Open | Reserve | Progress | Seal | Abandon | Release,
        now: float,
    ) -> Reply | None:
        sets, number, key = self.memory.sets, session.number, request.key
        match request:
            case Open(fingerprint=fingerprint, wait_ms=wait_ms):
                image = None
                if fingerprint is not None and sets.get(key) is None:
                    image = self._images.find(key, fingerprint)
                sleeping = sets.sleeping_in_host_memory(key, fingerprint)
                if sleeping is not None and self._shares_host_memory:
                    self._rise(session, sleeping)
                answer = sets.open(number, key, fingerprint, image)
                if answer is None:
                    sets.wait(key, Waiter(number, reply_to, now + wait_ms / 1000))
                    return None
                if isinstance(answer, Sealed) and sleeping is None:
                    self._note_reader(key, number, 1)
                else:
                    self._charge(key, session)
                    self._note_set(key)
                return answer
            case Reserve(generation=generation, num_bytes=num_bytes):
                return self._reserve(session, key, generation, num_bytes)
            case Progress(generation=generation, num_bytes=num_bytes):
                sets.progress(number, key, generation, num_bytes)
                return Done()
            case Seal():
                return self._seal(session, request)
            case Abandon(generation=generation, discard_source=discard):
                weight_set = sets.writing(number, key, generation)
                moved_to = weight_set.target_tier
                effects = sets.abandon(number, key, generation, discard_source=discard)
                if moved_to == "disk":
                    self._find_image(key, weight_set.fingerprint)
                self._note_set(key)
                self._apply(effects)
                return Done()
            case Release(generation=generation):
                sets.release(number, key, generation, now)
                self._note_reader(key, number, -1)
                return Done()

    def _charge(self, key: str, session: Session) -> None:
        weight_set = self.memory.sets.get(key)
        if weight_set is not None and weight_set.writer == session.number:
            weight_set.model = weight_set.model or session.model
            weight_set.user = weight_set.user or session.user

    def _reserve(self, session: Session, key: str, generation: int, num_bytes: int) -> Reserved:
        self.memory.sets.may_reserve(session.number, key, generation)
        self._apply(self.memory.make_room(session.number, num_bytes))
        handle = self._made(self.backend, num_bytes, generation, self._reserve_segment)
        self.memory.sets.reserve(session.number, key, handle)
        self._note_set(key)
        self._history.add(
            "reserved", f"{size(num_bytes)} for {key}, written by process {session.process.pid}"
        )
        return Reserved(handle=handle)

    def _reserve_segment(self, handle: Handle) -> None:
        """Others use the device as well, so it can be short below our limit: what nobody uses goes
        then, unless even an otherwise empty device could not hold the segment."""
        in_vain = handle.num_bytes > self.backend.limit_bytes()
        outstanding = self._room.outstanding_bytes()
        while True:
            try:
                self.backend.reserve(
                    handle.segment, handle.num_bytes, outstanding_bytes=outstanding
                )
            except OutOfDeviceMemory:
                effects = [] if in_vain else self.memory.evict_one(owned=True)
                if not effects:
                    raise
                self._apply(effects)
            else:
                return

    def _seal(self, session: Session, seal: Seal) -> Reply:
        sets = self.memory.sets
        weight_set = sets.sealable(
            session.number, seal.key, seal.generation, seal.manifest, in_place=seal.in_place
        )
        for file in seal.files:
            if not _is_as_described(file):
                raise InvalidMessage(f"{file.segment!r} is not the file that the writer describes")
        extra = sum(file.num_bytes for file in seal.files)
        if seal.in_place:
            extra += weight_set.copies["disk"].handle.num_bytes
        if extra:
            self._apply(self.memory.make_room(session.number, 0, mapped_bytes=extra))
        if weight_set.target is not None:
            self.backend.seal(weight_set.target.segment)
        woken = bool(weight_set.copies)
        sealed, effects = sets.seal(
            session.number,
            seal.key,
            seal.generation,
            seal.manifest,
            seal.manifest_digest,
            files=seal.files,
            in_place=seal.in_place,
        )
        self._note_set(seal.key)
        self._apply(effects)
        how = "woken" if woken else "sealed"
        self._history.add(how, f"{seal.key}, {size(weight_set.num_bytes('device'))}")
        return sealed

    # --- tiers

    def _move(
        self, session: Session, reply_to: ReplyTo, request: Evict | Pin | Sleep | Moved, now: float
    ) -> Reply | None:
        sets, key = self.memory.sets, request.key
        match request:
            case Evict(image=with_image):
                imaged = sets.evictable(key).copies.get("disk")
                if with_image and imaged is not None and self._images.discard(imaged.handle):
                    # First: that may be refused, and then nothing has changed.
                    self._history.add("discarded", f"the image {imaged.handle.segment}")
                self._apply(sets.evict(key, image=with_image))
                self._history.add("evicted", f"{key}, as asked")
            case Pin(pinned=pinned):
                sets.pin(key, pinned)
            case Sleep(tier=tier, wait_ms=wait_ms):
                return self._sleep(session, reply_to, key, tier, now + wait_ms / 1000)
            case Moved(generation=generation):
                weight_set = sets.writing(session.number, key, generation)
                image = None
                if weight_set.target_tier == "disk":
                    image = self._images.written(key, weight_set.fingerprint)
                elif weight_set.target_tier == "host" and weight_set.target is not None:
                    self.host_tier.seal(weight_set.target.segment)
                effects = sets.moved(session.number, key, generation, image)
                self._note_set(key)
                self._apply(effects)
                self._history.add("asleep", f"{key}, on the {weight_set.tier} tier")
        self._note_set(key)
        return Done()

    def _sleep(
        self, session: Session, reply_to: ReplyTo, key: str, tier: LowerTier, deadline: float
    ) -> Reply | None:
        sets = self.memory.sets
        step, effects = sets.sleep(key, tier)
        if step == "copy" and tier == "host" and self._shares_host_memory:
            self._check_host_tier(sets.num_bytes_of(key))
            sets.relabel(key, "host")
            self._note_set(key)
            self._history.add("asleep", f"{key}, on the host tier")
            return Done()
        if step == "wait":
            sets.wait(key, Waiter(session.number, reply_to, deadline, opens=False))
            return None
        if step == "asleep":
            self._note_set(key)
            self._apply(effects)
            return Done()
        weight_set = sets.get(key)
        if weight_set is None or weight_set.highest is None:
            raise UnknownWeightSet(f"no weight set is called {key!r}")
        target = None
        if tier == "host":
            num_bytes = weight_set.highest.handle.num_bytes
            self._check_host_tier(num_bytes)
            outstanding = self._room.outstanding_bytes(self.host_tier)
            target = self._made(
                self.host_tier,
                num_bytes,
                0,
                lambda handle: self.host_tier.reserve(
                    handle.segment, num_bytes, outstanding_bytes=outstanding
                ),
            )
        moving = sets.move(session.number, key, tier, target, str(self._images.path))
        self._note_set(key)
        return moving

    def _check_host_tier(self, num_bytes: int) -> None:
        used = self.memory.sets.num_bytes("host")
        if self.host_tier_limit is not None and used + num_bytes > self.host_tier_limit:
            raise OutOfDeviceMemory(
                f"{size(num_bytes)} are to sleep in host memory, but the host tier may hold "
                f"{size(self.host_tier_limit)} and holds {size(used)}: sleep to disk (level 2), or "
                "raise --host-tier-limit."
            )

    def _rise(self, session: Session, weight_set: WeightSet) -> None:
        """A set that sleeps in the very memory that the device has is awake once it counts."""
        num_bytes = weight_set.num_bytes("host")  # its memory is committed already
        self._apply(self.memory.make_room(session.number, 0, mapped_bytes=num_bytes))
        self.memory.sets.relabel(weight_set.key, "device")
        self._history.add("woken", f"{weight_set.key}, {size(weight_set.num_bytes('device'))}")

    @property
    def _shares_host_memory(self) -> bool:
        return self.backend.name == self.host_tier.name

    # --- the end

    def close(self) -> None:
        """Give every segment back; images stay."""
        for handle in self.memory.sets.handles():
            self._free(handle)
        self._pool.close()

    # --- effects

    def _apply(self, effects: Iterable[AnyEffect]) -> None:
        """Let them happen. What they follow from is in the journal already, evictions aside."""
        for effect in effects:
            match effect:
                case Free(handle=handle):
                    self._free(handle)
                case FreeExtent(extent=extent):
                    self._pool.free_extent(extent)
                case Discard(handle=handle):
                    self._discard(handle)
                case Evicted(key="", digest=digest):
                    self._note(BlockGone(device=self.name, digest=digest))
                case Evicted(key=key, num_bytes=num_bytes):
                    self._note_set(key)
                    self._history.add("evicted", f"{key}, {size(num_bytes)}, to make room")
                case Answer(waiter=waiter, message=message):
                    self._answers.reply(waiter.reply_to, waiter.session, message)

    def _discard(self, image: Handle) -> None:
        """Nobody finds it any more, even if its file stays."""
        try:
            if self._images.discard(image):
                self._history.add("discarded", f"the image {image.segment}")
        except DiskError as error:
            self._images.give_up(image)
            self._history.add("disk", str(error))

    def _free(self, handle: Handle) -> None:
        if handle.backend == self.backend.name:
            self.backend.free(handle.segment)
        elif handle.backend == self.host_tier.name:
            self.host_tier.free(handle.segment)

    def _make_pool(self, num_bytes: int) -> Handle:
        return self._made(
            self.backend,
            num_bytes,
            0,
            lambda handle: self._reserve_pool(handle.segment, num_bytes),
            _POOL_SUFFIX,
        )

    def _reserve_pool(self, segment: str, num_bytes: int) -> None:
        self.backend.reserve_pool(segment, num_bytes)
        try:
            self.backend.hold_pool(segment)
        except DeviceError:
            self.backend.free(segment)
            raise

    def _made(
        self,
        backend: Backend,
        num_bytes: int,
        generation: int,
        reserve: Callable[[Handle], None],
        suffix: str = "",
    ) -> Handle:
        """A segment that `reserve` has made. Other users of the machine may make files where ours
        should be; a name that is taken is passed over. Raises as `reserve` does."""
        for _ in range(_NAMES_TRIED):
            handle = self._handle(backend, num_bytes, generation, suffix)
            try:
                reserve(handle)
            except NameTaken as error:
                log.warning("%s", error)
            else:
                return handle
        raise DeviceError("the names of our segments are all taken by files of other users")

    def _handle(
        self, backend: Backend, num_bytes: int, generation: int, suffix: str = ""
    ) -> Handle:
        return Handle(
            backend=backend.name,
            device=backend.device,
            segment=next(self._names) + suffix,
            num_bytes=num_bytes,
            generation=generation,
            placement=backend.placement,
        )

    # --- the journal

    def _note(self, record: Message, sync: bool = False) -> None:
        self._answers.note(record, sync=sync)

    def _note_reader(self, key: str, session: int, delta: int) -> None:
        self._note(ReadersChanged(device=self.name, key=key, session=session, delta=delta))

    def _note_set(self, key: str) -> None:
        weight_set = self.memory.sets.get(key)
        if weight_set is None:
            self._note(SetGone(device=self.name, key=key))
        else:
            self._note(self._set_record(weight_set))

    def _set_record(self, s: WeightSet) -> SetKept:
        handles = [handle for copy in s.copies.values() for handle in (copy.handle, *copy.files)]
        handles += [s.target] if s.target is not None else []
        return SetKept(
            device=self.name,
            key=s.key,
            fingerprint=dict(s.fingerprint),
            model=s.model,
            user=s.user,
            generation=s.generation,
            copies=s.copies,
            writer=s.writer,
            target_tier=s.target_tier,
            target=s.target,
            identities={handle.segment: self.identity(handle) for handle in handles},
            readers=dict(s.readers),
            pinned=s.pinned,
        )

    def handed_out(self) -> Iterator[tuple[str, Handle]]:
        """(key of the set, handle) of all that clients may map; the key of the pool's segment is
        ""."""
        for weight_set in self.memory.sets:
            handles = [h for copy in weight_set.copies.values() for h in (copy.handle, *copy.files)]
            handles += [weight_set.target] if weight_set.target is not None else []
            for handle in handles:
                yield weight_set.key, handle
        if self._pool.handle is not None:
            yield "", self._pool.handle

    def identity(self, handle: Handle) -> str:
        """Which segment that is, as the next daemon will ask again."""
        if handle.backend == "file":
            return handle.identity
        backend = self.backend if handle.backend == self.backend.name else self.host_tier
        return backend.identity(handle.segment)

    def records(self) -> Iterator[Message]:
        """All that the next daemon needs to know, as `Journal.rewrite` takes it. After those of the
        sessions."""
        for weight_set in self.memory.sets:
            yield self._set_record(weight_set)
        for (kind, name), num_bytes in self.memory.quotas():
            yield QuotaKept(device=self.name, kind=kind, name=name, num_bytes=num_bytes)
        yield from self._pool.records()


def _is_as_described(file: Handle) -> bool:
    """Whether a handle names a file of the identity that it tells, and no more of it than there
    is."""
    if file.backend != "file" or not file.segment.startswith("/") or "\0" in file.segment:
        return False
    identity = for_handle(file).identity(file.segment)
    if not identity or identity != file.identity:
        return False
    try:
        return file.num_bytes <= Path(file.segment).lstat().st_size
    except OSError:
        return False
