"""The two consoles, and the log by way of them."""

import logging
import sys

from rich.console import Console

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Log lines by way of the console that draws the progress bar, so that they stand above it."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), markup=False)
