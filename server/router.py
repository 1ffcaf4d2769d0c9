"""Which instance serves a request, and what happens to the request when that instance ends.

Owns the requests between admission and their last token. Invariants: a request is on one instance
at a time; tokens from an instance it is no longer on are dropped; a request whose instance ends
goes on elsewhere from the tokens already given, so its client sees one unbroken stream. Knows
nothing of text or HTTP.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from server import embedding
from server.errors import Asleep, InstanceFailed, NotReady, Overloaded
from server.fleet import Fleet, Instance, Listeners
from server.generation import NO_OPTIONS, RequestOptions
from server.requests import Embedding, Request, Stream
from server.settings import Settings
from workers.messages import Abort, Embedded, ModelFacts, Output, SamplingParams

log = logging.getLogger("onecopy.server")

_MAX_MOVES: Final = 3
"""A request that outlived so many instances may be what kills them."""
_RETRY_AFTER_S: Final = 2
_ASLEEP_S: Final = 30
_PATIENCE_S: Final = 2.0
"""How long a request whose instance ended waits for the replacement before it joins a busy one."""
_HOMELESS_S: Final = 60.0
"""How long a request waits for a new instance when there is none left."""


class ModelAsItWas:
    """The router, for requests for the model as it is at one moment, whatever is loaded later. See
    `server.generation.Generator`."""

    def __init__(self, router: "Router"):
        self._router = router
        self._epoch = router.epoch
        self.facts = router.facts

    @property
    def num_ready(self) -> int:
        return self._router.num_ready

    @property
    def asleep(self) -> bool:
        return self._router.asleep

    async def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
    ) -> Stream:
        return await self._router.submit(request_id, token_ids, sampling, options, self._epoch)

    async def embed(
        self, request_id: str, inputs: Sequence[Sequence[int]], dimensions: int = 0
    ) -> list[bytes]:
        return await self._router.embed(request_id, inputs, dimensions, self._epoch)


class Router:
    """Admission, least-loaded choice, and moving requests off instances that ended."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._streams: dict[str, Request] = {}
        self._homeless: list[Request] = []
        self._num_spread = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._fleet: Fleet | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.listeners = Listeners(
            output=self._on_output, ready=self._on_ready, ended=self._on_ended
        )

    def bind(self, fleet: Fleet) -> None:
        """Give the router its fleet, which was made with the router's listeners."""
        self._fleet = fleet

    @property
    def num_ready(self) -> int:
        """Instances that answer new requests now."""
        return len(self._instances(self.epoch))

    @property
    def epoch(self) -> int:
        """Of the model as it is served now."""
        return self._fleet.epoch if self._fleet is not None else 0

    @property
    def asleep(self) -> bool:
        """Whether the model sleeps."""
        return self._fleet is not None and self._fleet.asleep

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def facts(self) -> ModelFacts:
        """Of the served model. Raises NotReady before the first instance was ready."""
        if self._fleet is None or self._fleet.facts is None:
            raise NotReady("no instance is ready yet", retry_after_s=_RETRY_AFTER_S)
        return self._fleet.facts

    async def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
        epoch: int | None = None,
    ) -> Stream:
        """Start a sequence on the least loaded instance, of the model as it was at `epoch`. Raises
        NotReady or Overloaded."""
        epoch = self.epoch if epoch is None else epoch
        self._admit(epoch)
        stream = Stream(self, request_id, tuple(token_ids), sampling, options, epoch)
        await self._start(stream)
        return stream

    async def embed(
        self,
        request_id: str,
        inputs: Sequence[Sequence[int]],
        dimensions: int = 0,
        epoch: int | None = None,
    ) -> list[bytes]:
        """The vectors of all `inputs`, spread over the instances. Raises ServerError; if cancelled,
        all is aborted."""
        epoch = self.epoch if epoch is None else epoch
        self._admit(epoch)
        with self._spread():
            return await embedding.embed(self, request_id, inputs, dimensions, epoch)

    async def place_embedding(
        self, request_id: str, inputs: Sequence[Sequence[int]], dimensions: int, epoch: int
    ) -> Embedding:
        """Start a part of a request that was admitted."""
        part = Embedding(self, request_id, inputs, dimensions, epoch)
        try:
            await self._start(part)
        except BaseException:  # whoever asked is gone
            await self.abort(part)
            raise
        return part

    def num_streams_before(self, epoch: int) -> int:
        """Requests for the model as it was before."""
        return sum(one.epoch < epoch for one in self._streams.values())

    def _admit(self, epoch: int) -> None:
        """Raises NotReady or Overloaded."""
        if self.draining:
            raise NotReady("the server is shutting down", retry_after_s=_RETRY_AFTER_S)
        if self.asleep:
            raise Asleep("the model sleeps: wake it with `onecopy wake`", retry_after_s=_ASLEEP_S)
        instances = self._instances(epoch)
        if not instances and epoch != self.epoch:
            raise NotReady("the model was loaded anew just now: ask again", retry_after_s=1)
        if not instances:
            raise NotReady("no instance is ready at the moment", retry_after_s=_RETRY_AFTER_S)
        room = len(instances) * self._settings.max_num_seqs + self._settings.max_queued
        if len(self._streams) >= room:
            raise Overloaded(
                f"{len(self._streams)} requests are running or waiting, which is all that this "
                "server takes: try again, or start it with more --instances",
                retry_after_s=_RETRY_AFTER_S,
            )

    @contextmanager
    def _spread(self) -> Iterator[None]:
        """Between a request's parts, the router is not idle."""
        self._num_spread += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_spread -= 1
            self._rest()

    def _rest(self) -> None:
        if not self._streams and not self._num_spread:
            self._idle.set()

    async def _start(self, stream: Request) -> None:
        self._streams[stream.request_id] = stream
        self._idle.clear()
        await self._place(stream)

    async def abort(self, stream: Request) -> None:
        """Forget a stream; its instance frees its memory."""
        if stream.ended:
            return
        instance = stream.instance
        self._end(stream)
        if instance is not None and self._fleet is not None:
            await self._fleet.send(instance, Abort(request_id=stream.request_id))

    async def wait_idle(self, timeout_s: float) -> bool:
        """Until no request is left; False if `timeout_s` ran out first."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def give_up_all(self) -> None:
        """End what still runs, with an error that its client sees: nobody will go on with it."""
        for stream in list(self._streams.values()):
            stream.fail(InstanceFailed("the server was stopped before the answer was complete"))
            self._end(stream)

    # --- placing

    def _instances(self, epoch: int) -> list[Instance]:
        ready = self._fleet.ready_instances if self._fleet is not None else []
        return [one for one in ready if one.epoch == epoch]

    async def _place(self, stream: Request) -> None:
        while not stream.ended and (instances := self._instances(stream.epoch)):
            instance = min(instances, key=lambda one: len(one.requests))
            stream.instance = instance
            instance.requests.add(stream.request_id)
            assert self._fleet is not None  # noqa: S101 - there are instances
            if await self._fleet.send(instance, stream.message()):
                return
            # Ended a moment ago: its end moves the stream, unless that has happened already.
            instance.requests.discard(stream.request_id)
            if stream.instance is not instance:
                return
            stream.instance = None
            if instance in self._instances(stream.epoch):
                break  # not connected, though ready: wait for what the fleet finds out
        if not stream.ended and stream.epoch != self.epoch:
            stream.fail(
                InstanceFailed("the model was loaded anew, and the last instance of before ended")
            )
            self._end(stream)
        elif not stream.ended:
            self._homeless.append(stream)
            loop = asyncio.get_running_loop()
            loop.call_later(_HOMELESS_S, self._give_up, stream, stream.num_moves)

    def _give_up(self, stream: Request, num_moves: int) -> None:
        if stream in self._homeless and stream.num_moves == num_moves:
            stream.fail(InstanceFailed("its instance ended, and none took its place in time"))
            self._end(stream)

    # --- told by the fleet

    def _on_output(self, name: str, output: Output | Embedded) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None or stream.instance is None or stream.instance.name != name:
            return
        if stream.take(output):
            self._end(stream)

    def _on_ready(self, _instance: Instance) -> None:
        waiting, self._homeless = self._homeless, []
        for stream in waiting:
            self._move(stream)

    def _on_ended(self, instance: Instance) -> None:
        for request_id in instance.requests:
            stream = self._streams.get(request_id)
            if stream is None or stream.instance is not instance:
                continue
            stream.instance = None
            stream.num_moves += 1
            if stream.num_moves > _MAX_MOVES:
                stream.fail(
                    InstanceFailed(
                        f"{stream.num_moves} instances ended while they served this request"
                    )
                )
                self._end(stream)
            else:
                self._rehouse(stream)

    def _rehouse(self, stream: Request) -> None:
        """An idle instance takes it at once. Else it waits for the one that replaces its own, which
        takes a fraction of a second: joining a busy instance would slow that one's streams, change
        how their sums are rounded, and queue behind them if it is full."""
        idle = [one for one in self._instances(stream.epoch) if not one.requests]
        log.info("request %s moves to %s", stream.request_id, "an idle one" if idle else "the next")
        if idle:
            self._move(stream)
            return
        self._homeless.append(stream)
        loop = asyncio.get_running_loop()
        loop.call_later(_PATIENCE_S, self._lose_patience, stream)

    def _lose_patience(self, stream: Request) -> None:
        if stream in self._homeless:
            self._homeless.remove(stream)
            self._move(stream)

    def _move(self, stream: Request) -> None:
        task = asyncio.get_running_loop().create_task(self._place(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, stream: Request) -> None:
        stream.ended = True
        self._streams.pop(stream.request_id, None)
        if stream.instance is not None:
            stream.instance.requests.discard(stream.request_id)
        if stream in self._homeless:
            self._homeless.remove(stream)
        self._rest()
