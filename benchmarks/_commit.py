"""Which commit is measured. Nothing but the standard library, and no need of git."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """As git has it; `$ONECOPY_COMMIT` where git is missing, or this is a copy without history."""
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        ).stdout.strip()
    except FileNotFoundError:
        described = ""
    return described or os.environ.get("ONECOPY_COMMIT") or "unknown"
