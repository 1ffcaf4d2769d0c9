"""The instances of one model: how many there should be, how many there are, and in what state.

Owns the supervision: starts instances, hears of their ends, replaces them. Invariants: the state
of an instance moves along `TRANSITIONS` only; while the fleet is not draining, the number of live
instances goes to `num_wanted`; an instance that never became ready is tried again ever more slowly.
Knows nothing of what the requests are.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

from allocator import RuntimeDir
from server.settings import Settings
from workers.client import Engines, Forkserver, ForkserverBusy, ForkserverEnded
from workers.messages import (
    Drain,
    Embedded,
    Exited,
    InstanceSpec,
    Loading,
    ModelFacts,
    Output,
    Ready,
    Started,
    StartFailed,
    StepOutput,
    ToInstance,
)

log = logging.getLogger("onecopy.server")

State = Literal["starting", "loading", "ready", "draining", "ended"]
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    "starting": frozenset({"loading", "ready", "draining", "ended"}),
    "loading": frozenset({"ready", "draining", "ended"}),
    "ready": frozenset({"draining", "ended"}),
    "draining": frozenset({"ended"}),
    "ended": frozenset(),
}
_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 30.0


class StartError(Exception):
    """The model can't be served. The message is for a person."""


@dataclass
class Instance:
    """One running engine, as the server sees it."""

    name: str
    requested_at: float
    epoch: int = 0
    """Which state of the model it serves; see `Fleet.epoch`."""
    state: State = "starting"
    pid: int | None = None
    ready: Ready | None = None
    loading: Loading | None = None
    load: StepOutput | None = None
    start_error: str | None = None
    """Why it could not start, in its own words."""
    requests: set[str] = field(default_factory=set)
    """Ids of the requests that were sent to it and have not ended."""

    def move(self, state: State) -> None:
        """Change state. Raises AssertionError for a transition that is not in the table."""
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"instance {self.name} can't go from {self.state} to {state}")
        self.state = state


