"""Which requests each instance was given: how much it has to do, and whom its end concerns.

Owns that table, by names. Invariant: a request that has ended is in no instance's part.
"""


class Loads:
    """Of one router."""

    def __init__(self) -> None:
        self._given: dict[str, set[str]] = {}

    def num(self, instance: str) -> int:
        """How many requests it has."""
        return len(self._given.get(instance, ()))

    def give(self, request_id: str, instance: str) -> None:
        """It is that instance's from now on."""
        self._given.setdefault(instance, set()).add(request_id)

    def take(self, request_id: str, instance: str) -> None:
        """It is no longer. Nothing if it was not."""
        given = self._given.get(instance, set())
        given.discard(request_id)
        if not given:
            self._given.pop(instance, None)

    def take_all(self, instance: str) -> set[str]:
        """All that an instance had, which is gone."""
        return self._given.pop(instance, set())
