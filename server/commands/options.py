"""What commands have in common: shared options, and how they end.

Invariants: every expected failure is one line on stderr that names the fix, and exit status 1; with
`--json` stdout holds one JSON document and nothing else.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from allocator import AllocatorError
from server import console
from server.admin import NoServer
from server.errors import ServerError
from server.fleet import StartError
from server.memory import NoSuchModel
from server.model_source import ModelNotFound
from server.plan import PlanFailed
from server.proof import NothingToProve
from server.serve import AddressInUse
from server.sleep import CannotSleep
from workers import CheckpointError

RuntimeDirOption = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        envvar="ONECOPY_RUNTIME_DIR",
        help="Directory of the sockets; who shares it shares memory. Default: $RUNTIME_DIRECTORY, "
        "else $XDG_RUNTIME_DIR/onecopy, else a private temporary directory.",
        show_default=False,
        readable=False,  # not judged here: RuntimeDir names the fix
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="The served model, or a weight set as `onecopy ps --memory` names it. Not needed "
        "where there is only one.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except (
        AddressInUse,
        AllocatorError,
        CannotSleep,
        CheckpointError,
        ModelNotFound,
        NoServer,
        NoSuchModel,
        NothingToProve,
        PlanFailed,
        ServerError,
        StartError,
    ) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(f"--{e['loc'][0]}: {e['msg']}" for e in error.errors()))


def fail(message: str) -> None:
    console.err.print(f"onecopy: {message}", markup=False)
    raise typer.Exit(1)


def print_json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
