"""The admin API on its own Unix socket: who runs, in what state, and how many there should be.

Invariant: only the runtime directory's owner can reach it (the directory is 0700).
"""

import os
import time
from collections.abc import Callable

from fastapi import FastAPI, HTTPException, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server.admin.metrics import Metrics
from server.admin.schemas import (
    AllocatorStatus,
    InstanceStatus,
    KeepAllocator,
    ModelStatus,
    Reload,
    Scale,
    ServerStatus,
    Sleep,
    Stop,
)
from server.errors import UnknownModel
from server.fleet.daemons import AllocatorProcess
from server.fleet.instance import Instance
from server.fleet.sleep import CannotSleep
from server.models.reload import CannotReload
from server.models.served import ServedModel
from server.models.table import Models


def create_admin_app(
    models: Models,
    allocator: AllocatorProcess,
    metrics: Metrics,
    ask_to_stop: Callable[[bool], None],
    drain_timeout_s: float,
    url: str,
) -> FastAPI:
    """The app for the admin socket. `ask_to_stop` is told whether to wait for requests no more;
    `url` is where the models are served."""
    app = FastAPI(title="onecopy admin", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/status")
    async def status() -> ServerStatus:
        known = [await _model_status(one) for one in models]
        return ServerStatus(
            **dict(known[0]),
            pid=os.getpid(),
            url=url,
            draining=models.draining,
            drain_timeout_s=drain_timeout_s,
            allocator=AllocatorStatus(
                pid=allocator.pid,
                started_here=allocator.is_ours,
                unresponsive_s=_age(allocator.unresponsive_since),
                silent_s=_age(models.allocator_silent_since),
            ),
            models=known,
        )

    def named(name: str | None) -> ServedModel:
        try:
            return models.named(name)
        except UnknownModel as error:
            raise HTTPException(409, str(error)) from error

    @app.put("/instances")
    async def scale(wish: Scale) -> ServerStatus:
        await named(wish.model).fleet.scale(wish.num_instances)
        return await status()

    @app.put("/allocator")
    async def keep_allocator(wish: KeepAllocator) -> ServerStatus:
        allocator.keep = wish.keep
        return await status()

    @app.put("/sleep")
    async def sleep(wish: Sleep) -> ServerStatus:
        sleeper = named(wish.model).sleeper
        try:
            await (sleeper.sleep(wish.level) if wish.level else sleeper.wake())
        except CannotSleep as error:
            raise HTTPException(409, str(error)) from error
        return await status()

    @app.put("/reload")
    async def reload(wish: Reload | None = None) -> ServerStatus:
        try:
            await named(wish.model if wish is not None else None).reloader.reload()
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
        return Response(await metrics.scrape(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.state.status = status
    return app


async def _model_status(served: ServedModel) -> ModelStatus:
    fleet = served.fleet
    facts = fleet.model.facts
    return ModelStatus(
        model=served.name,
        path=str(fleet.model.path),
        num_wanted=fleet.num_wanted,
        num_replaced=fleet.num_replaced,
        asleep=fleet.asleep,
        weight_set=fleet.model.weight_set,
        max_model_len=facts.max_model_len if facts else None,
        weights_bytes=facts.weights_bytes if facts else None,
        forkserver_pid=fleet.forkserver_pid,
        forkserver_is_up=fleet.forkserver_is_up,
        changed_files=await served.watch.changes(),
        placement=served.placement,
        start_error=fleet.start_error,
        instances=[
            _instance_status(one, served.router.num_requests(one)) for one in fleet.instances
        ],
    )


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
        rank_pids=list(instance.rank_pids),
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
