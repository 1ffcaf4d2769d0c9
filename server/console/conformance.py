"""The table and lines of `onecopy check`."""

from collections.abc import Iterator
from typing import Final

from rich.table import Table
from rich.text import Text

from server.conformance.check import Conformance
from server.conformance.differences import Difference

_SHOWN: Final = 5
"""Differences of each kind; `--json` has all."""
_AROUND: Final = 6
_CHARS_AROUND: Final = 40
_WHAT: Final = {
    "tokens": "texts, as tokens",
    "chats": "chats, as prompts",
    "greedy": "greedy tokens",
}


def conformance_heading(found: Conformance) -> str:
    """What stands above the table."""
    return f"{found.model}, as here and as by {found.against}\n"


def conformance_table(found: Conformance) -> Table:
    """The body of `onecopy check`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("COMPARED", "SAME", "NEAR", "DIFFER"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("BY")
    for part in found.parts:
        if part.failed or part.skipped:
            table.add_row(_WHAT[part.name], *"----", Text(part.failed or part.skipped))
            continue
        differ = part.num_compared - part.num_same - part.num_near
        counts = (part.num_compared, part.num_same, part.num_near, differ)
        by = f"{part.reference}; {part.note}" if part.note else part.reference
        table.add_row(_WHAT[part.name], *map(str, counts), Text(by))
    return table


def conformance_lines(found: Conformance) -> str:
    """What differs, and the verdict."""
    lines = [""]
    for part in found.parts:
        for one in part.differences[:_SHOWN]:
            lines += [f"{_WHAT[part.name]}: {one.sample[:_CHARS_AROUND]!r}", *_sides(one)]
        if more := len(part.differences) - _SHOWN:
            lines += [f"  and {more} more: see --json"] * (more > 0)
    return "\n".join([*lines, _verdict(found)])


def _sides(one: Difference) -> Iterator[str]:
    for whose, side in (("here", one.ours), ("there", one.theirs)):
        if isinstance(side, str):
            begin = max(0, one.at - _CHARS_AROUND)
            shown = repr(side[begin : one.at + _CHARS_AROUND])
        else:
            begin = max(0, one.at - _AROUND)
            shown = " ".join(map(str, side[begin : one.at + _AROUND]))
        yield f"  {whose:5} {'… ' * (begin > 0)}{shown}"


def _verdict(found: Conformance) -> str:
    if found.same:
        return "Same."
    failed = [_WHAT[part.name] for part in found.parts if part.failed]
    differ = [_WHAT[part.name] for part in found.parts if part.differences]
    told = [f"DIFFERS: {', '.join(differ)}."] if differ else []
    told += [f"NOT COMPARED: {', '.join(failed)}."] if failed else []
    return " ".join(told)
