"""What has to be there after a crash of the machine. Owns the syncing of folders."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk when this returns, as fsync(2) does not see to with a file's
    own descriptor. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
