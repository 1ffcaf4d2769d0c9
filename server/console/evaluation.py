"""The table of `onecopy eval`."""

from rich.table import Table

from server.conformance.evaluate import Evaluation
from server.units import size_text


def evaluation_heading(found: Evaluation) -> str:
    """What stands above the table."""
    beside = f", beside {found.reference}" if found.reference is not None else ""
    windows = f"{found.num_windows} windows of up to {found.window_tokens} tokens"
    return f"{found.text.name}: {windows}{beside}\n"


def evaluation_table(found: Evaluation) -> Table:
    """The body of `onecopy eval`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MODEL")
    names = ["ON DISK", "PERPLEXITY"]
    if found.reference is not None:
        names += ["MORE", "KL, NATS A TOKEN", "SAME FAVOURITE"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.models:
        cells = [size_text(one.bytes_on_disk), f"{one.perplexity:.3f}"]
        if one.loss_percent is not None:
            cells += [f"{one.loss_percent:+.2f} %", f"{one.divergence:.5f}"]
            cells += [f"{one.same_percent:.1f} %"]
        table.add_row(one.model, *cells)
    return table
