"""The device's memory as a person sees it in a terminal: who holds which bytes.

Owns the drawing. Invariant: shared bytes are drawn once, whoever maps them; the drawn parts add up
to the device.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from allocator.messages import Event, Region, Regions, Statistics, WeightSetStatistics
from server.units import size_text

_WIDTH: Final = 72
_STYLES: Final = {
    "weights": "blue",
    "idle": "bright_black",
    "leased": "green",
    "cached": "yellow",
    "free": "dim",
}
_GLYPHS: Final = {"weights": "█", "idle": "▓", "leased": "▒", "cached": "░", "free": "·"}


def memory_view(statistics: Statistics, regions: Regions) -> RenderableType:
    """One device: a bar of everything, its weight sets, the pool, and who holds what."""
    parts: list[RenderableType] = [
        Text(_headline(statistics), style="bold"),
        _bar(_shares(statistics), statistics.limit_bytes),
        _legend(statistics),
    ]
    if statistics.weight_sets:
        parts += [Text(), _weight_sets(statistics.weight_sets)]
    pool = statistics.pool
    if pool.num_leases or pool.num_blocks:
        parts += [
            Text(),
            Text(
                f"pool: {size_text(pool.leased_bytes)} in {pool.num_leases} leases, "
                f"{size_text(pool.cached_bytes)} in {pool.num_blocks} sealed blocks "
                f"({size_text(pool.evictable_bytes)} of them unpinned), fragmentation "
                f"{pool.fragmentation:.0%}"
            ),
            _pool_bar(regions),
        ]
    holders = [one for one in statistics.sessions if one.num_leases or one.num_pinned_blocks]
    if holders or statistics.sessions:
        parts += [Text(), _sessions(statistics)]
    for quota in statistics.quotas:
        parts.append(
            Text(
                f"quota of {quota.kind} {quota.name}: {size_text(quota.used_bytes)} of "
                f"{size_text(quota.limit_bytes)}"
            )
        )
    return Group(*parts)


def event_lines(events: Sequence[Event]) -> RenderableType:
    """What happened, the latest last."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for event in events:
        at = datetime.fromtimestamp(event.time_s).astimezone().strftime("%H:%M:%S")
        table.add_row(at, Text(event.kind, style="bold"), Text(event.text))
    return table


def _headline(statistics: Statistics) -> str:
    text = (
        f"{statistics.device}: {size_text(statistics.used_bytes)} of "
        f"{size_text(statistics.limit_bytes)} used"
    )
    if statistics.host_tier_bytes:
        text += f"; {size_text(statistics.host_tier_bytes)} asleep in host memory"
    return f"{text}; allocator pid {statistics.pid}"


def _shares(statistics: Statistics) -> list[tuple[str, int]]:
    on_device = [one for one in statistics.weight_sets if one.tier == "device"]
    shares = [("weights" if one.state != "idle" else "idle", one.num_bytes) for one in on_device]
    pool = statistics.pool
    shares += [("leased", pool.leased_bytes), ("cached", pool.cached_bytes)]
    shares.append(("free", max(0, statistics.limit_bytes - statistics.used_bytes)))
    return [(kind, num_bytes) for kind, num_bytes in shares if num_bytes]


def _bar(shares: Sequence[tuple[str, int]], total: int) -> Text:
    """At least one cell for whatever is there, so that nothing hides."""
    cells = [max(1, round(num_bytes / max(1, total) * _WIDTH)) for _, num_bytes in shares]
    while cells and sum(cells) > _WIDTH:
        cells[cells.index(max(cells))] -= 1
    bar = Text("▕")
    for (kind, _), count in zip(shares, cells, strict=True):
        bar.append(_GLYPHS[kind] * count, style=_STYLES[kind])
    bar.append(" " * (_WIDTH - sum(cells)) + "▏")
    return bar


def _legend(statistics: Statistics) -> Text:
    idle = sum(
        one.num_bytes
        for one in statistics.weight_sets
        if one.state == "idle" and one.tier == "device"
    )
    figures = {
        "weights": statistics.weights_bytes - idle,
        "idle": idle,
        "leased": statistics.pool.leased_bytes,
        "cached": statistics.pool.cached_bytes,
        "free": max(0, statistics.limit_bytes - statistics.used_bytes),
    }
    legend = Text(" ")
    for kind, num_bytes in figures.items():
        legend.append(_GLYPHS[kind], style=_STYLES[kind])
        legend.append(f" {kind} {size_text(num_bytes)}   ")
    return legend


def _weight_sets(weight_sets: Sequence[WeightSetStatistics]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("WEIGHT SET", "STATE", "TIER"):
        table.add_column(name)
    table.add_column("SIZE", justify="right")
    table.add_column("MAPPED BY")
    for one in weight_sets:
        state = f"{one.state}, pinned" if one.pinned else one.state
        tier = f"{one.tier}+image" if one.has_image and one.tier != "disk" else one.tier
        table.add_row(one.key, state, tier, size_text(one.num_bytes), _mapped_by(one))
    return table


def _mapped_by(one: WeightSetStatistics) -> str:
    if one.writer_pid is not None:
        share = one.written_bytes / one.num_bytes if one.num_bytes else 0.0
        return f"pid {one.writer_pid} writes, {share:.0%}"
    if one.reader_pids:
        pids = ", ".join(str(pid) for pid in sorted(set(one.reader_pids))[:12])
        return f"{pids}: once for all" if len(set(one.reader_pids)) > 1 else pids
    return f"nobody for {one.idle_s:.0f} s" if one.state == "idle" else "-"


def _pool_bar(regions: Regions) -> Text:
    """The pool by offset; free space at the end, which is most of it, is left out."""
    last = max((i for i, one in enumerate(regions.regions) if one.kind != "free"), default=-1)
    shown: Sequence[Region] = regions.regions[: last + 1]
    total = sum(one.num_bytes for one in shown)
    bar = _bar([(one.kind, one.num_bytes) for one in shown[:_WIDTH]], total)
    rest = regions.total_bytes - total
    bar.append(f" + {size_text(rest)} free" if rest else "")
    return bar


def _sessions(statistics: Statistics) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("PID", justify="right")
    for name in ("SESSION", "MODEL", "USER"):
        table.add_column(name)
    table.add_column("LEASED", justify="right")
    table.add_column("BLOCKS PINNED", justify="right")
    for one in statistics.sessions:
        label = f"{one.label or '-'} (adopted)" if one.adopted else one.label or "-"
        table.add_row(
            str(one.pid),
            label,
            one.model or "-",
            one.user or "-",
            size_text(one.leased_bytes),
            str(one.num_pinned_blocks),
        )
    return table
