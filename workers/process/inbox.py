"""What the server sends, where it is not what it should be."""

import msgspec


def named(frame: bytes) -> str:
    """The request that a message seems to be about; "" where it names none."""
    try:
        message = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    name = message.get("request_id") if isinstance(message, dict) else None
    return name if isinstance(name, str) else ""
