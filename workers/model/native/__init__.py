"""A native decoder for common families on CPUs, on the shared weights as they lie.

Here is what can be asked without importing torch: which instruction sets there are kernels for.
The decoder is `decoder.NativeDecoder`.
"""

from workers.model.native.library import (
    SETS,
    VARIABLE,
    Kernels,
    NotThisProcessor,
    Unavailable,
    load,
    usable,
)

__all__ = ["SETS", "VARIABLE", "Kernels", "NotThisProcessor", "Unavailable", "load", "usable"]
