"""What a person sees in the terminal: progress, the ready lines, tables.

Owns wording and layout. Invariant: what is meant for programs (`--json`) never passes through here.
Knows nothing of how the figures came about.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from server.admin.schemas import AllocatorStatus, InstanceStatus, ModelStatus, ServerStatus
from server.fleet.instance import Instance
from server.machine.checks import Check
from server.machine.device_verify import DeviceVerdict
from server.machine.plan import DevicePlan, Load, Plan, Room
from server.machine.process_memory import ProcessMemory
from server.machine.verify import Verdict
from server.settings import MAX_INSTANCES
from workers.messages import Loading

log = logging.getLogger("onecopy.server")

_STALLED_S: Final = 5.0
"""A load that has not come on for so long is told of."""

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


_FILES_SHOWN: Final = 3


def megabytes(num_bytes: float) -> str:
    """A size as people write it."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def milliseconds(value: float) -> str:
    """A time as people write it."""
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.0f} ms"


class ConsoleHandler(logging.Handler):
    """Log lines by way of the console that draws the progress bar, so that they stand above it."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), markup=False)


class _LoadedSize(DownloadColumn):
    """Nothing as long as there is nothing to load."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text()


class StartDisplay:
    """A bar for the instance that loads, and a line for those that wait. Silent without a terminal,
    where the log tells the same."""

    def __init__(self, model: str):
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _LoadedSize(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._progress.add_task(f"starting {model}", total=None)
        self._model = model
        self._told = False

    def show(self, instances: Sequence[Instance]) -> None:
        """Draw the present state."""
        loading = [one for one in instances if one.loading and one.state == "loading"]
        if not loading:
            return
        furthest = max(loading, key=lambda one: one.loading.num_bytes if one.loading else 0)
        assert furthest.loading is not None  # noqa: S101 - it was chosen for that
        stalled = self._stalled(furthest, furthest.loading)
        self._progress.update(
            self._task,
            description=f"loading {self._model} into shared memory{stalled}",
            completed=furthest.loading.num_bytes,
            total=furthest.loading.total_bytes or None,
        )

    def _stalled(self, instance: Instance, loading: Loading) -> str:
        """Who does not come on, and for how long; once also to the log, which needs no terminal."""
        stalled_s = time.monotonic() - instance.came_on_at
        if stalled_s < _STALLED_S:
            self._told = False
            return ""
        text = f"process {loading.writer_pid}, which writes, has not come on for {stalled_s:.0f} s"
        if not self._told:
            log.warning("loading %s: %s", self._model, text)
        self._told = True
        return f": {text}"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def ready_lines(
    status: ServerStatus,
    memories: Sequence[ProcessMemory | None],
    curl: str,
    version: str,
    runtime_dir: str | None,
) -> str:
    """What `onecopy serve` prints once it serves; `runtime_dir` where commands must name it."""
    known = [memory for memory in memories if memory is not None]
    private = ", ".join(megabytes(memory.private_bytes) for memory in known)
    shared = max((memory.shared_bytes for memory in known), default=0)
    starts = sorted(
        (one for one in status.instances if one.ready_ms is not None),
        key=lambda one: (not one.loaded, one.ready_ms),
    )
    times = ", ".join(
        f"{milliseconds(one.ready_ms or 0)} ({'loaded' if one.loaded else 'attached'})"
        for one in starts
    )
    count = len(status.instances)
    option = f" --runtime-dir {runtime_dir}" if runtime_dir else ""
    return "\n".join(
        (
            f"onecopy {version} is ready: {status.model} on {status.url}",
            f"  instances  {count}, ready after {times}",
            f"  memory     {megabytes(shared)} of weights, held once and mapped by {count} "
            f"instances; private to each: {private}",
            f"  try        {curl}",
            f"  look       onecopy ps{option}, onecopy verify{option}",
            f"  stop       Ctrl-C, or onecopy stop{option}",
        )
    )


def curl_line(url: str, uds: str | None, model: str, chat: bool, embeds: bool = False) -> str:
    """A request to copy. Greedy, so that a small model answers it as well as it can, every time."""
    body: dict[str, object]
    if embeds:
        path = "/v1/embeddings"
        body = {"model": model, "input": "What is the capital of France?"}
    elif chat:
        path = "/v1/chat/completions"
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
        }
    else:
        path = "/v1/completions"
        body = {
            "model": model,
            "prompt": "The capital of France is",
            "max_tokens": 16,
            "temperature": 0,
        }
    base = f"--unix-socket {uds} http://localhost" if uds else url
    return f"curl {base}{path} -H 'content-type: application/json' -d '{json.dumps(body)}'"


