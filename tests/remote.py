"""The program of another process, used as if it were here.

Owns the way from a method's call to the message that has it run there. Invariant: what the program
does not have is an error here, and is never sent. Knows nothing of how messages travel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

Program = TypeVar("Program")
Run = Callable[[str, Sequence[Any], Mapping[str, Any]], Any]


class _Remote:
    def __init__(self, program: type, run: Run) -> None:
        self._program = program
        self._run = run

    def __getattr__(self, method: str) -> Callable[..., Any]:
        getattr(self._program, method)
        return lambda *given, **named: self._run(method, given, named)


def remote(program: type[Program], run: Run) -> Program:
    """Each method of it calls `run` with its own name and what it was given."""
    return cast(Program, _Remote(program, run))
