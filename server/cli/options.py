"""What commands have in common: shared options, and how they end.

Invariants: every expected failure is one line on stderr that names the fix, and exit status 1; with
`--json` stdout holds one JSON document and nothing else.
"""

import contextlib
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from pydantic import ValidationError

from allocator import AllocatorError
from server import console
from server.address import AddressInUse
from server.admin.client import AdminError
from server.admin.weight_sets import NoSuchModel
from server.background import WorkEnded
from server.cli.setting_options import option
from server.conformance.evaluate import EvaluationFailed
from server.errors import ServerError
from server.fleet.starts import StartError
from server.machine.plan import PlanFailed
from server.machine.proof import NothingToProve
from server.models.source import ModelNotFound
from workers import (
    CheckpointError,
    InvalidSetting,
    OutputDamaged,
    OutputExists,
    QuantizationRefused,
    ReferenceMissing,
)

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
        AdminError,
        AllocatorError,
        CheckpointError,
        EvaluationFailed,
        InvalidSetting,
        ModelNotFound,
        NoSuchModel,
        NothingToProve,
        OutputDamaged,
        OutputExists,
        PlanFailed,
        QuantizationRefused,
        ReferenceMissing,
        ServerError,
        StartError,
        WorkEnded,
    ) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(f"{option(str(e['loc'][0]))}: {e['msg']}" for e in error.errors()))
    except BrokenPipeError:
        raise  # of whoever reads our output
    except OSError as error:
        fail(_about(error))


def _about(error: OSError) -> str:
    """What this machine could not do, and what to do about it."""
    where = f"{error.filename}: " if error.filename is not None else ""
    what = f"{where}{error.strerror or error}"
    fix = _FIXES.get(error.errno or 0)
    return f"{what}: {fix}" if fix else what


_FIXES: Final = {
    errno.EMFILE: "too few files may be open at once; raise the limit, `ulimit -n 4096`",
    errno.ENFILE: "the machine has too many open files; raise the sysctl fs.file-max",
    errno.ENOMEM: "end other programs, or raise the memory limit",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EROFS: "choose another place, or mount it writable",
    errno.EACCES: "change its permissions, or run as its owner",
}


def fail(message: str) -> NoReturn:
    """One line, whatever the message holds."""
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    console.err.print(f"onecopy: {line}", markup=False)
    raise typer.Exit(1)


def print_json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
