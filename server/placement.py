"""Where a model's layers were chosen to be, for whoever tells a person of it.

Owns nothing. Invariant: what is told is what is served: `options` say the same to `onecopy serve`.
"""

from pydantic import BaseModel


class Placement(BaseModel, frozen=True):
    """What was chosen where nothing was said, and why, in sentences."""

    options: tuple[str, ...]
    """Each with its value; none where the defaults are it."""
    fits: bool
    reasons: tuple[str, ...]
