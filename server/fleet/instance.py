"""One instance as the server sees it: its state, what it has said, and whether it still moves.

Owns the states and what may follow on what. Invariant: a state moves along `TRANSITIONS` only.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from server.processes.endings import Ending
from server.processes.vital_signs import VitalSigns
from workers.client import Leash
from workers.messages import Embedded, Loading, Output, Ready, StepOutput

State = Literal["starting", "loading", "ready", "draining", "unresponsive", "ended"]
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    "starting": frozenset({"loading", "ready", "draining", "unresponsive", "ended"}),
    "loading": frozenset({"ready", "draining", "unresponsive", "ended"}),
    "ready": frozenset({"draining", "unresponsive", "ended"}),
    "draining": frozenset({"unresponsive", "ended"}),
    "unresponsive": frozenset({"ended"}),
    "ended": frozenset(),
}


@dataclass
class Instance:
    """One running engine."""

    name: str
    requested_at: float
    leash: Leash = field(repr=False)
    alone: bool = False
    """Whether it is for one request at a time, which may be what ends instances."""
    epoch: int = 0
    """Which state of the model it serves; see `ModelState`."""
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)
    """When it came into its state."""
    pid: int | None = None
    ready: Ready | None = None
    loading: Loading | None = None
    came_on_at: float = field(default_factory=time.monotonic)
    """When the loading last came on."""
    load: StepOutput | None = None
    start_error: str | None = None
    """Why it could not start, in its own words."""
    num_sent: int = 0
    """Messages that it was sent."""
    signs: VitalSigns = field(default_factory=VitalSigns, repr=False)
    rank_signs: dict[int, VitalSigns] = field(default_factory=dict, repr=False)
    """By the processes of its further ranks."""
    num_idle_looks: int = 0
    """How often in a row it was seen without requests, though it is to end."""
    unresponsive_since: float | None = None
    """Since when it has shown no sign of life, though it should."""

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """The processes that compute with it, in the order of their ranks, once it is ready."""
        return self.ready.rank_pids if self.ready is not None else ()

    @property
    def is_gone(self) -> bool:
        """It answers no more, and its requests are elsewhere."""
        return self.state in ("unresponsive", "ended")

    @property
    def answers(self) -> bool:
        """Whether a request that is sent to it now can be expected to be answered."""
        return self.state == "ready" and self.unresponsive_since is None

    def move(self, state: State) -> None:
        """Change state. Raises AssertionError for a transition that is not in the table."""
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"instance {self.name} can't go from {self.state} to {state}")
        self.state, self.since = state, time.monotonic()


@dataclass(frozen=True)
class Listeners:
    """Who is told what, and asked. All are called on the event loop and return at once."""

    output: Callable[[str, Output | Embedded], None]
    """(instance, output)"""
    ready: Callable[[Instance], None]
    """It answers, for the first time or again."""
    lost: Callable[[Instance, Ending], None]
    """It answers no more."""
    num_requests: Callable[[Instance], int]
    """Asked how many requests it was given that have not ended."""
