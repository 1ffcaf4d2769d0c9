"""What instances say, how they end and whether they hang: what becomes of each.

Owns each instance's states from its start to its end, and what the first of a model tells of the
model. Invariant: an instance that hangs answers no more before its requests go elsewhere; whatever
an instance does, it is lost once, and forgotten when its process is gone. How many there should be
is the fleet's.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from server.fleet.hangs import Hang, hang_of, overdue
from server.fleet.instance import Instance, Listeners
from server.fleet.model_state import ModelState
from server.fleet.roster import Roster
from server.fleet.starts import Starts
from server.processes.endings import Ending, OutOfMemoryKills, ending_of
from workers.client import Engines
from workers.messages import (
    Drain,
    Exited,
    FromInstance,
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


class Supervision:
    """Of one fleet's instances."""

    def __init__(
        self,
        model: ModelState,
        engines: Engines,
        roster: Roster,
        starts: Starts,
        listeners: Listeners,
        memory_kills: OutOfMemoryKills,
        hang_timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is told when another instance may be wanted; with a `hang_timeout_s` of 0 none
        is taken for hung."""
        self.model = model
        """As it is served now."""
        self.num_replaced = 0
        self._engines = engines
        self._roster = roster
        self._starts = starts
        self._listeners = listeners
        self._memory_kills = memory_kills
        self._hang_timeout_s = hang_timeout_s
        self._changed = changed

    async def send(self, instance: Instance, message: ToInstance) -> bool:
        """False where the instance is not connected (any more)."""
        sent = await self._engines.send(instance.name, message)
        instance.num_sent += sent
        return sent

    def on_forkserver_event(self, event: object) -> None:
        match event:
            case Started(name=name, pid=pid) if instance := self._roster.get(name):
                self._know_pid(instance, pid)
                self._roster.tell_of_change()
            case Exited(name=name, status=status) if instance := self._roster.get(name):
                self._on_exit(instance, status)

    async def watch_engines(self) -> None:
        while True:
            name, message = await self._engines.receive()
            instance = self._roster.get(name)
            if instance is None or instance.is_gone:
                continue
            if message is None:
                # Whatever it said, some request would be without it.
                self.give_up(instance, Hang("it sent what can't be read", by_itself=True))
                continue
            try:
                await self._on_message(instance, message)
            except Exception:
                log.exception("a message of instance %s could not be taken", name)
                self.give_up(instance, Hang("its message could not be taken", by_itself=False))

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
        self._changed()

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

    def look_at(self, instance: Instance) -> None:
        has_requests = bool(self._listeners.num_requests(instance))
        hang = overdue(instance, has_requests=has_requests)
        if hang is None and instance.pid is not None:
            self._know_pid(instance, instance.pid)
            if self._hang_timeout_s:
                before = instance.unresponsive_since
                hang = hang_of(instance, instance.pid, self._hang_timeout_s)
                if (before is None) != (instance.unresponsive_since is None):
                    self._tell_of_silence(instance)
        if hang is not None:
            self.give_up(instance, hang)

    def _tell_of_silence(self, instance: Instance) -> None:
        """Before it is given up, it gets no further request; and it may come back."""
        if instance.unresponsive_since is not None:
            log.warning(
                "instance %s (pid %s, %s) does not move any more: %s",
                instance.name,
                instance.pid,
                instance.state,
                next(
                    (
                        f"its rank with pid {pid} is {signs}"
                        for pid, signs in instance.rank_signs.items()
                        if signs.quiet_since is not None
                    ),
                    instance.signs,
                ),
            )
        else:
            log.info("instance %s moves again", instance.name)
            if instance.answers:
                self._listeners.ready(instance)
        self._roster.tell_of_change()

    def give_up(self, instance: Instance, hang: Hang) -> None:
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
        self._changed()

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
            if self.model.facts is None and self._starts.error is None and not ending.given_up:
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
        self._changed()
