"""What happened, for people: a bounded history with numbers that never repeat.

Owns the history. Invariant: an event is kept until `capacity` newer ones came. Knows nothing of
what the events are about.
"""

import logging
import time
from collections import deque

from allocator.messages import Event

log = logging.getLogger("onecopy.allocator")


class History:
    """The last `capacity` events."""

    def __init__(self, capacity: int = 1000) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)
        self.num_events = 0

    def add(self, kind: str, text: str) -> None:
        """Note it, and log it."""
        self.num_events += 1
        event = Event(number=self.num_events, time_s=time.time(), kind=kind, text=text[:2000])
        self._events.append(event)
        log.info("%s: %s", kind, text)

    def after(self, number: int, limit: int = 200) -> tuple[Event, ...]:
        """Those with a higher number, at most the latest `limit`."""
        return tuple([event for event in self._events if event.number > number][-limit:])
