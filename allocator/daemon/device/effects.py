"""What follows from a decision about a device's memory: done for each kind of effect, in order.

Owns the doing: the journal and people hear of what was given up, memory goes back, images are
deleted, whoever waited is answered. Invariant: an extent is free for others only once its memory
was taken back or is known to be unclean.
"""

from collections.abc import Callable, Iterable

from allocator.backends.room import size
from allocator.daemon.device.eviction import AnyEffect, Evicted, FreeExtent
from allocator.daemon.device.notes import Notes
from allocator.daemon.device.segments import PoolSegment, Segments
from allocator.daemon.journal.history import History
from allocator.daemon.journal.records import BlockGone
from allocator.daemon.weights.image_folder import ImageFolder
from allocator.daemon.weights.weight_set import Answer, Discard, Free, ReplyTo
from allocator.errors import DiskError
from allocator.messages import Handle, Reply


class Effects:
    """What follows, for one device. What it follows from is in the journal already, evictions
    aside."""

    def __init__(
        self,
        segments: Segments,
        pool: PoolSegment,
        images: ImageFolder,
        notes: Notes,
        history: History,
        reply: Callable[[ReplyTo, int, Reply], None],
    ) -> None:
        self._segments = segments
        self._pool = pool
        self._images = images
        self._notes = notes
        self._history = history
        self._reply = reply

    def apply(self, effects: Iterable[AnyEffect]) -> None:
        """Let them happen, in their order."""
        for effect in effects:
            match effect:
                case Evicted(key="", digest=digest):
                    self._notes.note(BlockGone(device=self._notes.device, digest=digest))
                case Evicted(key=key, num_bytes=num_bytes):
                    self._notes.set(key)
                    self._history.add("evicted", f"{key}, {size(num_bytes)}, to make room")
                case Free(handle=handle):
                    self._segments.free(handle)
                case FreeExtent(extent=extent):
                    self._pool.free(extent)
                case Discard(handle=handle):
                    self._discard(handle)
                case Answer(waiter=waiter, message=message):
                    self._notes.changes(waiter.session, waiter.request, message)
                    self._reply(waiter.reply_to, waiter.session, message)

    def _discard(self, image: Handle) -> None:
        """Nobody finds it any more, even if its file stays."""
        try:
            if self._images.discard(image):
                self._history.add("discarded", f"the image {image.segment}")
        except DiskError as error:
            self._images.give_up(image)
            self._history.add("disk", str(error))
