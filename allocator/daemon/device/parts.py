"""What the handlers of a device's requests work with, and what they are asked.

Owns how the parts of one device are put together. Invariant: the backend holds exactly the segments
that `DeviceMemory` counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from allocator.backends import Backend
from allocator.daemon.clients.sessions import Session, Sessions
from allocator.daemon.device.budget import DeviceMemory
from allocator.daemon.device.device_room import DeviceRoom
from allocator.daemon.device.effects import Effects
from allocator.daemon.device.notes import Notes
from allocator.daemon.device.segments import PoolSegment, Segments
from allocator.daemon.journal.history import History
from allocator.daemon.journal.records import Note
from allocator.daemon.weights.image_folder import ImageFolder
from allocator.daemon.weights.weight_set import ReplyTo
from allocator.messages import Handle, Reply


@dataclass(frozen=True)
class Asked:
    """Who asks, when, and where an answer that comes later is to go."""

    session: Session
    reply_to: ReplyTo
    now: float

    @property
    def number(self) -> int:
        """The session's."""
        return self.session.number


@dataclass(frozen=True)
class Around:
    """What the daemon has beside its devices, as they use it."""

    began: float
    """When it did."""
    sessions: Sessions
    history: History
    names: Iterator[str]
    """Of segments; none comes twice."""
    note: Note
    """Into the journal."""
    reply: Callable[[ReplyTo, int, Reply], None]
    """(whom to, session number, message)."""


class Parts:
    """Of one device."""

    def __init__(
        self,
        backend: Backend,
        host_tier: Backend,
        memory: DeviceMemory,
        pool: Handle | None,
        image_folder: Path,
        around: Around,
    ) -> None:
        """`pool` is one that was adopted. Raises DeviceError."""
        self.backend = backend
        self.host_tier = host_tier
        self.memory = memory
        self.history = around.history
        self.images = ImageFolder(image_folder)
        self.segments = Segments(backend, host_tier, around.names)
        self.pool = PoolSegment(self.segments, pool)
        self.room = DeviceRoom(backend, memory, lambda: self.pool.handle)
        self.notes = Notes(
            memory.sets, memory.pool, self.segments, self.pool, around.note, around.sessions
        )
        self._effects = Effects(
            self.segments, self.pool, self.images, self.notes, around.history, around.reply
        )
        self.apply = self._effects.apply
