"""What a running server says of the models that it serves, as checks of `onecopy doctor`.

Owns the question. Invariant: it is bounded, and where nothing runs nothing is said. Does not judge
the machine.
"""

from pathlib import Path
from typing import Final

from allocator import RuntimeDir, RuntimeDirError
from server.admin.client import AdminClient, AdminError, NoServer
from server.admin.schemas import ModelStatus
from server.machine import checks
from server.machine.checks import Check

_ANSWER_S: Final = 3.0
_NAME: Final = "served model"


def served_models(runtime_dir: Path | None) -> list[Check]:
    """Whether the server answers, instances can start, and models' files are what it serves."""
    try:
        status = AdminClient(RuntimeDir.open(runtime_dir, create=False), _ANSWER_S).status()
    except (NoServer, RuntimeDirError):  # said by other checks
        return []
    except AdminError as error:
        return [checks.problem(_NAME, str(error), "see the server's log")]
    return [check for one in status.models for check in _of(one)]


def _of(model: ModelStatus) -> list[Check]:
    found = []
    if model.start_error is not None:
        seen = f"instances can't start: {model.start_error}"
        found.append(checks.problem(_NAME, seen, "see above"))
    if model.changed_files:
        seen = f"{model.path} has changed since it was loaded: {'; '.join(model.changed_files)}"
        fix = "`onecopy reload` serves it as it is now; until then it is served as it was"
        found.append(checks.warning(_NAME, seen, fix))
    return found or [checks.ok(_NAME, f"{model.model}, as it lies at {model.path}")]
