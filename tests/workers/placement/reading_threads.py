"""Both kinds of threads that a reader can have, for the tests to choose one."""

from collections.abc import Callable

from workers.model.native.library import Unavailable
from workers.placement import native_reading

KINDS = ("native", "python")


def unavailable() -> None:
    """In place of `native_reading.load`."""
    raise Unavailable("not compiled when onecopy was installed")


def loaded(kind: str) -> Callable[[], object]:
    """What `native_reading.load` has to be for readers to have threads of this kind. Raises
    Unavailable."""
    if kind == "python":
        return unavailable
    native_reading.load()
    return native_reading.load


def use(kind: str) -> None:
    """From now on in this process."""
    native_reading.load = loaded(kind)
