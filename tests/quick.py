"""How much of what has no end is tried, of random examples, rounds, cases of a long table: what
shows each rule in the ordinary run, more in the long one (`make test-long`), less while one works.
"""

import os
from collections.abc import Iterable
from typing import Any, Final, TypeVar

import pytest

LONG: Final = bool(os.environ.get("ONECOPY_LONG_TESTS"))
"""Whether this is the long run."""

T = TypeVar("T")

long_run = pytest.mark.skipif(
    not LONG, reason="the long run alone: what it shows, another test does at less cost"
)
"""For a test beside the one that shows its rule."""


def usual_or_long(usual: T, long: T) -> T:
    """A size: of the ordinary run, and of the long one."""
    return long if LONG else usual


def few_quick(values: Iterable[Any], every: int = 8) -> list[Any]:
    """For `parametrize`: all of them, of which one in `every`, the first to begin with, is not
    marked as slow."""
    return [
        value if number % every == 0 else pytest.param(value, marks=pytest.mark.slow)
        for number, value in enumerate(values)
    ]
