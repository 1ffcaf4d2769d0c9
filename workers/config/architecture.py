"""The border to the architectures of `transformers`: what a config may ask of them, and what
becomes of all that they raise.

Invariants: what a config asks for is bounded before anything is built by it; an exception of an
architecture's code ends as one of ours, whose message says what was tried. Knows no architecture.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from workers.errors import UnsupportedCheckpoint, WorkerError

log = logging.getLogger("onecopy.instance")

MAX_LAYERS: Final = 1024
"""The deepest decoders have some 200. Each costs a millisecond or two to build."""
MAX_EXPERTS: Final = 4096
MAX_SIZE: Final = 1 << 31
"""Of anything else that is counted, a vocabulary or a context, say."""
MAX_BUFFER_BYTES: Final = 256 << 20
"""Of all that an architecture computes from its config: tables of positions, frequencies, masks."""
_BOUNDS: Final = (
    (re.compile(r"(num|n)_(hidden_|decoder_|encoder_)?layers?$"), MAX_LAYERS),
    (re.compile(r"(num|n)_(\w+_)?(heads?|attention_heads|key_value_heads)$"), 1 << 16),
    (re.compile(r"(num|n)_(\w+_)?experts$"), MAX_EXPERTS),
    (re.compile(r"(hidden|head|intermediate|embedding|vocab|inner)(_size|_dim)$"), MAX_SIZE),
)
"""Names of sizes, as the families have them. What matches is a number from 1 on; but a model may
well have no experts."""
_MAX_DEPTH: Final = 8


def check_config(config: Mapping[str, Any], where: str = "config.json", depth: int = 0) -> None:
    """Refuse what no model has, in the config or in one inside it; `where` is told to a person.
    Raises UnsupportedCheckpoint."""
    if depth > _MAX_DEPTH:
        raise UnsupportedCheckpoint(f"{where} holds more than {_MAX_DEPTH} configs in another")
    if not isinstance(config.get("model_type", ""), str):
        raise UnsupportedCheckpoint(
            f"{where} says that model_type is {_shown(config['model_type'])}, which is no name"
        )
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_config(value, where, depth + 1)
        most = next((most for pattern, most in _BOUNDS if pattern.fullmatch(name)), None)
        if most is None or value is None or isinstance(value, list):
            continue
        least = 0 if most == MAX_EXPERTS else 1
        if not isinstance(value, int) or not least <= value <= most:
            raise UnsupportedCheckpoint(
                f"{where} says that {name} is {_shown(value)}; it can be a number from {least} to "
                f"{most:,}"
            )


def check_buffers(num_bytes: int) -> None:
    """Refuse what would take too much private memory. Raises UnsupportedCheckpoint."""
    if num_bytes > MAX_BUFFER_BYTES:
        raise UnsupportedCheckpoint(
            f"by config.json the model computes {num_bytes / 1e6:,.0f} MB of tables for each "
            f"instance, more than {MAX_BUFFER_BYTES / 1e6:.0f} MB: see whether its sizes are right"
        )


@contextlib.contextmanager
def architecture_errors(what: str) -> Iterator[None]:
    """Whatever is raised here is said of `what`, in one line, as an UnsupportedCheckpoint; errors
    of this room as they are."""
    try:
        yield
    except WorkerError:
        raise
    except Exception as error:
        log.debug("%s failed", what, exc_info=True)
        raise UnsupportedCheckpoint(f"{what}: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _shown(value: object) -> str:
    return repr(value)[:80]