def status_lines(status: ServerStatus) -> str:
    """What stands above the table of `onecopy ps`: a line for each model, and what to see to."""
    lines = [_model_line(status, one) for one in status.models]
    lines[-1] += _allocator(status.allocator)
    return "\n".join(lines + [line for one in status.models for line in warnings(one)])


def _model_line(status: ServerStatus, model: ModelStatus) -> str:
    states = [one.state for one in model.instances]
    return (
        f"{model.model} on {status.url}: {states.count('ready')} of {model.num_wanted} instances "
        f"ready, {model.num_replaced} replaced so far; server pid {status.pid}"
        f"{', shutting down' if status.draining else ''}"
        f"{'; it sleeps: wake it with `onecopy wake`' if model.asleep else ''}"
    )


def warnings(model: ModelStatus) -> list[str]:
    """What somebody should see to."""
    found = []
    if model.start_error is not None:
        found.append(f"instances can't start: {model.start_error}")
    if model.changed_files:
        more = len(model.changed_files) - _FILES_SHOWN
        shown = "; ".join(model.changed_files[:_FILES_SHOWN])
        found.append(
            f"{model.path} has changed since it was loaded, and is served as it was: {shown}"
            f"{f' and {more} more' if more > 0 else ''}. `onecopy reload` serves it as it is now"
        )
    return found


def instances_table(
    instances: Sequence[tuple[str, InstanceStatus]], memories: Sequence[ProcessMemory | None]
) -> Table:
    """The body of `onecopy ps`: each instance under the name of its model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("NAME", "left"),
        ("PID", "right"),
        ("STATE", "left"),
        ("MODEL", "left"),
        ("SHARED", "right"),
        ("PRIVATE", "right"),
        ("KV", "right"),
        ("REQUESTS", "right"),
        ("START", "right"),
    ):
        # In a narrow terminal the model's name gives way first.
        table.add_column(name, justify=justify, no_wrap=name != "MODEL")  # type: ignore[arg-type]
    for (model, instance), memory in zip(instances, memories, strict=True):
        table.add_row(
            instance.name,
            str(instance.pid or "-"),
            _state(instance),
            model,
            megabytes(memory.shared_bytes) if memory else "-",
            megabytes(memory.private_bytes) if memory else "-",
            megabytes(memory.kv_bytes) if memory else "-",
            str(instance.num_requests),
            milliseconds(instance.ready_ms) if instance.ready_ms is not None else "-",
        )
    return table


def _state(instance: InstanceStatus) -> str:
    """With what is unusual about it."""
    text: str = instance.state
    if instance.unresponsive_s is not None:
        text += f", unresponsive for {instance.unresponsive_s:.0f} s"
    elif instance.stalled_s is not None and instance.stalled_s > _STALLED_S:
        text += f", waits for pid {instance.writer_pid} for {instance.stalled_s:.0f} s"
    return f"{text}, for one request" if instance.alone else text


def _allocator(status: AllocatorStatus) -> str:
    """What is unusual about it, if anything is."""
    if status.pid is None:
        return "; no allocator runs"
    if status.unresponsive_s is None:
        return ""
    end = "" if status.started_here else ": end it, as with `kill -9`, and it is replaced"
    return f"; allocator pid {status.pid} unresponsive for {status.unresponsive_s:.0f} s{end}"


def verdict_text(verdict: Verdict | DeviceVerdict) -> Table:
    """The body of `onecopy verify`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("INSTANCE", no_wrap=True)
    on_host = isinstance(verdict, Verdict)
    own = ("WEIGHTS MAPPED", "RESIDENT", "SHARE", "PRIVATE", "KV")
    for name in ("PID", *(own if on_host else ("BY THE DRIVER",))):
        table.add_column(name, justify="right", no_wrap=True)
    if isinstance(verdict, DeviceVerdict):
        for instance in verdict.instances:
            seen = instance.driver_bytes
            table.add_row(
                instance.name, str(instance.pid), "-" if seen is None else megabytes(seen)
            )
        return table
    for one in verdict.instances:
        table.add_row(
            one.name,
            str(one.pid),
            megabytes(one.mapped_bytes),
            megabytes(one.resident_bytes),
            megabytes(one.weights_pss_bytes),
            megabytes(one.private_bytes),
            megabytes(one.kv_bytes),
        )
    return table


