"""What the server has done in cells: grammars tried out, large bodies read.

Each task has two descriptors, of what is given and of what was found. Owns nothing. Knows neither
how cells are bounded (`workers.process.warden`) nor who waits for them (`server.api.openai.cells`).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.openai import bodies
from workers import grammar_problem
from workers.messages import GrammarSpec


def prepare(_setup: Mapping[str, Any]) -> None:
    """So that no cell imports the library of grammars anew."""
    grammar_problem(GrammarSpec(kind="json_object"))


def run(kind: str, options: Mapping[str, Any], fds: Sequence[int]) -> None:
    """One task. What is found of a grammar is its problem, or nothing."""
    given, found = fds
    content = os.pread(given, os.fstat(given).st_size, 0)
    match kind:
        case "grammar":
            spec = GrammarSpec(kind=options["kind"], source=content.decode())
            answer = (grammar_problem(spec) or "").encode(errors="replace")
        case "body":
            answer = bodies.read_in_cell(content, options)
        case _:
            raise ValueError(f"there is no task {kind!r}")
    left = memoryview(answer)
    while left:
        left = left[os.write(found, left) :]
