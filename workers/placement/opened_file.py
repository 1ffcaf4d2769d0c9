"""A file that a reader reads, and in which of three ways it can be read.

Owns the descriptors. Invariants: only regular files are opened, so nothing is ever waited for;
which way a file allows is found out by a read, since neither a kernel's version nor a filesystem's
name tells.
"""

import mmap
import os
import stat
from errno import EINVAL, EISDIR, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Final

from workers.placement.reading import BLOCK, Access

UNCACHED_FLAG: Final = 0x80
"""RWF_DONTCACHE of preadv2(2), since Linux 6.14."""
REFUSALS: Final = (EINVAL, EOPNOTSUPP, ENOSYS)
"""What a read says where a way of reading is not to be had."""


class OpenedFile:
    """Until `close`, which may be called more than once."""

    def __init__(self, path: Path, wanted: Access | None) -> None:
        """None: the first way in the order of `Access` that the file allows. Raises OSError, also
        where it does not allow the wanted one."""
        self.path: Final = path
        self.falls_back: Final = wanted is None
        self.direct = -1
        self._open: list[int] = []
        _check(path, path.stat())  # opening a device can do something by itself
        try:
            self.descriptor: Final = self._opened(path, os.O_NONBLOCK | os.O_NOCTTY)
            _check(path, os.fstat(self.descriptor))
            os.set_blocking(self.descriptor, True)
            self.access: Final = self._first_of(Access if wanted is None else (wanted,))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """No thread may read it any more."""
        while self._open:
            os.close(self._open.pop())

    def _opened(self, path: Path, flags: int) -> int:
        self._open.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags))
        return self._open[-1]

    def _first_of(self, ways: "type[Access] | tuple[Access]") -> Access:
        for access in ways:
            try:
                self._try(access)
            except NotImplementedError:  # a libc without preadv2
                continue
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
            else:
                return access
        names = " or ".join(access.name.lower() for access in ways)
        raise OSError(EOPNOTSUPP, f"its filesystem allows no {names} reads", str(self.path))

    def _try(self, access: Access) -> None:
        if access is Access.UNCACHED:
            os.preadv(self.descriptor, [bytearray(1)], 0, UNCACHED_FLAG)
        elif access is Access.DIRECT:
            # The same file, whatever lies at its path by now.
            self.direct = self._opened(Path(f"/proc/self/fd/{self.descriptor}"), os.O_DIRECT)
            with mmap.mmap(-1, BLOCK) as aligned:
                os.preadv(self.direct, [aligned], 0)


def _check(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(EINVAL, "Not a regular file", str(path))
