"""Content addresses of blocks: equal digests mean equal keys and values.

A block's digest is SHA-256 of its predecessor's digest and its own token ids, and the first one's
predecessor names all else that keys and values depend on: the weights, the layout and the
tenant's salt. So equal digests mean equal tokens from the first on, under equal weights; nobody
without the salt can make one up. (The chain of hashes is that of W. Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", SOSP 2023, as vLLM builds on it.)

Pure. Knows nothing of memory.
"""

import hashlib
from array import array
from collections.abc import Sequence

from workers.kv.layout import FULL, KVLayout


def root_digest(weights: str, layout: KVLayout, salt: str = "") -> bytes:
    """The predecessor of a sequence's first block. `weights` identifies their bytes."""
    shape = [
        [(layer.num_heads, layer.head_dim) for layer in layers] for layers in layout.all_layers
    ]
    dtype = str(layout.dtype) if layout.bits == FULL else f"{layout.dtype} in {layout.bits} bits"
    facts = (weights, dtype, layout.block_size, shape, salt)
    return hashlib.sha256(repr(facts).encode()).digest()


def extend_chain(chain: list[bytes], root: bytes, token_ids: Sequence[int], size: int) -> None:
    """Add to `chain` the digests of those full blocks of `size` tokens that it lacks."""
    for start in range(len(chain) * size, len(token_ids) - size + 1, size):
        tokens = array("i", token_ids[start : start + size]).tobytes()
        chain.append(hashlib.sha256((chain[-1] if chain else root) + tokens).digest())
