"""Whether an error of a computation is the end of the device for this process.

Invariant: an instance that can compute nothing any more does not go on to answer with errors. Knows
nothing of devices: who makes an engine says how to ask.
"""

from collections.abc import Callable

from workers.errors import DeviceLost

Fault = Callable[[], str | None]
"""Why the device can't be used any more by this process; None where it can."""


def no_fault() -> None:
    """Of the processor."""
    return


def require_device(fault: Fault, error: Exception) -> None:
    """After `error`, go on only with a device that still works. Raises DeviceLost.

    An error that a kernel leaves behind is met by whatever is called next, so that it seems to be
    that call's own; memory that ran out is no such error.
    """
    reason = fault()
    if reason is not None:
        raise DeviceLost(f"the device can't be used by this process any more: {reason}") from error
