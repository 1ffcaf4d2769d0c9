"""By which names the server may be called.

Owns the rule and its enforcement. Invariant: a web page whose name was made to point at this server
after it had been loaded (DNS rebinding) is refused, since its name stays in the Host header; so the
browser's same-origin policy keeps answers from pages of others. Knows nothing of what is served.
"""

import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.openai.errors import misdirected

_LOCAL: Final = frozenset({"localhost"})
_ANY: Final = "*"


class AllowedHosts:
    """What a Host header may say. On a loopback address: localhost and loopback addresses. On any
    other: every address, since only names can be rebound, and the machine's own name. In both
    cases the address or name that is served on, and what was allowed besides: names, `*.NAME` for
    all below one, or `*`."""

    def __init__(self, bound: str, allowed: Sequence[str] = ()) -> None:
        self._names = {_name(one) for one in (bound, *_LOCAL, *allowed)}
        address = _address(_name(bound))
        self._any_address = (
            not (address is not None and address.is_loopback) and bound not in _LOCAL
        )
        if self._any_address:
            own = _name(socket.gethostname())
            self._names |= {own, own.partition(".")[0]}

    def allows(self, host: str) -> bool:
        """`host` is the whole header, with or without a port."""
        name = _name(host)
        if _ANY in self._names or name in self._names:
            return True
        address = _address(name)
        if address is not None:
            return self._any_address or address.is_loopback
        parents = name.split(".")[1:]
        return any(f"*.{'.'.join(parents[n:])}" in self._names for n in range(len(parents)))


class HostCheck:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, allowed: AllowedHosts) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")
            # Without one it is HTTP/1.0, which no browser speaks.
            if host is not None and not self._allowed.allows(host):
                await misdirected(host)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    """Without port, brackets and a closing dot, in small letters."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
