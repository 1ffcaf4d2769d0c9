"""Which program asks a reference about text.

Owns the two, which lie beside this file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from workers import ReferenceName, ask_reference

_DEADLINE_S: Final = 600.0
_PROGRAMS: Final[Mapping[ReferenceName, str]] = {
    "transformers": "transformers_text.py",
    "llama.cpp": "llamacpp_text.py",
}


def ask(name: ReferenceName, python: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the program answers, run by that interpreter. Raises ReferenceMissing,
    ReferenceFailed."""
    program = Path(__file__).with_name(_PROGRAMS[name])
    return ask_reference(name, program, request, python=python, deadline_s=_DEADLINE_S)
