"""The models of a server, by name.

Owns the table. Invariant: who looks for a model finds it here, and nowhere else is there a list of
them: a request by the name that it gives, a command without a name where there is only one.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from server.errors import UnknownModel
from server.fleet.instance import Instance
from server.models.served import ServedModel
from server.models.serving import Serving


class Models:
    """All of one server, in the order in which they were given."""

    def __init__(self, models: Sequence[ServedModel]):
        self._models = {one.name: one for one in models}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def named(self, name: str | None) -> ServedModel:
        """None: the only one. Raises UnknownModel."""
        if name is None and len(self._models) == 1:
            return next(iter(self))
        if name is None or name not in self._models:
            raise UnknownModel.among(self._models, name)
        return self._models[name]

    def serving(self) -> Mapping[str, Serving]:
        """Those that are served, each as it is now."""
        return {one.name: one.serving for one in self if one.serving is not None}

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return any(one.router.draining for one in self)

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return sum(one.router.num_streams for one in self)

    @property
    def awaits_allocator(self) -> bool:
        """Whether any instance can't come on unless the allocator does."""
        return any(one.fleet.awaits_allocator for one in self)

    @property
    def allocator_silent_since(self) -> float | None:
        """Since when the allocator has not answered an instance; None where it answers all."""
        times = [one.fleet.allocator_silent_since for one in self]
        return min((since for since in times if since is not None), default=None)

    @property
    def instances(self) -> Sequence[Instance]:
        """Of all. May be asked from any thread."""
        return [instance for one in self for instance in one.fleet.instances]

    def launch(self) -> None:
        """Begin to start all."""
        for one in self:
            one.launch()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and let what runs finish, within `timeout_s`."""
        await asyncio.gather(*(one.drain(timeout_s) for one in self))

    async def end_requests(self) -> None:
        """What still runs ends with an error that its client sees."""
        for one in self:
            await one.router.close()

    async def close(self) -> None:
        """End all of them."""
        for one in self:
            await one.close()