@dataclass(frozen=True)
class Listeners:
    """Who is told what. All are called on the event loop and return at once."""

    output: Callable[[str, Output | Embedded], None]
    """(instance, output)"""
    ready: Callable[[Instance], None]
    ended: Callable[[Instance], None]
    """Its requests are still in `Instance.requests`."""


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
        self.model = settings.model
        """Where the model lies that is served now."""
        self._tokenizer = tokenizer
        self.epoch = 0
        """Goes up whenever the model is loaded anew. An instance, and a request, is for the model
        as it was at one of them."""
        self._runtime_dir = runtime_dir
        self._listeners = listeners
        self._engines = Engines(runtime_dir.engines)
        self._forkserver: Forkserver | None = None
        self._instances: dict[str, Instance] = {}
        self._num_named = 0
        self._num_failures = 0
        self._retry: asyncio.TimerHandle | None = None
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: set[asyncio.Future[None]] = set()  # for a change
        self.start_error: str | None = None
        """Why instances can't start, since the last one that could."""
        self.num_wanted = settings.num_instances
        self.asleep = False
        """No instance runs, and none is to be started, until `wake`."""
        self.weight_set: str | None = None
        """The key under which the allocator knows the served weights. The first instance that is
        ready decides it; all others attach to this set, whatever becomes of the model's files."""
        self.facts: ModelFacts | None = None
        self._metadata: Mapping[str, str] | None = None
        self.num_replaced = 0

    # --- what others may ask

    @property
    def instances(self) -> list[Instance]:
        """All that have not ended, oldest first. May be asked from any thread."""
        return [one for one in list(self._instances.values()) if one.state != "ended"]

    @property
    def ready_instances(self) -> list[Instance]:
        """Those that answer requests now."""
        return [one for one in self._instances.values() if one.state == "ready"]

    @property
    def forkserver_pid(self) -> int | None:
        """The process that instances are forked from."""
        return self._forkserver.pid if self._forkserver is not None else None

    async def send(self, instance: Instance, message: ToInstance) -> bool:
        """False where the instance is not connected (any more)."""
        return await self._engines.send(instance.name, message)

    # --- life

    def launch(self) -> None:
        """Begin: the forkserver imports, then the instances start. Returns at once."""
        self._tasks = [
            asyncio.create_task(self._watch_forkserver(), name="forkserver"),
            asyncio.create_task(self._watch_engines(), name="engines"),
        ]

    async def wait_ready(self) -> None:
        """Until as many instances are ready as are wanted, which may change meanwhile. Raises
        StartError if the first one can't start."""
        while sum(one.epoch == self.epoch for one in self.ready_instances) < self.num_wanted:
            if self.start_error is not None:
                raise StartError(self.start_error)
            await self.change()

    async def change(self) -> None:
        """Until anything about any instance changed. Raises what a watching task ended with."""
        changed = asyncio.get_running_loop().create_future()
        self._waiting.add(changed)
        try:
            await asyncio.wait([changed, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.remove(changed)
            changed.cancel()
        for task in self._tasks:
            if task.done():
                task.result()

    async def run(self) -> None:
        """Watch until `close`; ends early only by an error of ours, which it raises. Cancelling
        this leaves the watching tasks alone."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in self._tasks:
            if task.done():
                task.result()

    def _tell_of_change(self) -> None:
        for one in self._waiting:
            if not one.done():
                one.set_result(None)

    async def scale(self, num_instances: int) -> None:
        """Change how many instances there should be. Surplus ones, the youngest first, are drained:
        they end when their requests have."""
        self.num_wanted = num_instances
        surplus = self._counted()[num_instances:]
        for instance in surplus:
            await self._drain_instance(instance)
        self._fill_up()

    # --- the model as it lies on disk now, in place of the one that is served

    async def try_out(self, model: Path, tokenizer: Path) -> Instance:
        """An instance of what lies at `model`, loaded and ready; it serves nobody yet. Raises
        StartError, and then nothing of it is left."""
        if self._forkserver is None:
            raise StartError("the process that instances are forked from is not up: try again")
        instance = self._new_instance(self.epoch + 1)
        spec = msgspec.structs.replace(
            self._spec(instance),
            model=str(model),
            tokenizer=str(tokenizer),
            weight_set="",
            eos_token_ids=None,
        )
        try:
            self._forkserver.start(spec)
        except (ForkserverBusy, ForkserverEnded) as error:
            raise StartError("no instance can be started at the moment: try again") from error
        self._instances[instance.name] = instance
        self._tell_of_change()
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
        self.model, self._tokenizer = model, tokenizer
        self.epoch = instance.epoch
        self.facts = instance.ready.facts
        self.weight_set = instance.ready.weight_set
        self._metadata = instance.ready.metadata
        self.start_error = None
        self._fill_up()

    def num_before(self, epoch: int) -> int:
        """Instances of the model as it was before."""
        return sum(one.epoch < epoch for one in self.instances)

    async def retire(self) -> None:
        """Let the instances of the model as it was before finish their requests and end."""
        for instance in self.instances:
            if instance.epoch != self.epoch and instance.state != "draining":
                await self._drain_instance(instance)

    async def sleep(self, timeout_s: float) -> bool:
        """End all instances after their requests, and start none until `wake`. False where some
        were still busy after `timeout_s`; then all is as before."""
        self.asleep = True
        await self._drain_all(timeout_s)
        if self.instances:
            self.wake()
            return False
        return True

    def wake(self) -> None:
        """Start as many instances as are wanted; returns before they are ready."""
        self.asleep = False
        self.start_error = None
        self._fill_up()

    async def drain(self, timeout_s: float) -> None:
        """Let every instance finish its requests and end; kill what is left after `timeout_s`."""
        self._draining = True
        await self._drain_all(timeout_s)
        if self.instances:
            log.warning("killing %d instances that are still busy", len(self.instances))

    async def _drain_all(self, timeout_s: float) -> None:
        if self._retry is not None:
            self._retry.cancel()
        for instance in self.instances:
            if instance.state != "draining":
                await self._drain_instance(instance)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_ended(), timeout_s)

    async def _all_ended(self) -> None:
        # In one task: a change between the look and the wait would go unnoticed.
        while self.instances:
            await self.change()

    async def close(self) -> None:
        """End every process and remove the sockets."""
        self._draining = True
        if self._retry is not None:
            self._retry.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._forkserver is not None:
            await self._forkserver.close()
        self._engines.close()
        self._runtime_dir.cores.unlink(missing_ok=True)

    # --- watching

    async def _watch_forkserver(self) -> None:
        while not self._draining:
            model, dtype = str(self.model), self._settings.dtype
            self._forkserver = Forkserver.launch(model, dtype, self._metadata)
            up = None
            try:
                up = await self._forkserver.up()
                log.info("forkserver up after %.1f s", up.import_ms / 1000)
                self._fill_up()
                while True:
                    self._on_forkserver_event(await self._forkserver.receive())
            except ForkserverEnded:
                await self._forkserver.close()
                self._forkserver = None
                for instance in self.instances:
                    self._ended(instance, "its forkserver ended")
                if up is None:
                    self._num_failures += 1
                    if self.facts is None:
                        self.start_error = (
                            "the process that instances are forked from ended while it imported "
                            "torch and transformers; its own message is above"
                        )
                    self._tell_of_change()
                if not self._draining:
                    log.warning("the forkserver ended; starting another")
                    await asyncio.sleep(self._retry_delay_s())

    def _on_forkserver_event(self, event: object) -> None:
        match event:
            case Started(name=name, pid=pid) if name in self._instances:
                self._instances[name].pid = pid
                self._tell_of_change()
            case Exited(name=name, status=status) if name in self._instances:
                self._ended(self._instances[name], self._how(status))

    def _how(self, status: int) -> str:
        """How a process ended, for people."""
        if status == -signal.SIGBUS and self._settings.map_files:
            return "signal 7: a file that it maps became shorter (--map-files)"
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    async def _watch_engines(self) -> None:
        while True:
            name, message = await self._engines.receive()
            instance = self._instances.get(name)
            if instance is None or instance.state == "ended":
                continue
            match message:
                case StepOutput():
                    instance.load = message
                    for output in message.outputs:
                        self._listeners.output(name, output)
                case Loading():
                    if instance.state == "starting":
                        instance.move("loading")
                    instance.loading = message
                    self._tell_of_change()
                case Ready():
                    self._on_ready(instance, message)
                    if instance.state == "draining":  # it was not there yet when it was told first
                        await self.send(instance, Drain())
                case StartFailed(message=text) if instance.state != "ready":
                    instance.start_error = text
                    if instance.epoch == self.epoch:
                        self.start_error = text
                    log.error("instance %s can't start: %s", name, text)
                    self._tell_of_change()

    def _on_ready(self, instance: Instance, message: Ready) -> None:
        instance.ready = message
        instance.pid = message.pid
        if self.weight_set is None and instance.epoch == self.epoch:
            self.facts = message.facts
            self.weight_set = message.weight_set
            self._metadata = message.metadata
        if instance.epoch == self.epoch:
            self._num_failures = 0
            self.start_error = None
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
        self._tell_of_change()
        self._fill_up()

    def _ended(self, instance: Instance, how: str) -> None:
        was = instance.state
        instance.move("ended")
        if was == "draining":
            log.info("instance %s ended: %s", instance.name, how)
        else:
            log.warning("instance %s, %s, ended: %s", instance.name, was, how)
        if was in ("starting", "loading") and instance.epoch == self.epoch:
            self._num_failures += 1
            if self.facts is None and self.start_error is None:
                self.start_error = (
                    f"the first instance ended before it was ready ({how}). Signal 9 is what the "
                    "kernel sends when memory runs out."
                )
        elif was == "ready":
            self.num_replaced += 1
        del self._instances[instance.name]
        self._listeners.ended(instance)
        self._tell_of_change()
        if self._num_failures:
            self._try_again_later()
        else:
            self._fill_up()

    # --- doing

    def _fill_up(self) -> None:
        if self._draining or self.asleep or self._forkserver is None:
            return
        # The first one alone: it loads the weights, or shows that they can't be served; the others
        # then attach, instead of waiting for it on the same cores.
        wanted = self.num_wanted if self.facts is not None else 1
        for _ in range(wanted - len(self._counted())):
            instance = self._new_instance(self.epoch)
            try:
                self._forkserver.start(self._spec(instance))
            except ForkserverEnded:  # the watcher sees it too, and starts all over
                return
            except ForkserverBusy:
                log.warning("the forkserver does not read: asking for an instance again")
                self._try_again_later()
                return
            self._instances[instance.name] = instance
        self._tell_of_change()

    def _counted(self) -> list[Instance]:
        """Those that count for how many there should be, oldest first."""
        return [
            one for one in self.instances if one.state != "draining" and one.epoch == self.epoch
        ]

    def _new_instance(self, epoch: int) -> Instance:
        name = f"i{self._num_named}"
        self._num_named += 1
        return Instance(name, requested_at=time.monotonic(), epoch=epoch)

    def _try_again_later(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        loop = asyncio.get_running_loop()
        self._retry = loop.call_later(self._retry_delay_s(), self._fill_up)

    def _spec(self, instance: Instance) -> InstanceSpec:
        settings = self._settings
        return InstanceSpec(
            name=instance.name,
            runtime_dir=str(self._runtime_dir.path),
            engines=self._runtime_dir.engines,
            model=str(self.model),
            served_model_name=settings.served_model_name,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            token_budget=settings.token_budget,
            num_threads=settings.num_threads,
            requested_at=instance.requested_at,
            device=settings.device,
            map_files=settings.map_files,
            shares_cores=settings.shares_cores,
            tokenizer=str(self._tokenizer),
            weight_set=self.weight_set or "",
            eos_token_ids=self.facts.eos_token_ids if self.facts is not None else None,
            attention_workspace_bytes=settings.attention_workspace,
            num_speculative_tokens=settings.num_speculative_tokens,
            prefix_caching=settings.prefix_caching,
        )

    async def _drain_instance(self, instance: Instance) -> None:
        instance.move("draining")
        self._tell_of_change()
        await self.send(instance, Drain())

    def _retry_delay_s(self) -> float:
        return min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(self._num_failures, 16))
