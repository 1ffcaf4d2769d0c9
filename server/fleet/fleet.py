"""The instances of one model: how many there should be, how many there are, and in what state.

Owns their number: starts instances, replaces those that ended, drains those that are too many.
What becomes of each is in `supervision`. Invariants: while the fleet is not draining, the number of
live instances goes to `num_wanted`; an instance that never became ready is tried again ever more
slowly.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from allocator import RuntimeDir
from server.background import Background
from server.fleet.forks import Forks, ForksListeners, Preload
from server.fleet.hangs import LONGEST_END_S, Hang
from server.fleet.instance import Instance, Listeners
from server.fleet.model_state import ModelState
from server.fleet.roster import Roster
from server.fleet.specs import of_other_files, spec_of
from server.fleet.starts import StartError, Starts
from server.fleet.supervision import Supervision
from server.processes.endings import OutOfMemoryKills
from server.processes.orphans import Orphans
from server.processes.vital_signs import LOOK_EVERY_S
from server.settings import Settings
from workers.client import Engines, ForkserverBusy, ForkserverEnded
from workers.messages import (
    Drain,
    InstanceSpec,
    ToInstance,
)

log = logging.getLogger("onecopy.server")

_KILLED_S: Final = 1.0
"""What processes may take to end that the kernel kills."""


class Fleet:
    """All instances of the served model."""

    def __init__(
        self,
        settings: Settings,
        runtime_dir: RuntimeDir,
        listeners: Listeners,
        tokenizer: Path,
    ):
        """`tokenizer` is where instances find the model's tokenizer.json."""
        self._settings = settings
        self._runtime_dir = runtime_dir
        self._listeners = listeners
        self._background = Background()
        self._engines = Engines(runtime_dir)
        self._orphans = Orphans()
        self._roster = Roster()
        self._starts = Starts()
        self._num_named = 0
        self._num_alone = 0
        self._draining = False
        self._memory_kills = OutOfMemoryKills()
        self._supervision = Supervision(
            ModelState(settings.model, tokenizer),
            self._engines,
            self._roster,
            self._starts,
            listeners,
            self._memory_kills,
            settings.hang_timeout_s,
            self._fill_up,
        )
        self._forks = Forks(
            self._preload,
            ForksListeners(
                self._on_forks_up,
                self._supervision.on_forkserver_event,
                self._on_forks_ended,
                self._starts.delay_s,
            ),
            self._memory_kills,
            settings.hang_timeout_s,
        )
        self.num_wanted = settings.num_instances
        self.asleep = False
        """No instance runs, and none is to be started, until `wake`."""

    # --- what others may ask

    @property
    def model(self) -> ModelState:
        """As it is served now."""
        return self._supervision.model

    @property
    def num_replaced(self) -> int:
        """Instances that had been ready and were lost."""
        return self._supervision.num_replaced

    @property
    def instances(self) -> list[Instance]:
        """All that have not ended, oldest first. May be asked from any thread."""
        return self._roster.all

    @property
    def ready_instances(self) -> list[Instance]:
        """Those that answer requests now."""
        return self._roster.ready

    @property
    def alone_instances(self) -> list[Instance]:
        """Those that answer one request at a time, for the model as it is served now."""
        return self._roster.alone(self.model.epoch)

    @property
    def start_error(self) -> str | None:
        """Why instances can't start, since the last one that could."""
        return self._starts.error

    @property
    def recovers(self) -> bool:
        """Whether instances that are missing can be expected soon."""
        away = self.asleep or self._draining
        return self.model.facts is not None and not away and self._starts.num_failed < 2

    @property
    def forkserver_pid(self) -> int | None:
        """The process that instances are forked from."""
        return self._forks.pid

    @property
    def forkserver_is_up(self) -> bool:
        """Whether instances can be forked now; it imports before."""
        return self._forks.is_up

    @property
    def allocator_silent_since(self) -> float | None:
        """Since when the allocator has not answered an instance; None where it answers all."""
        return self._roster.allocator_silent_since

    @property
    def awaits_allocator(self) -> bool:
        """Whether any instance can't come on unless the allocator does."""
        starting = any(one.state in ("starting", "loading") for one in self.instances)
        return starting or self.allocator_silent_since is not None

    async def send(self, instance: Instance, message: ToInstance) -> bool:
        """False where the instance is not connected (any more)."""
        return await self._supervision.send(instance, message)

    # --- life

    def launch(self) -> None:
        """Begin: the forkserver imports, then the instances start. Returns at once."""
        self._background.keep("the watch over the forkserver", self._forks.keep)
        self._background.keep("the watch over messages", self._supervision.watch_engines)
        self._background.keep("the watch over hung processes", self._keep_looking)

    async def wait_ready(self, most_failures: int | None = None) -> None:
        """Until as many instances are ready as are wanted, which may change meanwhile. Raises
        StartError if the first one can't start, and where more than `most_failures` starts in a
        row have failed; they are tried on all the same."""
        while sum(one.epoch == self.model.epoch for one in self.ready_instances) < self.num_wanted:
            starts = self._starts
            if starts.error is not None:
                raise StartError(starts.error)
            if most_failures is not None and starts.num_failed > most_failures:
                raise StartError(f"{starts.num_failed} starts in a row have failed: see the log")
            await self.change()

    async def change(self) -> None:
        """Until anything about any instance changed."""
        await self._roster.change()

    async def scale(self, num_instances: int) -> None:
        """Change how many instances there should be. Surplus ones, the youngest first, are drained:
        they end when their requests have."""
        self.num_wanted = num_instances
        surplus = [one for one in self._current() if not one.alone][num_instances:]
        for instance in surplus:
            await self._drain_instance(instance)
        self._fill_up()

    async def want_alone(self, num_instances: int) -> None:
        """How many instances there should be that take one request at a time."""
        self._num_alone = num_instances
        alone = [one for one in self._current() if one.alone]
        idle = [one for one in alone if not self._listeners.num_requests(one)]
        for instance in idle[: max(0, len(alone) - num_instances)]:
            await self._drain_instance(instance)
        self._fill_up()

    # --- the model as it lies on disk now, in place of the one that is served

    async def try_out(self, model: Path, tokenizer: Path) -> Instance:
        """An instance of what lies at `model`, loaded and ready; it serves nobody yet. Raises
        StartError, and then nothing of it is left."""
        if self._draining or self.asleep:
            raise StartError("the server is shutting down, or the model sleeps")
        if not self._forks.is_up:
            raise StartError("the process that instances are forked from is not up: try again")
        spec = of_other_files(self._spec(), model, tokenizer)
        try:
            instance = self._fork(spec, self.model.epoch + 1)
        except (ForkserverBusy, ForkserverEnded, OSError) as error:
            raise StartError("no instance can be started at the moment: try again") from error
        self._roster.tell_of_change()
        try:
            while instance.state in ("starting", "loading"):
                await self.change()
        except BaseException:
            if instance.state in ("starting", "loading"):
                await self._drain_instance(instance)
            raise
        if instance.state != "ready":
            raise StartError(instance.start_error or "its instance ended before it was ready")
        return instance

    def switch_to(self, instance: Instance, model: Path, tokenizer: Path) -> None:
        """From now on the model is what this instance, which was tried out, serves. Others of it
        are started; those of before go on until `retire`."""
        if instance.ready is None or instance.state != "ready":
            raise StartError("the instance that was tried out ended: try again")
        self._supervision.model = ModelState(model, tokenizer, instance.epoch, instance.ready)
        self._starts.error = None
        self._fill_up()

    def num_before(self, epoch: int) -> int:
        """Instances of the model as it was before."""
        return sum(one.epoch < epoch for one in self.instances)

    async def retire(self, epoch: int) -> None:
        """Let the instances of the model as it was before `epoch` finish their requests and end."""
        for instance in self._roster.staying:
            if instance.epoch < epoch:
                await self._drain_instance(instance)

    async def sleep(self, timeout_s: float, wait_idle: Callable[[float], Awaitable[bool]]) -> bool:
        """End all instances after their requests, and start none until `wake`. `wait_idle`: until
        no request is left, in so many seconds. False where some were still busy after `timeout_s`;
        then all is as before."""
        self.asleep = True
        deadline = time.monotonic() + timeout_s
        # A request may have parts that are on no instance yet.
        if await wait_idle(timeout_s):
            await self._drain_all(max(LONGEST_END_S, deadline - time.monotonic()))
        if self.instances:
            self.wake()
            return False
        return True

    def wake(self) -> None:
        """Start as many instances as are wanted; returns before they are ready."""
        self.asleep = False
        self._starts.error = None
        self._fill_up()

    async def drain(self, timeout_s: float) -> None:
        """Let every instance finish its requests and end; kill what is left after `timeout_s`."""
        self._draining = True
        self._forks.stop()
        await self._drain_all(timeout_s)
        busy = [one for one in self.instances if not one.is_gone]
        if busy:
            log.warning("killing %d instances that are still busy", len(busy))

    async def _drain_all(self, timeout_s: float) -> None:
        for instance in self._roster.staying:
            await self._drain_instance(instance)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_ended(), timeout_s)

    async def _all_ended(self) -> None:
        # In one task: a change between the look and the wait would go unnoticed.
        while not all(one.is_gone for one in self.instances):
            await self.change()

    async def close(self) -> None:
        """End every process and remove the sockets."""
        self._draining = True
        self._forks.stop()
        for instance in self.instances:
            instance.leash.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_ended(), _KILLED_S)
        await self._background.close()
        for instance in self.instances:
            instance.leash.close()
        await self._forks.close()
        self._engines.close()
        self._runtime_dir.cores.unlink(missing_ok=True)

    # --- watching

    def _preload(self) -> Preload:
        model, dtype = self.model, self._settings.engine.dtype
        return Preload(str(model.path), dtype, model.metadata)

    def _on_forks_up(self) -> None:
        self._roster.tell_of_change()
        self._fill_up()

    def _on_forks_ended(self, faulty: bool) -> None:
        """Those that it was asked for will not come."""
        for instance in self.instances:
            if instance.pid is None and not instance.is_gone:
                how = "its forkserver ended before it began"
                self._supervision.give_up(instance, Hang(how, by_itself=False))
        if faulty:
            self._starts.failed()
            if self.model.facts is None:
                self._starts.error = (
                    "the process that instances are forked from ended while it imported "
                    "torch and transformers; its own message is above"
                )
            self._roster.tell_of_change()

    # --- hung processes

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._memory_kills.just_now()
            for instance in self.instances:
                await asyncio.sleep(0)  # each look reads files; there may be hundreds
                if not instance.is_gone:
                    self._supervision.look_at(instance)
            self._forks.look(asked=any(one.pid is None for one in self.instances))
            self._orphans.look(time.monotonic())
            self._fill_up()

    # --- doing

    def _current(self) -> list[Instance]:
        """Those that stay, and serve the model as it is served now."""
        return self._roster.of(self.model.epoch)

    def _fill_up(self) -> None:
        may_start = self._forks.is_up and self._starts.may_be_tried
        if self._draining or self.asleep or not may_start:
            return
        # The first one alone: it loads the weights, or shows that they can't be served; the others
        # then attach, instead of waiting for it on the same cores.
        wanted = self.num_wanted if self.model.facts is not None else 1
        current = self._current()
        num_alone = sum(one.alone for one in current)
        missing = [False] * (wanted - (len(current) - num_alone))
        missing += [True] * (self._num_alone - num_alone)
        for alone in missing:
            if not self._start(alone=alone):
                break
        if missing:
            self._roster.tell_of_change()

    def _start(self, *, alone: bool) -> bool:
        """Ask for an instance. False where it can't be asked for now; the next look tries again."""
        try:
            self._fork(self._spec(), self.model.epoch, alone=alone)
        except ForkserverEnded:  # the watcher sees it too, and starts all over
            return False
        except ForkserverBusy:
            log.warning("the forkserver takes no request now")
            return False
        except OSError as error:
            log.warning("no instance can be started now: %s", error)
            self._starts.failed()
            return False
        return True

    def _fork(self, spec: InstanceSpec, epoch: int, *, alone: bool = False) -> Instance:
        """Ask for this instance. Raises ForkserverEnded, ForkserverBusy, OSError."""
        leash = self._forks.start(spec)
        self._num_named += 1
        instance = Instance(spec.name, spec.requested_at, leash, alone, epoch)
        self._roster.add(instance)
        return instance

    def _spec(self) -> InstanceSpec:
        """Of the next instance of the model as it is served."""
        return spec_of(
            f"i{self._num_named}", self._settings, self.model, self._runtime_dir, self._engines
        )

    async def _drain_instance(self, instance: Instance) -> None:
        was = instance.state
        instance.move("draining")
        self._roster.tell_of_change()
        if was in ("starting", "loading"):  # nothing is lost with it
            instance.leash.kill()
        await self._supervision.send(instance, Drain())
