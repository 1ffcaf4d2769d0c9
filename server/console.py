"""What a person sees in the terminal: progress, the ready lines, tables.

Owns wording and layout. Invariant: what is meant for programs (`--json`) never passes through here.
Knows nothing of how the figures came about.
"""

import json
import logging
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

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

from server.admin import ServerStatus
from server.fleet import Instance
from server.process_memory import ProcessMemory
from server.verify import Verdict

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


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

    def show(self, instances: Sequence[Instance]) -> None:
        """Draw the present state."""
        loading = [one.loading for one in instances if one.loading and one.state == "loading"]
        if not loading:
            return
        furthest = max(loading, key=lambda message: message.num_bytes)
        self._progress.update(
            self._task,
            description=f"loading {self._model} into shared memory",
            completed=furthest.num_bytes,
            total=furthest.total_bytes or None,
        )

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


def curl_line(url: str, uds: str | None, model: str, chat: bool) -> str:
    """A request to copy."""
    if chat:
        path = "/v1/chat/completions"
        body: dict[str, object] = {
            "model": model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
    else:
        path = "/v1/completions"
        body = {"model": model, "prompt": "The capital of France is", "max_tokens": 16}
    base = f"--unix-socket {uds} http://localhost" if uds else url
    return f"curl {base}{path} -H 'content-type: application/json' -d '{json.dumps(body)}'"


def server_line(status: ServerStatus) -> str:
    """What stands above the table of `onecopy ps`."""
    states = [one.state for one in status.instances]
    return (
        f"{status.model} on {status.url}: {states.count('ready')} of {status.num_wanted} instances "
        f"ready, {status.num_replaced} replaced so far; server pid {status.pid}"
        f"{', shutting down' if status.draining else ''}"
    )


def instances_table(status: ServerStatus, memories: Sequence[ProcessMemory | None]) -> Table:
    """The body of `onecopy ps`."""
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
    for instance, memory in zip(status.instances, memories, strict=True):
        table.add_row(
            instance.name,
            str(instance.pid or "-"),
            instance.state,
            status.model,
            megabytes(memory.shared_bytes) if memory else "-",
            megabytes(memory.private_bytes) if memory else "-",
            megabytes(memory.kv_bytes) if memory else "-",
            str(instance.num_requests),
            milliseconds(instance.ready_ms) if instance.ready_ms is not None else "-",
        )
    return table


def verdict_text(verdict: Verdict) -> Table:
    """The body of `onecopy verify`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("INSTANCE", no_wrap=True)
    for name in ("PID", "WEIGHTS MAPPED", "RESIDENT", "SHARE", "PRIVATE", "KV"):
        table.add_column(name, justify="right", no_wrap=True)
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


def verdict_lines(verdict: Verdict) -> str:
    """What the table adds up to."""
    count = len(verdict.instances)
    shares = (
        f"{megabytes(verdict.weights_bytes)} of weights in {verdict.segment} (inode "
        f"{verdict.inode}); the instances' shares of them add up to "
        f"{megabytes(verdict.weights_pss_bytes)}."
    )
    if not verdict.holds:
        problems = [f"  - {problem}" for problem in verdict.problems]
        return "\n".join((shares, "One copy: DOES NOT HOLD.", *problems))
    return "\n".join(
        (
            shares,
            f"{count} instances take {megabytes(verdict.total_bytes)}; {count} private copies "
            f"would take {megabytes(verdict.unshared_bytes)}.",
            "One copy: holds.",
        )
    )
