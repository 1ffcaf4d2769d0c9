"""The instances of one model: how many there should be, how many there are, and in what state.

Owns the supervision: starts instances, hears of their ends, replaces those that ended or hang.
Invariants: while the fleet is not draining, the number of live instances goes to `num_wanted`; an
instance that hangs answers no more before its requests go elsewhere; an instance that never became
ready is tried again ever more slowly.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from allocator import RuntimeDir
from server.background import Background
from server.fleet.forks import Forks, ForksListeners, Preload
from server.fleet.hangs import LONGEST_END_S, Hang, hang_of, overdue
from server.fleet.instance import Instance, Listeners
from server.fleet.model_state import ModelState
from server.fleet.roster import Roster
from server.fleet.starts import Starts
from server.processes.endings import Ending, OutOfMemoryKills, ending_of
from server.processes.orphans import Orphans
from server.processes.vital_signs import LOOK_EVERY_S
from server.settings import Settings
from workers.client import Engines, ForkserverBusy, ForkserverEnded
from workers.messages import (
    Drain,
    Exited,
    FromInstance,
    InstanceSpec,
    Loading,
    Ready,
    Started,
    StartFailed,
    StepOutput,
    ToInstance,
)

log = logging.getLogger("onecopy.server")

_HOW_AWAITED_S: Final = 3.0
"""How long to wait for the forkserver's word on how an instance ended."""
_KILLED_S: Final = 1.0
"""What processes may take to end that the kernel kills."""


MOST_FAILURES: Final = 3
"""Starts in a row that fail, after which nobody waits for the next one any more."""


