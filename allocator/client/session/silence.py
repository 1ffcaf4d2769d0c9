"""What a client does about an allocator that does not answer: refuse at once, and ask elsewhere.

Owns the thread that asks. Invariants: while it asks, nobody else waits; there is one at a time, and
none where the allocator answers; it asks until then, whatever comes in between. Knows nothing of
what is asked.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from allocator.errors import AllocatorError, AllocatorSilent

log = logging.getLogger("onecopy.allocator")

_ASK_EVERY_S: Final = 0.2


class Silence:
    """A circuit breaker: it opens with `begin`, and closes when `ask` has succeeded."""

    def __init__(self, ask: Callable[[], None], tell: Callable[[float | None], None]) -> None:
        """`ask` is called in a thread of its own until it raises nothing; `tell` hears when a
        silence begins (CLOCK_MONOTONIC), and None when it ends, from either thread."""
        self._ask = ask
        self._tell = tell
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._closed = False
        self.since: float | None = None

    def check(self) -> None:
        """Raises AllocatorSilent while it lasts."""
        since = self.since
        if since is not None:
            raise AllocatorSilent(
                f"the allocator has not answered for {time.monotonic() - since:.1f} s; nothing "
                "waits for it until it does"
            )

    def begin(self) -> None:
        """From now on nobody waits. Nothing where that is so already, or no thread can be had."""
        with self._lock:
            if self.since is not None or self._closed:
                return
            self.since = time.monotonic()
            self._over.clear()
            thread = threading.Thread(target=self._keep_asking, name="allocator", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # nobody would ask, so the next one waits again
                log.warning("a silent allocator is asked by nobody else: %s", error)
                self.since = None
                return
        self._tell(self.since)

    def close(self) -> None:
        """Nobody asks any more, as soon as the question that is on its way is over."""
        with self._lock:
            self._closed = True
        self._over.set()

    def _keep_asking(self) -> None:
        said = ""
        while not self._closed:
            try:
                self._ask()
            except Exception as error:  # without this thread it would be silent for good
                if said != (said := str(error)):
                    ours = not isinstance(error, AllocatorError)
                    level = logging.ERROR if ours else logging.INFO
                    log.log(
                        level, "the allocator is asked until it answers: %s", error, exc_info=ours
                    )
                self._over.wait(_ASK_EVERY_S)
                continue
            with self._lock:
                self.since = None
            self._tell(None)
            return