def verdict_lines(verdict: Verdict | DeviceVerdict) -> str:
    """What the table adds up to."""
    if not verdict.holds:
        problems = [f"  - {problem}" for problem in verdict.problems]
        return "\n".join((_shares(verdict), "One copy: DOES NOT HOLD.", *problems))
    count = len(verdict.instances)
    together = (
        f"{count} instances take {megabytes(verdict.total_bytes)}; {count} private copies "
        f"would take {megabytes(verdict.unshared_bytes)}."
    )
    return "\n".join((_shares(verdict), together, "One copy: holds."))


def _shares(verdict: Verdict | DeviceVerdict) -> str:
    if isinstance(verdict, DeviceVerdict):
        return (
            f"{megabytes(verdict.weights_bytes)} of weights on {verdict.device} ({verdict.model}). "
            f"Of {megabytes(verdict.used_bytes)} in use there the allocator owns "
            f"{megabytes(verdict.allocator_bytes)} and other programs have "
            f"{megabytes(verdict.others_bytes)}; {megabytes(verdict.clients_bytes)} are the "
            f"{verdict.num_clients} clients' own: contexts, kernels, workspaces."
        )
    shares = (
        f"{megabytes(verdict.weights_bytes)} of weights in {verdict.segment} (inode "
        f"{verdict.inode}); the instances' shares of them add up to "
        f"{megabytes(verdict.weights_pss_bytes)}."
    )
    if verdict.weights_bytes < verdict.max_private_bytes:
        shares += (
            f" A private copy of so little would not show: an instance may have "
            f"{megabytes(verdict.max_private_bytes)} for itself (--max-private)."
        )
    return shares


_STATUS_STYLES: Final = {"ok": "green", "info": "dim", "warning": "yellow", "problem": "bold red"}


