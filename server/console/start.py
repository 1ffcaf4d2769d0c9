"""What a person sees while a server starts, and once it serves."""

import json
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from server.admin.schemas import ServerStatus
from server.console.terminal import err
from server.fleet.instance import Instance
from server.machine.process_memory import ProcessMemory
from server.units import duration_text, size_text
from workers.messages import Loading

log = logging.getLogger("onecopy.server")

STALLED_S: Final = 5.0
"""A load that has not come on for so long is told of."""


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
        if stalled_s < STALLED_S:
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
    private = ", ".join(size_text(memory.private_bytes) for memory in known)
    shared = max((memory.shared_bytes for memory in known), default=0)
    starts = sorted(
        (one for one in status.instances if one.ready_ms is not None),
        key=lambda one: (not one.loaded, one.ready_ms),
    )
    times = ", ".join(
        f"{duration_text(one.ready_ms or 0)} ({'loaded' if one.loaded else 'attached'})"
        for one in starts
    )
    count = len(status.instances)
    option = f" --runtime-dir {runtime_dir}" if runtime_dir else ""
    return "\n".join(
        (
            f"onecopy {version} is ready: {status.model} on {status.url}",
            f"  instances  {count}, ready after {times}",
            f"  memory     {size_text(shared)} of weights, held once and mapped by {count} "
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
