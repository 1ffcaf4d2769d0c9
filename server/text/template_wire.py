"""What the server and a template's process agree on: frames, and a bound."""

import json
from typing import Any, Final

HEADER_BYTES: Final = 4
ADDRESS_SPACE_BYTES: Final = 1 << 30
"""Of the template's process."""


def frame(value: Any) -> bytes:
    """Its length, then it, as JSON in ASCII."""
    content = json.dumps(value).encode()
    return len(content).to_bytes(HEADER_BYTES, "big") + content
