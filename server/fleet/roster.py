"""The instances that there are, by name and by what they are for.

Owns the table, and the word that something about it has changed. Invariant: one that has ended is
in it only until it is taken out.
"""

import asyncio

from server.fleet.instance import Instance


class Roster:
    """Of one fleet."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self._waiting: set[asyncio.Future[None]] = set()  # for a change

    def add(self, instance: Instance) -> None:
        self._instances[instance.name] = instance

    def remove(self, instance: Instance) -> None:
        del self._instances[instance.name]

    def get(self, name: str) -> Instance | None:
        return self._instances.get(name)

    @property
    def all(self) -> list[Instance]:
        """Those that have not ended, oldest first. May be asked from any thread."""
        return [one for one in list(self._instances.values()) if one.state != "ended"]

    @property
    def ready(self) -> list[Instance]:
        """Those that answer requests now."""
        return [one for one in self._instances.values() if one.answers and not one.alone]

    @property
    def staying(self) -> list[Instance]:
        """Those that are not on their way out, oldest first."""
        return [one for one in self.all if one.state not in ("draining", "unresponsive")]

    def of(self, epoch: int) -> list[Instance]:
        """Those of them that serve the model as it was then."""
        return [one for one in self.staying if one.epoch == epoch]

    def alone(self, epoch: int) -> list[Instance]:
        """Those that answer one request at a time, for the model as it was then."""
        alone = [one for one in self._instances.values() if one.answers and one.alone]
        return [one for one in alone if one.epoch == epoch]

    @property
    def allocator_silent_since(self) -> float | None:
        """Since when the allocator has not answered one of them; None where it answers all."""
        beats = [one.leash.look() for one in self.all if not one.is_gone]
        times = [beat.silent_since for beat in beats if beat is not None and beat.silent_since]
        return min(times, default=None)

    async def change(self) -> None:
        """Until anything about any instance changed."""
        changed = asyncio.get_running_loop().create_future()
        self._waiting.add(changed)
        try:
            await changed
        finally:
            self._waiting.remove(changed)

    def tell_of_change(self) -> None:
        """Whoever waits for one goes on."""
        for one in self._waiting:
            if not one.done():
                one.set_result(None)
