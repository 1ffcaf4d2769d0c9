"""Programs of ours that a test runs in its own process, which has imported what they import."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess

import pytest


def run_here(main: Callable[[], int], *arguments: str, reads: str = "") -> CompletedProcess[bytes]:
    """What a process of its own would answer, from one thread at a time."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as given, redirect_stdout(out), redirect_stderr(err):
        given.setattr(sys, "argv", ["program", *arguments])
        given.setattr(sys, "stdin", io.StringIO(reads))
        status = main()
    return CompletedProcess(arguments, status, out.getvalue().encode(), err.getvalue().encode())
