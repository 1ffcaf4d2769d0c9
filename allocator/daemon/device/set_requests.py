"""What the requests on a device's weight sets do: join, write, seal, leave, evict, pin.

Owns their handlers; those that move a set between tiers are in `tier_requests`. Invariants: a
change is in the journal before its effects happen; a refused request changes nothing.
"""

from pathlib import Path

from allocator.backends import for_handle
from allocator.backends.room import size
from allocator.daemon.device.parts import Asked, Parts
from allocator.daemon.device.tier_requests import found_image
from allocator.daemon.weights.weight_set import Waiter, WeightSet
from allocator.errors import InvalidMessage, OutOfDeviceMemory
from allocator.messages import (
    Abandon,
    Done,
    Elected,
    Evict,
    Handle,
    Open,
    Pin,
    Progress,
    Release,
    Reserve,
    Reserved,
    Seal,
    Sealed,
)


class SetRequests:
    """Of one device."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._memory = parts.memory
        self._sets = parts.memory.sets

    # --- joining and leaving

    def open(self, asked: Asked, request: Open) -> Elected | Sealed | None:
        """Read, or write, or wait for who writes."""
        sets, key, fingerprint = self._sets, request.key, request.fingerprint
        image = None
        if fingerprint is not None and sets.get(key) is None:
            image = self._parts.images.find(key, fingerprint)
        sleeping = sets.sleeping_in_host_memory(key, fingerprint)
        if sleeping is not None and self._parts.segments.shares_host_memory:
            self._rise(asked, sleeping)
        answer = sets.open(asked.number, key, fingerprint, image)
        if answer is None:
            deadline = asked.now + request.wait_ms / 1000
            sets.wait(key, Waiter(asked.number, asked.reply_to, deadline, request))
            return None
        if isinstance(answer, Elected):
            self._charge(key, asked)
            self._parts.notes.set(key)
        return answer

    def _rise(self, asked: Asked, weight_set: WeightSet) -> None:
        """A set that sleeps in the very memory that the device has is awake once it counts."""
        key, num_bytes = weight_set.key, weight_set.num_bytes("host")  # committed already
        room = self._parts.room
        self._parts.apply(
            room.while_taking(
                asked.now,
                lambda: self._memory.make_room(asked.number, 0, mapped_bytes=num_bytes),
            )
        )
        self._sets.relabel(key, "device")
        self._parts.notes.set(key)
        self._parts.history.add("woken", f"{key}, {size(weight_set.num_bytes('device'))}")

    def _charge(self, key: str, asked: Asked) -> None:
        weight_set = self._sets.get(key)
        if weight_set is not None and weight_set.writer == asked.number:
            weight_set.model = weight_set.model or asked.session.model
            weight_set.user = weight_set.user or asked.session.user

    def release(self, asked: Asked, request: Release) -> Done:
        """One reader less; the set may be idle now."""
        self._sets.release(asked.number, request.key, request.generation, asked.now)
        return Done()

    # --- writing

    def reserve(self, asked: Asked, request: Reserve) -> Reserved:
        """The writer's one segment."""
        key, num_bytes = request.key, request.num_bytes
        self._sets.may_reserve(asked.number, key, request.generation)
        self._parts.apply(self._memory.make_room(asked.number, num_bytes))
        handle = self._parts.segments.made(
            self._parts.backend, num_bytes, self._reserve_segment, generation=request.generation
        )
        self._sets.reserve(asked.number, key, handle)
        self._parts.notes.set(key)
        who = f"written by process {asked.session.process.pid}"
        self._parts.history.add("reserved", f"{size(num_bytes)} for {key}, {who}")
        return Reserved(handle=handle)

    def _reserve_segment(self, handle: Handle) -> None:
        """Others use the device as well, so it can be short below our limit: what nobody uses goes
        then, unless even an otherwise empty device could not hold the segment."""
        backend = self._parts.backend
        in_vain = handle.num_bytes > backend.limit_bytes()
        outstanding = self._parts.room.outstanding_bytes()
        while True:
            try:
                backend.reserve(handle.segment, handle.num_bytes, outstanding_bytes=outstanding)
            except OutOfDeviceMemory:
                effects = [] if in_vain else self._memory.eviction.one(owned=True)
                if not effects:
                    raise
                self._parts.apply(effects)
            else:
                return

    def progress(self, asked: Asked, request: Progress) -> Done:
        """Those who wait see it."""
        self._sets.progress(asked.number, request.key, request.generation, request.num_bytes)
        return Done()

    def seal(self, asked: Asked, seal: Seal) -> Sealed:
        """Read-only from now on, and everybody's who waits."""
        parts, sets = self._parts, self._sets
        weight_set = sets.sealable(
            asked.number, seal.key, seal.generation, seal.manifest, in_place=seal.in_place
        )
        for file in seal.files:
            if not _is_as_described(file):
                raise InvalidMessage(f"{file.segment!r} is not the file that the writer describes")
        extra = sum(file.num_bytes for file in seal.files)
        if seal.in_place:
            extra += weight_set.copies["disk"].handle.num_bytes
        if extra:
            parts.apply(self._memory.make_room(asked.number, 0, mapped_bytes=extra))
        if weight_set.target is not None:
            parts.backend.seal(weight_set.target.segment)
        woken = bool(weight_set.copies)
        sealed, effects = sets.seal(
            asked.number,
            seal.key,
            seal.generation,
            seal.manifest,
            seal.manifest_digest,
            files=seal.files,
            in_place=seal.in_place,
        )
        parts.notes.set(seal.key)
        parts.apply(effects)
        how = "woken" if woken else "sealed"
        parts.history.add(how, f"{seal.key}, {size(weight_set.num_bytes('device'))}")
        return sealed

    def abandon(self, asked: Asked, request: Abandon) -> Done:
        """The next who waits writes."""
        sets, key = self._sets, request.key
        weight_set = sets.writing(asked.number, key, request.generation)
        moved_to = weight_set.target_tier
        effects = sets.abandon(
            asked.number, key, request.generation, discard_source=request.discard_source
        )
        if moved_to == "disk":
            found_image(self._parts, key, weight_set.fingerprint)
        self._parts.notes.set(key)
        self._parts.apply(effects)
        return Done()

    # --- as people ask

    def evict(self, _asked: Asked, request: Evict) -> Done:
        """An idle or sleeping set goes, and with `image` what sleeps on disk."""
        parts, key = self._parts, request.key
        imaged = self._sets.evictable(key).copies.get("disk")
        if request.image and imaged is not None and parts.images.discard(imaged.handle):
            # First: that may be refused, and then nothing has changed.
            parts.history.add("discarded", f"the image {imaged.handle.segment}")
        effects = self._sets.evict(key, image=request.image)
        parts.notes.set(key)
        parts.apply(effects)
        parts.history.add("evicted", f"{key}, as asked")
        return Done()

    def pin(self, _asked: Asked, request: Pin) -> Done:
        """A pinned set is not given up to make room."""
        self._sets.pin(request.key, request.pinned)
        self._parts.notes.set(request.key)
        return Done()


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
