"""Our own modules as programs, in processes of their own.

Owns the one way in which they are started. Invariant: what a child imports does not depend on the
folder that it is started in: a `server.py`, a `queue.py` or a `torch.py` of the user's there is
never run (`python -m` would look there first; `-P` does not).
"""

import os
import site
import sys
from pathlib import Path
from typing import Final

_ROOT: Final = str(Path(__file__).resolve().parents[2])
"""Where our packages lie."""


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` by this interpreter; to be started with
    `module_environment`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, in which a child finds the packages of ours that
    this process runs, also where they are a checkout that nobody installed. What the user put into
    PYTHONPATH stays in front, but for empty entries, which few mean to be the working folder."""
    environment = {**os.environ, **changes}
    searched = [one for one in environment.get("PYTHONPATH", "").split(os.pathsep) if one]
    found_anyway = {*site.getsitepackages(), site.getusersitepackages(), *searched}
    if _ROOT not in map(os.path.realpath, found_anyway):
        searched.append(_ROOT)
    environment.pop("PYTHONPATH", None)
    if searched:
        environment["PYTHONPATH"] = os.pathsep.join(searched)
    return environment
