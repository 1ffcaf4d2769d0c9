"""What tests must know of the processor that they run on."""

import pytest

from workers.native.library import Unavailable, load


def why_not_native() -> str:
    """Why the native decoder can't be used here; "" where it can."""
    try:
        load()
    except Unavailable as reason:
        return str(reason)
    return ""


answers_depend_on_company = pytest.mark.xfail(
    bool(why_not_native()),
    reason="transformers' modules round otherwise in company and behind a prefix that was found; "
    f"the native decoder does not, but can't be used here: {why_not_native()}",
    strict=False,  # alone, with nothing in the prefix cache, some pass
)
"""For tests that one seed gives one text, whatever else runs."""
