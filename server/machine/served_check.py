"""What a running server says of the model that it serves, as a check of `onecopy doctor`.

Owns the question. Invariant: it is bounded, and where nothing runs nothing is said. Does not judge
the machine.
"""

from pathlib import Path
from typing import Final

from allocator import RuntimeDir, RuntimeDirError
from server.admin.app import AdminClient, AdminError, NoServer
from server.machine import checks
from server.machine.checks import Check

_ANSWER_S: Final = 3.0


def served_model(runtime_dir: Path | None) -> list[Check]:
    """Whether the server answers, its instances can start, and its files are what it serves."""
    try:
        status = AdminClient(RuntimeDir.open(runtime_dir, create=False), _ANSWER_S).status()
    except (NoServer, RuntimeDirError):  # said by other checks
        return []
    except AdminError as error:
        return [checks.problem("served model", str(error), "see the server's log")]
    found = []
    if status.start_error is not None:
        found.append(
            checks.problem(
                "served model", f"instances can't start: {status.start_error}", "see above"
            )
        )
    if status.changed_files:
        seen = f"{status.path} has changed since it was loaded: {'; '.join(status.changed_files)}"
        fix = "`onecopy reload` serves it as it is now; until then it is served as it was"
        found.append(checks.warning("served model", seen, fix))
    return found or [checks.ok("served model", f"{status.model}, as it lies at {status.path}")]
