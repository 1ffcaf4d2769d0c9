"""Who is hung, and who is only slow: by what the kernel counts of a process."""

import dataclasses

import pytest

from allocator import ProcessState
from server.processes.vital_signs import LOOK_EVERY_S, VitalSigns

IDLE = ProcessState(letter="S", counts=(1, 2, 3), exit_status=0)
STOPPED_S, WAITING_S = 3.0, 10.0


class Watched:
    """A process, and a clock that goes on with each look."""

    def __init__(self) -> None:
        self.signs = VitalSigns()
        self.now = 100.0
        self.state: ProcessState | None = IDLE

    def look(self, times: int = 1, *, owes: bool = True, gap_s: float = LOOK_EVERY_S) -> None:
        for _ in range(times):
            self.now += gap_s
            self.signs.look(self.now, self.state, owes=owes)

    def works(self) -> None:
        assert self.state is not None
        self.state = dataclasses.replace(
            self.state, counts=tuple(one + 1 for one in self.state.counts)
        )

    @property
    def is_hung(self) -> bool:
        return self.signs.is_hung(STOPPED_S, WAITING_S)


@pytest.fixture
def watched() -> Watched:
    one = Watched()
    one.look()
    return one


def test_who_owes_nothing_may_do_nothing(watched: Watched) -> None:
    watched.look(1000, owes=False)
    assert (watched.signs.quiet_since, watched.is_hung) == (None, False)


def test_a_stopped_process_is_doubted_at_once_and_hung_soon(watched: Watched) -> None:
    stopped_at = watched.now
    watched.state = dataclasses.replace(IDLE, letter="T")
    watched.look(owes=False)
    assert watched.signs.quiet_since == stopped_at
    assert not watched.is_hung
    watched.look(round(STOPPED_S / LOOK_EVERY_S) - 1, owes=False)
    assert watched.is_hung
    assert str(watched.signs) == "stopped by a signal"


@pytest.mark.parametrize("letter", ["S", "D"])
def test_who_waits_and_owes_something_is_hung_later(watched: Watched, letter: str) -> None:
    watched.state = dataclasses.replace(IDLE, letter=letter)
    watched.look(2)
    assert watched.signs.quiet_since is None
    watched.look(2)
    assert watched.signs.quiet_since == 100.0 + LOOK_EVERY_S
    watched.look(round(WAITING_S / LOOK_EVERY_S) - 5)
    assert not watched.is_hung
    watched.look()
    assert watched.is_hung


def test_who_is_slow_is_not_hung(watched: Watched) -> None:
    """It computes a little between the looks, or waits for a processor."""
    for _ in range(1000):
        watched.works()
        watched.look()
        assert watched.signs.quiet_since is None
    watched.state = dataclasses.replace(IDLE, letter="R")
    watched.look(1000)
    assert not watched.is_hung
    # Stopped most of the time, as by a quota, and let run in between.
    for _ in range(1000):
        watched.works()
        watched.state = dataclasses.replace(watched.state or IDLE, letter="T")
        watched.look(2)
        assert not watched.is_hung


def test_a_sign_of_life_ends_the_doubt(watched: Watched) -> None:
    watched.look(15)
    assert watched.signs.quiet_since is not None
    watched.works()
    watched.look()
    assert watched.signs.quiet_since is None
    watched.look(15)
    assert not watched.is_hung


def test_time_in_which_nobody_looked_does_not_count(watched: Watched) -> None:
    watched.look(3, gap_s=3600.0)  # the machine slept
    assert not watched.is_hung
    watched.state = None
    watched.look(100)
    assert not watched.is_hung