class StartError(Exception):
    """The model can't be served. The message is for a person."""


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
        self.model = ModelState(settings.model, tokenizer)
        """As it is served now."""
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
        self._forks = Forks(
            self._preload,
            ForksListeners(
                self._on_forks_up,
                self._on_forkserver_event,
                self._on_forks_ended,
                self._starts.delay_s,
            ),
            self._memory_kills,
            settings.hang_timeout_s,
        )
        self.num_wanted = settings.num_instances
        self.asleep = False
        """No instance runs, and none is to be started, until `wake`."""
        self.num_replaced = 0

    # --- what others may ask

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
        beats = [one.leash.look() for one in self.instances if not one.is_gone]
        times = [beat.silent_since for beat in beats if beat is not None and beat.silent_since]
        return min(times, default=None)

    @property
    def awaits_allocator(self) -> bool:
        """Whether any instance can't come on unless the allocator does."""
        starting = any(one.state in ("starting", "loading") for one in self.instances)
        return starting or self.allocator_silent_since is not None

    async def send(self, instance: Instance, message: ToInstance) -> bool:
        """False where the instance is not connected (any more)."""
        sent = await self._engines.send(instance.name, message)
        instance.num_sent += sent
        return sent

    # --- life

    def launch(self) -> None:
        """Begin: the forkserver imports, then the instances start. Returns at once."""
        self._background.keep("the watch over the forkserver", self._forks.keep)
        self._background.keep("the watch over messages of instances", self._watch_engines)
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
        spec = msgspec.structs.replace(
            self._spec(),
            model=str(model),
            tokenizer=str(tokenizer),
            weight_set="",
            eos_token_ids=None,
        )
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
        self.model = ModelState(model, tokenizer, instance.epoch, instance.ready)
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
                self._give_up(instance, Hang(how, by_itself=False))
        if faulty:
            self._starts.failed()
            if self.model.facts is None:
                self._starts.error = (
                    "the process that instances are forked from ended while it imported "
                    "torch and transformers; its own message is above"
                )
            self._roster.tell_of_change()

    def _on_forkserver_event(self, event: object) -> None:
        match event:
            case Started(name=name, pid=pid) if instance := self._roster.get(name):
                self._know_pid(instance, pid)
                self._roster.tell_of_change()
            case Exited(name=name, status=status) if instance := self._roster.get(name):
                self._on_exit(instance, status)

    async def _watch_engines(self) -> None:
        while True:
            name, message = await self._engines.receive()
            instance = self._roster.get(name)
            if instance is None or instance.is_gone:
                continue
            if message is None:
                # Whatever it said, some request would be without it.
                self._give_up(instance, Hang("it sent what can't be read", by_itself=True))
                continue
            try:
                await self._on_message(instance, message)
            except Exception:
                log.exception("a message of instance %s could not be taken", name)
                self._give_up(instance, Hang("its message could not be taken", by_itself=False))

    async def _on_message(self, instance: Instance, message: FromInstance) -> None:
        match message:
            case StepOutput():
                instance.load = message
                for output in message.outputs:
                    self._listeners.output(instance.name, output)
            case Loading():
                if instance.state == "starting":
                    instance.move("loading")
                if instance.loading is None or instance.loading.num_bytes != message.num_bytes:
                    instance.came_on_at = time.monotonic()
                instance.loading = message
                self._roster.tell_of_change()
            case Ready():
                self._on_ready(instance, message)
                if instance.state == "draining":  # it was not there yet when it was told first
                    await self.send(instance, Drain())
            case StartFailed(message=text) if instance.state != "ready":
                instance.start_error = text
                if instance.epoch == self.model.epoch:
                    self._starts.error = text
                log.error("instance %s can't start: %s", instance.name, text)
                self._roster.tell_of_change()

    def _on_ready(self, instance: Instance, message: Ready) -> None:
        instance.ready = message
        self._know_pid(instance, message.pid)
        if instance.epoch == self.model.epoch:
            if self.model.ready is None:
                self.model = replace(self.model, ready=message)
            self._starts.succeeded()
        if instance.state != "draining":
            instance.move("ready")
            self._listeners.ready(instance)
        log.info(
            "instance %s ready: pid %d, %.0f ms from the request, %s",
            instance.name,
            message.pid,
            message.startup_ms.get("total", 0.0),
            "loaded the weights" if message.loaded else "attached to the shared weights",
        )
        self._roster.tell_of_change()
        self._fill_up()

    def _know_pid(self, instance: Instance, pid: int) -> None:
        instance.pid = pid
        try:
            instance.leash.watch(pid, partial(self._on_pidfd, instance))
        except OSError as error:  # descriptors ran out; the next look tries again
            log.warning("the end of instance %s can't be seen now: %s", instance.name, error)

    def _on_pidfd(self, instance: Instance, status: int | None) -> None:
        if status is not None:
            self._on_exit(instance, status)
            return
        # The forkserver has taken the status, and will say it; unless it hangs or is gone.
        loop = asyncio.get_running_loop()
        loop.call_later(_HOW_AWAITED_S, self._on_exit, instance, None)

    def _on_exit(self, instance: Instance, status: int | None) -> None:
        """Its process is gone."""
        if instance.state == "ended":
            return
        if not instance.is_gone:
            beat = instance.leash.look()
            names = beat.names if beat is not None else None
            kills = self._memory_kills.just_now()
            self._lose(instance, ending_of(status, out_of_memory=kills, names=names))
        self._forget(instance)

    # --- hung processes

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._memory_kills.just_now()
            for instance in self.instances:
                await asyncio.sleep(0)  # each look reads files; there may be hundreds
                if not instance.is_gone:
                    self._look_at(instance)
            self._forks.look(asked=any(one.pid is None for one in self.instances))
            self._orphans.look(time.monotonic())
            self._fill_up()

    def _look_at(self, instance: Instance) -> None:
        has_requests = bool(self._listeners.num_requests(instance))
        hang = overdue(instance, has_requests=has_requests)
        if hang is None and instance.pid is not None:
            self._know_pid(instance, instance.pid)
            if self._settings.hang_timeout_s:
                before = instance.unresponsive_since
                hang = hang_of(instance, instance.pid, self._settings.hang_timeout_s)
                if (before is None) != (instance.unresponsive_since is None):
                    self._tell_of_silence(instance)
        if hang is not None:
            self._give_up(instance, hang)

    def _tell_of_silence(self, instance: Instance) -> None:
        """Before it is given up, it gets no further request; and it may come back."""
        if instance.unresponsive_since is not None:
            log.warning(
                "instance %s (pid %s, %s) does not move any more: %s",
                instance.name,
                instance.pid,
                instance.state,
                instance.signs,
            )
        else:
            log.info("instance %s moves again", instance.name)
            if instance.answers:
                self._listeners.ready(instance)
        self._roster.tell_of_change()

    def _give_up(self, instance: Instance, hang: Hang) -> None:
        """Its requests go elsewhere, whatever it may still do before it is gone."""
        beat = instance.leash.look()
        names = beat.names if beat is not None else None
        ending = Ending(hang.how, hang.by_itself, names, given_up=True)
        instance.leash.kill()
        if instance.unresponsive_since is None:
            instance.unresponsive_since = time.monotonic()
        self._lose(instance, ending)
        if instance.pid is None:  # nobody will tell of its end
            self._forget(instance)
        self._fill_up()

    def _lose(self, instance: Instance, ending: Ending) -> None:
        """It answers no more, and what becomes of its process is nobody's concern."""
        name, was = instance.name, instance.state
        instance.move("unresponsive")
        if was == "draining":
            log.info("instance %s ended: %s", name, ending.how)
        else:
            log.warning("instance %s (pid %s), %s, ended: %s", name, instance.pid, was, ending.how)
        is_current = instance.epoch == self.model.epoch
        if was in ("starting", "loading") and ending.by_itself and is_current:
            self._starts.failed()
            if self.model.facts is None and self.start_error is None and not ending.given_up:
                self._starts.error = (
                    f"the first instance ended before it was ready: {ending.how}. If it was out "
                    "of memory, `onecopy plan` says how much the model takes."
                )
        elif was == "ready":
            self.num_replaced += 1
        self._listeners.lost(instance, ending)
        self._roster.tell_of_change()

    def _forget(self, instance: Instance) -> None:
        instance.move("ended")
        instance.leash.close()
        self._roster.remove(instance)
        self._engines.forget(instance.name)
        self._roster.tell_of_change()
        self._fill_up()

    # --- doing

    def _current(self) -> list[Instance]:
        """Those that stay, and serve the model as it is served now."""
        return self._roster.of(self.model.epoch)

    def _fill_up(self) -> None:
        if self._draining or self.asleep or not self._forks.is_up:
            return
        if not self._starts.may_be_tried:
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
        name = f"i{self._num_named}"
        settings, model = self._settings, self.model
        return InstanceSpec(
            name=name,
            runtime_dir=str(self._runtime_dir.path),
            engines=self._engines.expect(name),
            server_pid=os.getpid(),
            model=str(model.path),
            served_model_name=settings.served_model_name,
            requested_at=time.monotonic(),
            settings=settings.engine,
            num_threads=settings.num_threads,
            tokenizer=str(model.tokenizer),
            weight_set=model.weight_set or "",
            eos_token_ids=model.facts.eos_token_ids if model.facts is not None else None,
        )

    async def _drain_instance(self, instance: Instance) -> None:
        was = instance.state
        instance.move("draining")
        self._roster.tell_of_change()
        if was in ("starting", "loading"):  # nothing is lost with it
            instance.leash.kill()
        await self.send(instance, Drain())
