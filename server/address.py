"""The address that a server answers at: a TCP port or a Unix socket.

Owns the socket's file. Invariant: what another server answers at is never taken from it, what one
that is gone left behind is.
"""

import os
import socket
from pathlib import Path

from server.settings import Settings


class AddressInUse(Exception):
    """The HTTP address can't be had. The message names the fix."""


def bind(settings: Settings) -> tuple[socket.socket, str]:
    """The socket that requests come to, and what clients call it. Raises AddressInUse."""
    if settings.uds is not None:
        return bind_unix(settings.uds), f"unix:{settings.uds}"
    try:
        infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = infos[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise in_use(settings, error) from error
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return bound, f"http://{host}:{bound.getsockname()[1]}"


def in_use(settings: Settings, error: OSError) -> AddressInUse:
    """What can't be bound, or listened at."""
    return AddressInUse(
        f"can't serve on {settings.uds or f'{settings.host}:{settings.port}'}: {error.strerror}. "
        "Choose another --port (or --host), or stop what uses it."
    )


def bind_unix(path: Path) -> socket.socket:
    """For this user alone. Raises AddressInUse."""
    if os.fsencode(path).decode(errors="ignore") != str(path):
        raise AddressInUse(f"the name of {os.fsencode(path)!r} is no UTF-8: choose another --uds")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(os.fspath(path)) == 0:
                raise AddressInUse(f"another server answers on {path}: choose another --uds")
        if path.is_socket():
            path.unlink()  # left behind by a server that is gone
        bound.bind(os.fspath(path))
        path.chmod(0o600)
    except OSError as error:
        bound.close()
        raise AddressInUse(f"can't serve on {path}: {error.strerror or error}") from error
    return bound


def unbind(bound: socket.socket, uds: Path | None) -> None:
    """Nothing is left of it."""
    bound.close()
    if uds is not None:
        uds.unlink(missing_ok=True)
