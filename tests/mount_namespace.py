"""A program of the tests on a file system of its own, which nothing else sees.

Owns the mount namespace. Invariant: it ends with the program.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.daemon_process import ROOT

_TIMEOUT_S = 600
_MOUNT = 'mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"'


def run_on_tmpfs(options: str, mount_point: str, module: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that `python -m module` prints where a tmpfs with these options is mounted.
    Skips where this user can't mount one."""
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"this user can't make a mount namespace: {probe.stderr.strip()}")
    program = [sys.executable, "-m", module, *arguments]
    finished = subprocess.run(
        ["unshare", "-m", "sh", "-c", _MOUNT, options, mount_point, *program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found
