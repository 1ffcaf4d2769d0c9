"""The table and line of `onecopy doctor`."""

from collections.abc import Sequence
from typing import Final

from rich.table import Table
from rich.text import Text

from server.machine.checks import Check

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
