"""What a client does where the kernel refuses memory that the allocator has promised.

Owns the asking. Invariant: it ends, however quickly others take what is made free. Knows nothing of
what is being committed.
"""

from typing import Final

from allocator import messages
from allocator.client.session.connection import Connection
from allocator.errors import SharedMemoryFull

_MOST_TRIES: Final = 16


class Shortage:
    """One commit's way out: the allocator gives up what nobody uses, and the commit is tried
    again."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._num_tries = 0

    def __call__(self, error: SharedMemoryFull) -> None:
        """Returns where room was made. Raises OutOfDeviceMemory, RoomTaken where none could be,
        AllocatorGone."""
        self._num_tries += 1
        if self._num_tries > _MOST_TRIES:
            raise error
        request = messages.MakeRoom(num_bytes=max(1, error.num_bytes))
        self._connection.request(request, messages.Done)
