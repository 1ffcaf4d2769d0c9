"""Which instance serves a request, and what happens to the request when that instance ends.

Owns the requests between admission and their last token. Invariants: a request is on one instance
at a time; tokens from an instance it is no longer on are dropped; a request whose instance ends
goes on elsewhere from the tokens already given, so its client sees one unbroken stream, however
often that happens, unless the request itself may be the reason; at its deadline it ends, whatever
its instance does. Knows nothing of text or HTTP.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from server.background import Background
from server.errors import Asleep, DeadlineExceeded, InstanceFailed, NotReady, Overloaded
from server.fleet import embedding
from server.fleet.fleet import Fleet
from server.fleet.homeless import Homeless
from server.fleet.instance import Instance, Listeners
from server.fleet.loads import Loads
from server.fleet.quarantine import Quarantine
from server.fleet.requests import Embedding, Request, Stream
from server.generation import NO_OPTIONS, RequestOptions
from server.processes.endings import Ending
from server.settings import Settings
from workers.messages import Abort, Embedded, ModelFacts, Output, SamplingParams

log = logging.getLogger("onecopy.server")

_RETRY_AFTER_S: Final = 2
_ASLEEP_S: Final = 30


class Router:
    """Admission, least-loaded choice, and moving requests off instances that ended."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._streams: dict[str, Request] = {}
        self._homeless = Homeless(self._may_join, lambda: self._recovers, self._move, self._give_up)
        self._num_spread = 0
        self._background = Background()
        self._fleet: Fleet | None = None
        self._quarantine = Quarantine(
            self._want_alone, self._place_alone, lambda: self._recovers, self._turn_lost
        )
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self._loads = Loads()
        self.listeners = Listeners(
            output=self._on_output,
            ready=self._on_ready,
            lost=self._on_lost,
            num_requests=self.num_requests,
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
        return self._fleet.model.epoch if self._fleet is not None else 0

    @property
    def asleep(self) -> bool:
        """Whether the model sleeps."""
        return self._fleet is not None and self._fleet.asleep

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def num_requests(self, instance: Instance) -> int:
        """Those that it was given and that have not ended."""
        return self._loads.num(instance.name)

    @property
    def facts(self) -> ModelFacts:
        """Of the served model. Raises NotReady before the first instance was ready."""
        facts = self._fleet.model.facts if self._fleet is not None else None
        if facts is None:
            raise NotReady("no instance is ready yet", retry_after_s=_RETRY_AFTER_S)
        return facts

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
        num_ready = len(self._instances(epoch))
        if not num_ready and epoch != self.epoch:
            raise NotReady("the model was loaded anew just now: ask again", retry_after_s=1)
        if not num_ready:
            # Those that all ended a moment ago are being replaced: the request waits for one.
            if self._fleet is None or not self._recovers:
                text = "no instance is ready at the moment"
                raise NotReady(text, retry_after_s=_RETRY_AFTER_S)
            num_ready = self._fleet.num_wanted
        room = num_ready * self._settings.engine.max_num_seqs + self._settings.max_queued
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
        left_s = stream.seconds_left
        if left_s is not None:
            loop = asyncio.get_running_loop()
            stream.timer = loop.call_later(left_s, self._expire, stream)
        await self._place(stream)

    def _expire(self, stream: Request) -> None:
        """An instance ends it by itself, as long as it does anything at all."""
        if not stream.ended:
            instance = stream.instance
            stream.fail(DeadlineExceeded("the request's deadline has passed"))
            self._end(stream)
            self._background.once("an abort", partial(self._tell_of_abort, stream, instance))

    async def abort(self, stream: Request) -> None:
        """Forget a stream; its instance frees its memory."""
        if stream.ended:
            return
        instance = stream.instance
        self._end(stream)
        await self._tell_of_abort(stream, instance)

    async def _tell_of_abort(self, stream: Request, instance: Instance | None) -> None:
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
            self._fail(stream, "the server was stopped before the answer was complete")

    async def close(self) -> None:
        """Nothing of it goes on."""
        self.give_up_all()
        await self._background.close()

    # --- placing

    def _instances(self, epoch: int) -> list[Instance]:
        ready = self._fleet.ready_instances if self._fleet is not None else []
        return [one for one in ready if one.epoch == epoch]

    async def _place(self, stream: Request) -> None:
        """On the least loaded instance that takes it; where there is none, it waits."""
        refused: set[str] = set()
        while not stream.ended:
            instances = [one for one in self._instances(stream.epoch) if one.name not in refused]
            if not instances:
                break
            instance = min(instances, key=self.num_requests)
            if await self._send(stream, instance):
                return
            if stream.instance is not None:  # its end has moved the stream already
                return
            refused.add(instance.name)  # ended a moment ago, or not connected, though ready
        if not stream.ended:
            self._await_instance(stream)

    async def _send(self, stream: Request, instance: Instance) -> bool:
        """Give the request to this instance. False where that is not connected; the request is on
        none then, unless it was moved meanwhile."""
        assert self._fleet is not None  # noqa: S101 - there are instances
        stream.instance = instance
        self._loads.give(stream.request_id, instance.name)
        if await self._fleet.send(instance, stream.message()):
            return True
        self._loads.take(stream.request_id, instance.name)
        if stream.instance is instance:
            stream.instance = None
        return False

    def _await_instance(self, stream: Request) -> None:
        """It waits for one that becomes ready. For the model as it was before, none will come."""
        if stream.epoch != self.epoch and not self._instances(stream.epoch):
            self._outdated(stream)
        else:
            self._homeless.add(stream)

    def _may_join(self, stream: Request) -> bool:
        return bool(self._instances(stream.epoch)) or stream.epoch != self.epoch

    @property
    def _recovers(self) -> bool:
        return self._fleet is not None and self._fleet.recovers

    def _give_up(self, stream: Request) -> None:
        self._fail(stream, "its instance ended, and none took its place in time")

    def _outdated(self, stream: Request) -> None:
        self._fail(stream, "the model was loaded anew, and the last instance of before ended")

    def _move(self, stream: Request) -> None:
        self._background.once(
            f"placing request {stream.request_id}",
            partial(self._place, stream),
            partial(self._not_placed, stream),
        )

    def _not_placed(self, stream: Request, error: Exception) -> None:
        """An error of ours, which is in the log, ends the request that it is about."""
        if not stream.ended:
            self._fail(stream, f"the server could not go on with this request: {error}")

    # --- what may end instances

    def _want_alone(self, num_instances: int) -> None:
        if self._fleet is not None:
            wanted = partial(self._fleet.want_alone, num_instances)
            self._background.once("the number of instances for suspects", wanted)
            for instance in self._fleet.alone_instances:
                self._quarantine.offer(instance)

    def _place_alone(self, stream: Request, instance: Instance) -> None:
        if stream.epoch != instance.epoch:
            self._outdated(stream)
            return
        self._loads.give(stream.request_id, instance.name)  # from now on it has something to do
        self._background.once(
            f"placing request {stream.request_id} alone",
            partial(self._send_alone, stream, instance),
            partial(self._not_placed, stream),
        )

    async def _send_alone(self, stream: Request, instance: Instance) -> None:
        sent = await self._send(stream, instance)
        if not sent and stream.instance is None and not stream.ended:
            self._quarantine.add(stream)

    def _turn_lost(self, stream: Request) -> None:
        self._fail(stream, "no instance could be started for this request alone")

    # --- told by the fleet

    def _on_output(self, name: str, output: Output | Embedded) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None or stream.instance is None or stream.instance.name != name:
            return
        try:
            is_last = stream.take(output)
        except Exception as error:
            log.exception("an answer to request %s could not be taken", stream.request_id)
            self._not_placed(stream, error)
            self._background.once("an abort", partial(self._tell_of_abort, stream, stream.instance))
            return
        if is_last:
            self._end(stream)

    def _on_ready(self, instance: Instance) -> None:
        if instance.alone:
            if instance.epoch == self.epoch:
                self._quarantine.offer(instance)
            return
        self._homeless.place_all()

    def _on_lost(self, instance: Instance, ending: Ending) -> None:
        for request_id in self._loads.take_all(instance.name):
            stream = self._streams.get(request_id)
            if stream is None or stream.instance is not instance:
                continue
            stream.instance = None
            stream.num_moves += 1
            if not ending.may_be_caused_by(request_id):
                self._rehouse(stream)
                continue
            was_alone = stream in self._quarantine
            stream.num_blamed += 1
            if was_alone:
                self._fail(
                    stream,
                    f"{stream.num_blamed} instances ended by themselves while they computed "
                    f"this request, the last one with nothing else to do ({ending.how})",
                )
            else:
                self._rehouse(stream)

    def _rehouse(self, stream: Request) -> None:
        """An idle instance takes it at once. Else it waits for the one that replaces its own, which
        takes a fraction of a second: joining a busy instance would slow that one's streams, change
        how their sums are rounded, and queue behind them if it is full."""
        if stream.is_suspect:
            if stream.epoch != self.epoch:
                self._outdated(stream)
                return
            self._quarantine.add(stream)
            return
        idle = [one for one in self._instances(stream.epoch) if not self.num_requests(one)]
        log.info("request %s moves to %s", stream.request_id, "an idle one" if idle else "the next")
        if idle:
            self._move(stream)
        else:
            self._await_instance(stream)

    def _fail(self, stream: Request, why: str) -> None:
        """No instance goes on with it."""
        stream.fail(InstanceFailed(why))
        self._end(stream)

    def _end(self, stream: Request) -> None:
        stream.ended = True
        self._streams.pop(stream.request_id, None)
        if stream.timer is not None:
            stream.timer.cancel()
        if stream.instance is not None:
            self._loads.take(stream.request_id, stream.instance.name)
        self._homeless.remove(stream)
        self._quarantine.remove(stream)
        self._rest()
