"""Who shares what was computed of a common beginning with whom.

Owns the rule. Invariant: requests that are to be kept apart never get the same salt, whatever salt
of their own they bring.

Without it anybody can find out what others have asked: a prompt whose beginning was computed before
is answered sooner, and `cached_tokens` says so.
"""

import hashlib
import json
import secrets
from typing import Final, Literal

SaltedBy = Literal["none", "key", "random"]


class CacheSalts:
    """`none`: all share; `key`: those that bring the same API key; `random`: all requests of this
    start of the server, and nobody else's."""

    def __init__(self, by: SaltedBy = "none") -> None:
        self._by: Final = by
        self._random = secrets.token_hex(16)

    def salt(self, own: str, authorization: str | None) -> str:
        """`own` is the request's own salt, "" for none; `authorization` its header."""
        if self._by == "none":
            return own
        given = self._random if self._by == "random" else _key(authorization)
        return hashlib.sha256(json.dumps([self._by, given, own]).encode()).hexdigest()


def _key(authorization: str | None) -> str:
    """The credentials, whatever their scheme. Who brings none shares with all who don't."""
    return (authorization or "").strip().partition(" ")[2].strip()
