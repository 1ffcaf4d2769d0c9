"""A grammar's cell whose memory a text can break: it then answers what is no answer.

Launched by a warden in place of `workers.grammar.follower`. After the token of a character of
`NONSENSE` it says that instead of where it is.
"""

from typing import Any, Final

import msgspec

from workers.grammar import follower
from workers.grammar.follower import Follow, Position, ToCell, prepare, run

__all__ = ["NONSENSE", "prepare", "run"]

FIRST: Final = 33
"""The character of token 0."""
NONSENSE: Final[dict[str, bytes]] = {
    "V": b"\xc1\x00nonsense",
    "W": msgspec.msgpack.encode({"type": "position", "sequence": "none"}),
    "X": msgspec.msgpack.encode(Position(0, 1, b"\x01", False, False, 0.0)),
    "Y": b"\x82\xa4type\xa6failed\xa7message\xa2\xff\xfe",
    "Z": b"\x82\xa4type\xa6failed\xa5other" + b"\x91" * 100_000 + b"\xc0",
}


class _Broken(follower._Follower):
    def answer(self, message: ToCell) -> Any:
        answer = super().answer(message)
        if isinstance(message, Follow) and message.tokens:
            said = NONSENSE.get(chr(message.tokens[-1] + FIRST))
            return answer if said is None else msgspec.Raw(said)
        return answer


follower._Follower = _Broken  # type: ignore[misc]
