"""The weight sets that there are: found by key, counted, and who waits for them until when. Pure.

Owns the table, and the generations. Invariant: a generation never comes twice. How a set changes is
`weights.sets`' to say.
"""

from collections import deque
from collections.abc import Callable, Iterator

from allocator.books import SessionId
from allocator.daemon.weights.weight_set import Waiter, WeightSet
from allocator.errors import StaleGeneration, UnknownWeightSet
from allocator.messages import Handle, Tier


class SetTable:
    """Of one device."""

    def __init__(self) -> None:
        self._sets: dict[str, WeightSet] = {}
        self._generation = 0

    def __iter__(self) -> Iterator[WeightSet]:
        return iter(self._sets.values())

    def get(self, key: str) -> WeightSet | None:
        """The set of that key, if there is one."""
        return self._sets.get(key)

    def restore(self, weight_set: WeightSet) -> None:
        """Take over a set as an earlier daemon left it."""
        self._sets[weight_set.key] = weight_set
        self._generation = max(self._generation, weight_set.generation)

    def _known(self, key: str) -> WeightSet:
        weight_set = self._sets.get(key)
        if weight_set is None:
            raise UnknownWeightSet(f"no weight set is called {key!r}")
        return weight_set

    def _current(self, key: str, generation: int) -> WeightSet:
        weight_set = self._known(key)
        if weight_set.generation != generation:
            raise StaleGeneration(
                f"generation {generation} of {key!r} is gone; it is now {weight_set.generation}"
            )
        return weight_set

    def _next_generation(self) -> int:
        self._generation += 1
        return self._generation

    # --- what they take

    def num_bytes(self, tier: Tier) -> int:
        """Bytes of all copies on a tier, unfinished ones included."""
        return sum(weight_set.num_bytes(tier) for weight_set in self._sets.values())

    def num_bytes_of(self, key: str) -> int:
        """Of the set's highest copy."""
        weight_set = self._sets[key]
        return weight_set.num_bytes(weight_set.tier)

    def least_recently_used(self, *, owned: bool = False) -> WeightSet | None:
        """The idle set on the device that nobody has used for the longest time, pinned ones aside.
        `owned`: of those that take memory of the device."""
        idle = [s for s in self._sets.values() if s.state == "idle" and not s.pinned]
        if owned:
            idle = [s for s in idle if s.owned_bytes]
        return min(idle, key=lambda weight_set: weight_set.idle_since, default=None)

    def handles(self) -> list[Handle]:
        """All segments, as at the daemon's own end; images are not among them."""
        found = [s.target for s in self._sets.values() if s.target is not None]
        for weight_set in self._sets.values():
            found += [copy.handle for tier, copy in weight_set.copies.items() if tier != "disk"]
        return found

    # --- who waits

    def wait(self, key: str, waiter: Waiter) -> None:
        """Queue behind the writer of `key`: answered by an effect, or taken out by `expired` or
        `given_up`."""
        self._sets[key].waiters.append(waiter)

    def expired(self, now: float) -> list[tuple[WeightSet, Waiter]]:
        """Take out the waiters whose deadline has passed."""
        return self._taken_out(lambda waiter: waiter.deadline <= now)

    def given_up(self, session: SessionId) -> list[tuple[WeightSet, Waiter]]:
        """Take out what a session waits for no longer: it has asked for something else, or never
        hears of this. Were it elected, all others would wait for a writer that knows nothing of
        it."""
        return self._taken_out(lambda waiter: waiter.session == session)

    def _taken_out(self, is_done: Callable[[Waiter], bool]) -> list[tuple[WeightSet, Waiter]]:
        done: list[tuple[WeightSet, Waiter]] = []
        for weight_set in self._sets.values():
            if any(map(is_done, weight_set.waiters)):
                done += [(weight_set, w) for w in weight_set.waiters if is_done(w)]
                weight_set.waiters = deque(w for w in weight_set.waiters if not is_done(w))
        return done

    def next_deadline(self) -> float | None:
        """The earliest deadline of any waiter."""
        return min((w.deadline for s in self._sets.values() for w in s.waiters), default=None)