def checks_table(checks: Sequence[Check]) -> Table:
    """The body of `onecopy doctor`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("CHECK", "STATUS", "SEEN, AND WHAT TO DO"):
        table.add_column(name, no_wrap=name != "SEEN, AND WHAT TO DO", overflow="fold")
    for one in checks:
        # Text, because a path or an error may hold what rich would take for markup.
        seen = Text(one.seen)
        if one.fix:
            seen.append(f"\nfix: {one.fix}", style="bold")
        table.add_row(Text(one.name), Text(one.status, style=_STATUS_STYLES[one.status]), seen)
    return table


def checks_line(checks: Sequence[Check]) -> str:
    """What the table adds up to."""
    counts = [
        f"{len(names)} {status}{'' if len(names) == 1 else 's'} ({', '.join(names)})"
        for status in ("problem", "warning")
        if (names := [one.name for one in checks if one.status == status])
    ]
    return f"{', '.join(counts)}; each fix is above." if counts else "Nothing stands in the way."


def plan_heading(plan: Plan) -> str:
    """What stands above the table of `onecopy plan`."""
    load = plan.load
    ranks = f" of {load.tensor_parallel_size} ranks" if load.tensor_parallel_size > 1 else ""
    return (
        f"{plan.model}: {plan.architecture}, {plan.num_parameters / 1e6:,.1f} million parameters "
        f"in {plan.dtype}\n{_count(load.num_instances, 'instance')}{ranks}, each with up to "
        f"{_count(load.max_num_seqs, 'sequence')} of up to {load.max_model_len:,} tokens\n"
    )


def plan_table(plan: Plan) -> Table:
    """The body of `onecopy plan`: what each device holds, idle and at most."""
    devices = [("", plan.device)]
    if plan.rank_device is not None:
        size = plan.load.tensor_parallel_size
        devices = [("ONE DEVICE,\n", plan.device), (f"EACH OF {size},\n", plan.rank_device)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name, _ in devices:
        for moment in ("AT THE START", "AT FULL LOAD"):
            table.add_column(f"{name}{moment}", justify="right", no_wrap=True)
    sequences = _count(plan.load.num_instances * plan.load.max_num_seqs, "sequence")
    pairs: dict[str, list[tuple[int, int]]] = {
        "weights, held once": [(one.weights_bytes,) * 2 for _, one in devices],
        f"KV cache, {sequences}": [(0, one.kv_bytes_at_full_load) for _, one in devices],
        "private memory, about": [
            (one.private_bytes_at_start, one.private_bytes_at_full_load) for _, one in devices
        ],
        "together": [
            (one.total_bytes_at_start, one.total_bytes_at_full_load) for _, one in devices
        ],
    }
    for label, sizes in pairs.items():
        cells = [megabytes(size) for pair in sizes for size in pair]
        table.add_row(label, *cells, style="bold" if label == "together" else "")
    return table


def plan_lines(plan: Plan) -> str:
    """What the table means, and whether it fits."""
    device, load, size = plan.device, plan.load, plan.load.tensor_parallel_size
    cache = (
        f"A token takes {device.kv_bytes_per_token:,} bytes of KV cache, a sequence of "
        f"{load.max_model_len:,} tokens {megabytes(device.kv_bytes_per_sequence)}. At full load "
        "every sequence is at its full length."
    )
    if not device.kv_bytes_per_token:
        cache = "It embeds texts, and keeps nothing of them between its steps."
    lines = ["", cache]
    if plan.split is None:
        return "\n".join(lines + _room_lines(load, device, plan.room))
    lines += [
        f"Of the weights {megabytes(plan.split.column_bytes)} are split by columns and "
        f"{megabytes(plan.split.row_bytes)} by rows, 1/{size} for each rank; each has all of the "
        f"other {megabytes(plan.split.replicated_bytes)} (embeddings, norms, output head).",
        "",
        f"All {size} ranks on one device, where they view the one copy:",
        *_room_lines(load, device, plan.room),
        "",
        f"Each rank on one of {size} devices:",
    ]
    if plan.rank_device is not None and plan.rank_room is not None:
        lines += _room_lines(load, plan.rank_device, plan.rank_room)
    else:
        lines.append("`--memory BYTES`, of one device, compares with what you have.")
    return "\n".join(lines)


def _room_lines(load: Load, device: DevicePlan, room: Room) -> list[str]:
    """Whether it fits, and what would."""
    if device.weights_bytes > room.shared_memory_bytes:
        return [
            f"Does not fit: the weights need {megabytes(device.weights_bytes)} of shared memory, "
            f"{megabytes(room.shared_memory_bytes)} may be used. Raise --memory-limit or --memory "
            "where you gave it, else enlarge /dev/shm (`onecopy doctor` says how)."
        ]
    left = room.memory_bytes - room.other_processes_bytes
    there = (
        f"of {megabytes(room.memory_bytes)} {'given' if room.given else 'available here'}, server, "
        f"allocator and forkserver take about {megabytes(room.other_processes_bytes)}"
    )
    each, instances = _count(load.max_num_seqs, "sequence"), _count(load.num_instances, "instance")
    if room.fits_at_full_load:
        spare = megabytes(left - device.total_bytes_at_full_load)
        return [
            f"Fits: {spare} are left at full load ({there}).",
            f"At full load up to {_count(room.max_instances, 'instance')} with {each} each would "
            f"fit, or {instances} with {_count(room.max_num_seqs, 'sequence')} each, "
            f"or {_idle(room)}.",
        ]
    if not room.fits_at_start:
        lines = [
            f"Does not fit: {megabytes(device.total_bytes_at_start - left)} are missing already at "
            f"the start ({there})."
        ]
        if room.max_instances_at_start:
            lines.append(f"What would fit: {_idle(room)}.")
        return lines
    options = {
        "--instances": room.max_instances,
        "--max-num-seqs": room.max_num_seqs,
        "--max-model-len": room.max_model_len,
    }
    fitting = " or ".join(f"{option} {number}" for option, number in options.items() if number)
    fitting += ", else as planned; " if fitting else ""
    tokens = f"{room.max_kv_tokens:,} tokens in all of {instances}; " * bool(room.max_kv_tokens)
    missing = device.total_bytes_at_full_load - left
    shared = device.weights_bytes + device.kv_bytes_at_full_load - room.shared_memory_bytes
    if shared > missing:
        missing, there = (
            shared,
            f"of shared memory {megabytes(room.shared_memory_bytes)} may be used",
        )
    return [
        f"Fits at the start, but {megabytes(missing)} are missing at full load ({there}).",
        f"What would fit: {fitting}{tokens}or {_idle(room)}.",
    ]


def _idle(room: Room) -> str:
    """How many instances fit as long as nobody asks them anything."""
    most = " (serve's limit)" if room.max_instances_at_start == MAX_INSTANCES else ""
    return f"{_count(room.max_instances_at_start, 'idle instance')}{most}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
