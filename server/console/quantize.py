"""What a person sees while a checkpoint is quantized, and once it is."""

import dataclasses
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from server.console.terminal import err
from server.units import size_text
from workers import QuantizeMade, QuantizeProgress

_LINE_S: Final = 5.0
"""Without a terminal there is a line as often."""


class QuantizeDisplay:
    """A bar on a terminal, elsewhere a line now and then: bytes, speed, how long it will take, and
    this process's own memory."""

    def __init__(self, model: str):
        self._model = model
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._bar.add_task(model, total=None, told="")
        self._began = self._told = time.monotonic()
        self._phase = ""
        self._base_bytes = _own_bytes()
        self.peak_bytes = 0
        """Own memory beyond what there was before, as far as it was looked at."""

    def show(self, progress: QuantizeProgress) -> None:
        """Draw the present state."""
        now = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._began = progress.phase, now
        own = max(0, _own_bytes() - self._base_bytes)
        self.peak_bytes = max(self.peak_bytes, own)
        told = self._line(progress, now - self._began, own)
        self._bar.update(
            self._task,
            description=f"{progress.phase} {self._model}",
            completed=progress.done_bytes,
            total=progress.total_bytes,
            told=told,
        )
        if not err.is_terminal and now - self._told >= _LINE_S:
            self._told = now
            err.print(f"{progress.phase} {self._model}: {told}", markup=False)

    def _line(self, progress: QuantizeProgress, seconds: float, own: int) -> str:
        new = progress.done_bytes - progress.resumed_bytes * (progress.phase == "rounding")
        speed = new / seconds if seconds else 0.0
        left = progress.total_bytes - progress.done_bytes
        rest = f"{left / speed:,.0f} s left" if speed else "waiting"
        return (
            f"{size_text(progress.done_bytes)} of {size_text(progress.total_bytes)}, "
            f"{speed / 1e6:,.0f} MB/s, {rest}, memory {size_text(own)} "
            f"(peak {size_text(self.peak_bytes)})"
        )

    def summary(self, made: QuantizeMade) -> str:
        """A line of what was made, at what speed, in how much memory."""
        speed = (made.source_bytes - made.resumed_bytes) / max(made.seconds, 1e-9) / 1e6
        resumed = (
            f", of which an earlier run had done {size_text(made.resumed_bytes)}"
            if made.resumed_bytes
            else ""
        )
        bits = (
            ""
            if made.bits_per_weight is None
            else f", {made.bits_per_weight:.3f} bits for each weight that was rounded"
        )
        return (
            f"\n{made.destination}: {size_text(made.output_bytes)} of "
            f"{size_text(made.source_bytes)}{resumed}{bits}.\n{made.seconds:,.1f} s, "
            f"{speed:,.0f} MB/s, {size_text(self.peak_bytes)} of memory; all of it was read back "
            "from the disk."
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


def made_table(made: QuantizeMade) -> Table:
    """What became of which tensors."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("TENSORS", "", "FROM", "TO"):
        table.add_column(name, justify="left" if name in ("TENSORS", "") else "right")
    for group in sorted(made.groups, key=lambda one: -one.source_bytes):
        size = f", groups of {made.group_size}" if made.group_size else ", a scale for each row"
        how = f"{made.scheme}{size}" if group.action == "round" else "as they are"
        table.add_row(
            f"{group.num_tensors:,} {group.reason}",
            how,
            size_text(group.source_bytes),
            size_text(group.output_bytes),
        )
    return table


def made_document(made: QuantizeMade, peak_bytes: int) -> dict[str, Any]:
    """The same for programs."""
    return {
        **dataclasses.asdict(made),
        "destination": str(made.destination),
        "peak_bytes": peak_bytes,
    }


def _own_bytes() -> int:
    """This process's anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0
