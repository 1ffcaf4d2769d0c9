"""The admin API on its own Unix socket: who runs, in what state, and how many there should be.

Owns its schemas, for the server's side and for the CLI's. Invariant: only the runtime directory's
owner can reach it (the directory is 0700). Knows nothing of prompts.
"""

import os
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, Literal

import httpx
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field, ValidationError

from allocator import RuntimeDir
from server.admin.metrics import CONTENT_TYPE, Metrics
from server.fleet.daemons import AllocatorProcess
from server.fleet.fleet import Fleet
from server.fleet.instance import Instance, State
from server.fleet.router import Router
from server.fleet.sleep import CannotSleep, Sleeper
from server.models.files import ModelWatch
from server.models.reload import CannotReload, Reloader
from server.settings import MAX_INSTANCES, Settings

ADMIN_PATHS: Final = frozenset(
    {"/status", "/instances", "/allocator", "/sleep", "/reload", "/stop", "/metrics"}
)
_TIMEOUT_S: Final = 10.0
_SLEEP_TIMEOUT_S: Final = 3600.0
"""Moving weights, or loading them, takes as long as they are large."""


class InstanceStatus(BaseModel):
    """One instance. Times are in milliseconds, from the moment it was wanted."""

    name: str
    pid: int | None
    state: State
    loaded: bool | None
    """Whether it copied the weights in, once it is ready."""
    ready_ms: float | None
    startup_ms: dict[str, float]
    cpu_kernels: str | None
    """The native decoder's, once it is ready; None where others compute the model."""
    uptime_s: float
    num_requests: int
    num_running: int
    num_waiting: int
    kv_bytes: int
    step_s: float | None = None
    """How long the present step has taken; None between steps."""
    unresponsive_s: float | None = None
    """For how long it has shown no sign of life, though it should."""
    alone: bool = False
    """Whether it is for one request at a time, which may be what ends instances."""
    writer_pid: int | None = None
    """The process that loads the weights, while this one waits for that or does it."""
    stalled_s: float | None = None
    """While it loads, for how long that has not come on."""


class AllocatorStatus(BaseModel):
    """The allocator that the server looks after."""

    pid: int | None
    started_here: bool
    """Whether the server may kill it where it hangs, and stops it at its own end."""
    unresponsive_s: float | None
    """For how long it has shown no sign of life, though it should."""
    silent_s: float | None
    """For how long it has not answered an instance."""


class ServerStatus(BaseModel):
    """The server and its instances."""

    pid: int
    url: str
    model: str
    path: str
    num_wanted: int
    num_replaced: int
    draining: bool
    asleep: bool
    weight_set: str | None
    """The key under which the allocator knows the weights, once an instance was ready."""
    drain_timeout_s: float
    max_model_len: int | None
    weights_bytes: int | None
    forkserver_pid: int | None
    forkserver_is_up: bool
    """Whether it has imported what instances need, so that one can be started."""
    allocator: AllocatorStatus
    changed_files: list[str]
    """What lies at `path` is no longer what is served: a line for each file."""
    start_error: str | None
    """Why instances can't start, since the last one that could."""
    instances: list[InstanceStatus]


class KeepAllocator(BaseModel):
    """Whether the allocator, if the server started it, goes on when the server ends."""

    keep: bool


class Scale(BaseModel):
    """How many instances there should be."""

    num_instances: int = Field(ge=1, le=MAX_INSTANCES)


class Stop(BaseModel):
    """Whether running requests are cut off. Asked again, the same goes on."""

    now: bool


class Sleep(BaseModel):
    """0: awake; 1: the weights are kept in host memory; 2: on disk."""

    level: Literal[0, 1, 2]


