"""Asking another library: a program of ours, run by the interpreter that has the library.

Owns that process. Invariant: whatever happens there, the answer is a JSON object, or an error that
says what was missing. Does not know what is asked. Imports no torch.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from allocator import module_environment
from workers.errors import WorkerError

ReferenceName = Literal["transformers", "llama.cpp"]

MISSING_STATUS: Final = 3
"""How a program ends that does not find its library."""
_PACKAGES: Final[Mapping[ReferenceName, str]] = {
    "transformers": "transformers torch",
    "llama.cpp": "xllamacpp",
}
_QUIET: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class ReferenceMissing(WorkerError):
    """It can't be run: it is not installed, or reads no such model."""


class ReferenceFailed(WorkerError):
    """It can't read this model, or did not answer."""


def ask_reference(
    name: ReferenceName,
    program: Path,
    request: Mapping[str, Any],
    *,
    python: str,
    deadline_s: float,
) -> dict[str, Any]:
    """What the program answers; that says what it reads. `python` is the interpreter that has the
    library. Raises ReferenceMissing, ReferenceFailed."""
    try:
        ended = subprocess.run(  # noqa: S603 - a program of ours, by an interpreter of the user's
            [python, "-P", os.fspath(program)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            env=module_environment(**_QUIET),
            check=False,
        )
    except OSError as error:
        raise ReferenceMissing(
            f"{python} can't be run ({error.strerror}): give --reference-python the Python "
            f"interpreter that has {_PACKAGES[name]}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ReferenceFailed(f"{name} took more than {deadline_s:.0f} s") from error
    if ended.returncode == MISSING_STATUS:
        raise ReferenceMissing(
            f"{name} is not there to compare with: {shlex.quote(python)} -m pip install "
            f"{_PACKAGES[name]}, or name an interpreter that has it with --reference-python"
        )
    if ended.returncode != 0:
        told = _last_error(ended.stderr) or f"exit status {ended.returncode}"
        raise ReferenceFailed(f"{name} can't read it: {told}")
    try:
        answer = json.loads(ended.stdout.rpartition("\n")[2])
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ReferenceFailed(f"{name} gave no answer that can be read")
    return answer


def _last_error(said: str) -> str:
    """Of all that it said the last line that speaks of an error, else the last."""
    lines = [" ".join(line.split())[:500] for line in said.splitlines() if line.strip()]
    return next(
        (one for one in reversed(lines) if "error" in one.lower()), lines[-1] if lines else ""
    )
