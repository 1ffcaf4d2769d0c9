"""The tables and lines of `onecopy ps`."""

from collections.abc import Mapping, Sequence
from typing import Final

from rich.table import Table

from server.admin.schemas import AllocatorStatus, InstanceStatus, ModelStatus, ServerStatus
from server.console.start import STALLED_S
from server.machine.process_memory import ProcessMemory
from server.units import duration_text, size_text

_FILES_SHOWN: Final = 3


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
    instances: Sequence[tuple[str, InstanceStatus]],
    memories: Mapping[int | None, ProcessMemory | None],
) -> Table:
    """The body of `onecopy ps`: each instance under the name of its model, with its further ranks;
    `memories` by their processes."""
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
    for model, instance in instances:
        table.add_row(
            instance.name,
            str(instance.pid or "-"),
            _state(instance),
            model,
            *_sizes(memories.get(instance.pid)),
            str(instance.num_requests),
            duration_text(instance.ready_ms) if instance.ready_ms is not None else "-",
        )
        for rank, pid in enumerate(instance.rank_pids, 1):
            table.add_row(f"  rank {rank}", str(pid), "", "", *_sizes(memories.get(pid)), "", "")
    return table


def _sizes(memory: ProcessMemory | None) -> tuple[str, str, str]:
    if memory is None:
        return "-", "-", "-"
    return (
        size_text(memory.shared_bytes),
        size_text(memory.private_bytes),
        size_text(memory.kv_bytes),
    )


def _state(instance: InstanceStatus) -> str:
    """With what is unusual about it."""
    text: str = instance.state
    if instance.unresponsive_s is not None:
        text += f", unresponsive for {instance.unresponsive_s:.0f} s"
    elif instance.stalled_s is not None and instance.stalled_s > STALLED_S:
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