def create_admin_app(
    fleet: Fleet,
    router: Router,
    sleeper: Sleeper,
    allocator: AllocatorProcess,
    metrics: Metrics,
    watch: ModelWatch,
    reloader: Reloader,
    ask_to_stop: Callable[[bool], None],
    settings: Settings,
    url: str,
) -> FastAPI:
    """The app for the admin socket. `ask_to_stop` is told whether to wait for requests no more."""
    app = FastAPI(title="onecopy admin", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/status")
    async def status() -> ServerStatus:
        facts = fleet.model.facts
        return ServerStatus(
            pid=os.getpid(),
            url=url,
            model=settings.served_model_name,
            path=str(fleet.model.path),
            num_wanted=fleet.num_wanted,
            num_replaced=fleet.num_replaced,
            draining=router.draining,
            asleep=fleet.asleep,
            weight_set=fleet.model.weight_set,
            drain_timeout_s=settings.drain_timeout_s,
            max_model_len=facts.max_model_len if facts else None,
            weights_bytes=facts.weights_bytes if facts else None,
            forkserver_pid=fleet.forkserver_pid,
            forkserver_is_up=fleet.forkserver_is_up,
            allocator=AllocatorStatus(
                pid=allocator.pid,
                started_here=allocator.is_ours,
                unresponsive_s=_age(allocator.unresponsive_since),
                silent_s=_age(fleet.allocator_silent_since),
            ),
            changed_files=await watch.changes(),
            start_error=fleet.start_error,
            instances=[_instance_status(one, router.num_requests(one)) for one in fleet.instances],
        )

    @app.put("/instances")
    async def scale(wanted: Scale) -> ServerStatus:
        await fleet.scale(wanted.num_instances)
        return await status()

    @app.put("/allocator")
    async def keep_allocator(wish: KeepAllocator) -> ServerStatus:
        allocator.keep = wish.keep
        return await status()

    @app.put("/sleep")
    async def sleep(wish: Sleep) -> ServerStatus:
        try:
            await (sleeper.sleep(wish.level) if wish.level else sleeper.wake())
        except CannotSleep as error:
            raise HTTPException(409, str(error)) from error
        return await status()

    @app.put("/reload")
    async def reload() -> ServerStatus:
        try:
            await reloader.reload()
        except CannotReload as error:
            raise HTTPException(409, str(error)) from error
        return await status()

    @app.put("/stop")
    async def stop(wish: Stop) -> ServerStatus:
        told = await status()
        ask_to_stop(wish.now)
        return told

    @app.get("/metrics")
    async def scraped() -> Response:
        return Response(await metrics.scrape(), media_type=CONTENT_TYPE)

    app.state.status = status
    return app


def _age(since: float | None) -> float | None:
    """Seconds, of a moment of CLOCK_MONOTONIC."""
    return None if since is None else time.monotonic() - since


def _instance_status(instance: Instance, num_requests: int) -> InstanceStatus:
    ready, load = instance.ready, instance.load
    loading = instance.loading if instance.state == "loading" else None
    beat = instance.leash.look()
    return InstanceStatus(
        name=instance.name,
        pid=instance.pid,
        state=instance.state,
        loaded=ready.loaded if ready else None,
        ready_ms=ready.startup_ms.get("total") if ready else None,
        startup_ms=ready.startup_ms if ready else {},
        cpu_kernels=(ready.cpu_kernels or None) if ready else None,
        uptime_s=time.monotonic() - instance.requested_at,
        num_requests=num_requests,
        num_running=load.num_running if load else 0,
        num_waiting=load.num_waiting if load else 0,
        kv_bytes=load.kv_bytes if load else 0,
        step_s=_age(beat.since) if beat is not None else None,
        unresponsive_s=_age(instance.unresponsive_since),
        alone=instance.alone,
        writer_pid=loading.writer_pid or None if loading else None,
        stalled_s=_age(instance.came_on_at) if loading else None,
    )


class AdminError(Exception):
    """Base: the server did not do what was asked. The message names what to do."""


class NoServer(AdminError):
    """No server runs in the runtime directory."""


class ServerSilent(AdminError):
    """A server runs, and does not answer in time."""


class ServerFailed(AdminError):
    """A server runs, and answered with an error of its own, or with what is no answer."""


class AdminClient:
    """The CLI's side. Raises AdminError: NoServer where none runs. Every wait is bounded."""

    def __init__(self, runtime_dir: RuntimeDir, timeout_s: float = _TIMEOUT_S):
        self._runtime_dir = runtime_dir
        self._timeout_s = timeout_s

    def status(self) -> ServerStatus:
        """What the server says of itself."""
        return self._request("GET", "/status")

    def scale(self, num_instances: int) -> ServerStatus:
        """Ask for another number of instances; answered before they are ready."""
        return self._request("PUT", "/instances", {"num_instances": num_instances})

    def keep_allocator(self) -> ServerStatus:
        """Let the allocator go on when the server ends."""
        return self._request("PUT", "/allocator", {"keep": True})

    def reload(self) -> ServerStatus:
        """Serve the model as it lies on disk now; answered once that is so. Raises CannotReload."""
        return self._request("PUT", "/reload", None, _SLEEP_TIMEOUT_S, CannotReload)

    def stop(self, *, now: bool) -> ServerStatus:
        """Ask the server to end after its requests, or `now`; what it said of itself then."""
        return self._request("PUT", "/stop", {"now": now})

    def sleep(self, level: int) -> ServerStatus:
        """Put the model to sleep (1 or 2), or wake it (0); answered once that is so. Raises
        CannotSleep."""
        return self._request("PUT", "/sleep", {"level": level}, _SLEEP_TIMEOUT_S, CannotSleep)

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, int] | None = None,
        timeout_s: float | None = None,
        refused: type[Exception] = AdminError,
    ) -> ServerStatus:
        """What the server answers; a refusal is raised as `refused`."""
        timeout = httpx.Timeout(self._timeout_s, read=timeout_s or self._timeout_s)
        try:
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(self._runtime_dir.admin)),
                base_url="http://admin",
                timeout=timeout,
            ) as client:
                answer = client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise ServerSilent(
                f"the server{self._pid()} in {self._runtime_dir.path} does not answer within "
                f"{timeout.read:.0f} s: if it was stopped, go on with it (`kill -CONT`); else end "
                "it with `onecopy stop`, and start it again"
            ) from error
        except httpx.ConnectError as error:
            raise NoServer(
                f"no server answers in {self._runtime_dir.path}: start one with `onecopy serve`, "
                "or name its directory with --runtime-dir"
            ) from error
        except httpx.HTTPError as error:
            raise ServerFailed(
                f"the server{self._pid()} in {self._runtime_dir.path} broke off its answer to "
                f"{method} {path} ({error}): its log says why, if it still runs"
            ) from error
        if answer.status_code == HTTPStatus.CONFLICT:
            raise refused(answer.json()["detail"])
        try:
            answer.raise_for_status()
            return ServerStatus.model_validate_json(answer.content)
        except (httpx.HTTPStatusError, ValidationError) as error:
            raise ServerFailed(
                f"the server{self._pid()} in {self._runtime_dir.path} answered {method} {path} "
                f"with status {answer.status_code}, and not as this onecopy expects: its log says "
                "why; after an upgrade, start it again"
            ) from error

    def _pid(self) -> str:
        owner = self._runtime_dir.owner("server")
        return f" (pid {owner.pid})" if owner is not None else ""
