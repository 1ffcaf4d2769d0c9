"""Which cases of a long table are tried while one works: a few, and the whole suite tries all."""

from collections.abc import Iterable
from typing import Any

import pytest


def few_quick(values: Iterable[Any], every: int = 8) -> list[Any]:
    """For `parametrize`: all of them, of which one in `every`, the first to begin with, is not
    marked as slow."""
    return [
        value if number % every == 0 else pytest.param(value, marks=pytest.mark.slow)
        for number, value in enumerate(values)
    ]
