"""Who rounds: the compiled library where there is one for this machine, else numpy.

Owns the choice. Invariant: it changes no bit.
"""

import os
from typing import Final

from workers.model.native.library import Unavailable
from workers.quantize.native import NativeRounding
from workers.quantize.reference import NumpyRounding
from workers.quantize.tile import Rounding

VARIABLE: Final = "ONECOPY_ROUNDING"
"""Environment variable that names who rounds: avx2, portable or numpy."""
SETS: Final = ("avx2", "portable")
"""The best first."""


def rounding() -> Rounding:
    """The one that $ONECOPY_ROUNDING names, else the quickest here. Raises Unavailable."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted == "numpy":
        return NumpyRounding()
    if wanted != "auto":
        if wanted not in SETS:
            raise Unavailable(f"{VARIABLE}={wanted} is not one of {', '.join(SETS)}, numpy")
        return NativeRounding(wanted)
    for name in SETS:
        try:
            return NativeRounding(name)
        except Unavailable:
            continue
    return NumpyRounding()
