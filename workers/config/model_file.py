"""Files of a model's folder, opened and read so that no folder can harm who reads it.

Owns the opening. Invariants: only regular files are opened, so nothing is ever waited for; nothing
is read of a file that is larger than its kind of file can be. Does not know what they hold.
"""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from workers.errors import CheckpointCorrupt, CheckpointNotFound

MAX_JSON_BYTES: Final = 8 << 20
"""Of a config; what one of them holds can take thirty times as much in memory."""
MAX_TOKENIZER_BYTES: Final = 256 << 20
_KINDS: Final[Mapping[str, Callable[[int], bool]]] = {
    "a folder": stat.S_ISDIR,
    "a named pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def file_status(path: Path) -> os.stat_result:
    """Of the regular file there, or to which the link there leads. Raises CheckpointNotFound,
    CheckpointCorrupt."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return _checked(path, status)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the regular file there, closed at the end. What happens under it with an
    OSError is said of the file, too. Raises as `file_status` does."""
    file_status(path)  # opening a device can do something by itself
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            _checked(path, os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from error


def read_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All of it. Raises as `opened` does."""
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise CheckpointCorrupt(
            f"{path} has more than {max_bytes >> 20} MiB, which no file of its kind needs: "
            "download it again"
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises as `opened` does."""
    try:
        content = read_file(path)
        value = json.loads(content)
        if b"\\u" in content:  # an escape can stand for half a pair of surrogates, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointCorrupt(f"{path} holds half of a surrogate pair, no text") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"{path} does not hold a JSON object")
    return value


def file_identity(path: Path) -> str:
    """Changes whenever the file's content may have changed, without reading it. Raises as
    `file_status` does."""
    return identity_of(file_status(path))


def identity_of(status: os.stat_result) -> str:
    """The same of a file that is open."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def unreadable(path: Path, error: OSError | ValueError) -> CheckpointNotFound:
    """What to say of a file that is there no more, or may not be read."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return CheckpointNotFound(
        f"{path} can't be read ({reason}): check its permissions as user id "
        f"{os.geteuid()}, or download the model again"
    )


def _checked(path: Path, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        kinds = (kind for kind, is_of in _KINDS.items() if is_of(status.st_mode))
        raise CheckpointCorrupt(
            f"{path} is {next(kinds, 'no regular file')}, and not the file that belongs there: "
            "download it again"
        )
    return status
