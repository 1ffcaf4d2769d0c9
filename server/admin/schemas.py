"""What the admin API says and is told: the server's side and its clients' share these.

Invariant: what was said of a server with one model is said of the first model at the same place, so
that a program which reads it goes on with a server of several.
"""

from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field

from server.fleet.instance import State
from server.placement import Placement
from server.settings import MAX_INSTANCES

ADMIN_PATHS: Final = frozenset(
    {"/status", "/instances", "/allocator", "/sleep", "/reload", "/stop", "/metrics"}
)


class InstanceStatus(BaseModel):
    """One instance. Times are in milliseconds, from the moment it was wanted."""

    name: str
    pid: int | None
    rank_pids: list[int] = []
    """The processes that compute with it, in the order of their ranks, once it is ready."""
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


class ModelStatus(BaseModel):
    """One served model and its instances."""

    model: str
    """The name that clients call it."""
    path: str
    num_wanted: int
    num_replaced: int
    asleep: bool
    weight_set: str | None
    """The key under which the allocator knows the weights, once an instance was ready."""
    max_model_len: int | None
    weights_bytes: int | None
    forkserver_pid: int | None
    forkserver_is_up: bool
    """Whether it has imported what instances need, so that one can be started."""
    changed_files: list[str]
    """What lies at `path` is no longer what is served: a line for each file."""
    placement: Placement | None
    """Where `--placement auto` has put its layers, and why; None where it was not asked to."""
    start_error: str | None
    """Why instances can't start, since the last one that could."""
    instances: list[InstanceStatus]

    @property
    def names(self) -> frozenset[str]:
        """What a person may call it."""
        path = Path(self.path)
        return frozenset({self.model, self.path, path.name, path.stem})


class ServerStatus(ModelStatus):
    """The server and its models. What it says of a model itself is of the first of `models`."""

    pid: int
    url: str
    draining: bool
    drain_timeout_s: float
    allocator: AllocatorStatus
    models: list[ModelStatus]

    def named(self, name: str | None) -> ModelStatus | None:
        """The model that a person means by `name`; the only one, without any. None where it is none
        of these."""
        if name is None:
            return self.models[0] if len(self.models) == 1 else None
        return next((one for one in self.models if name in one.names), None)


class Refusal(BaseModel):
    """Why the server did not do what it was asked."""

    detail: str


class KeepAllocator(BaseModel):
    """Whether the allocator, if the server started it, goes on when the server ends."""

    keep: bool


class Scale(BaseModel):
    """How many instances there should be. `model` None: of the only one."""

    model: str | None = None
    num_instances: int = Field(ge=1, le=MAX_INSTANCES)


class Reload(BaseModel):
    """Which model is to be served as it lies on disk now; as in `Scale`."""

    model: str | None = None


class Stop(BaseModel):
    """Whether running requests are cut off. Asked again, the same goes on."""

    now: bool


class Sleep(BaseModel):
    """0: awake; 1: the weights are kept in host memory; 2: on disk. `model` as in `Scale`."""

    model: str | None = None
    level: int = Field(ge=0, le=2)
