"""The keys and values of one sequence, in one private mapping of its own.

Owns the layout in memory and the mapping's life. A mapping is as long as the longest sequence may
get, but only touched pages cost memory. Invariant: committed tokens are never rewritten, and the
memory stays mapped as long as any tensor still views it. Does not know models, batches or who else
has a cache.

    one layer: [2, num_heads, capacity, head_dim]

    keys,   head 0  |tok 0|tok 1|...|tok n-1|  untouched: costs nothing  |
    keys,   head 1  |tok 0|tok 1|...|tok n-1|                            |
    values, head 0  |...                    ^ num_tokens                 ^ capacity
"""

import math
import mmap
import os
from collections import Counter
from dataclasses import dataclass

import torch

from workers.errors import OutOfKVMemory

MAPPING_NAME = "onecopy-kv"
"""How the mappings are named in /proc/PID/smaps: `/memfd:onecopy-kv (deleted)`."""


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one layer keeps of a token: `num_heads` keys and as many values of `head_dim`."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What all layers keep of a token, and the sizes that follow from it."""

    layers: tuple[KVLayer, ...]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds in the long run."""
        return sum(2 * layer.num_heads * self._row_bytes(layer) for layer in self.layers)

    def capacity(self, max_num_tokens: int) -> int:
        """`max_num_tokens` rounded up so that the stripe of every head fills whole pages."""
        multiple = math.lcm(
            *(
                mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._row_bytes(layer))
                for layer in self.layers
            )
        )
        return -(-max_num_tokens // multiple) * multiple

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of the pages that `num_tokens` tokens touch."""
        stripes = Counter[int]()
        for layer in self.layers:
            stripes[self._row_bytes(layer)] += 2 * layer.num_heads
        pages = sum(
            count * -(-num_tokens * row_bytes // mmap.PAGESIZE)
            for row_bytes, count in stripes.items()
        )
        return pages * mmap.PAGESIZE

    def _row_bytes(self, layer: KVLayer) -> int:
        return layer.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of one sequence of at most `max_num_tokens` tokens.

    A forward pass calls `append` once for each layer, then `commit` once. Without the commit the
    pass has not happened: the next one writes to the same place.
    """

    def __init__(
        self, layout: KVLayout, max_num_tokens: int, device: torch.device | None = None
    ) -> None:
        """`device` is the model's; only on the processor is untouched capacity free. Raises
        `OutOfKVMemory` where the memory is refused."""
        capacity = layout.capacity(max_num_tokens)
        sizes = [2 * layer.num_heads * capacity * layer.head_dim for layer in layout.layers]
        if device is None or device.type == "cpu":
            storage = _map_private(sum(sizes), layout.dtype)
        else:
            storage = _allocate(sum(sizes), layout.dtype, device)
        self._layout = layout
        self._capacity = capacity
        self._num_tokens = 0
        self._keys: list[torch.Tensor] = []  # of each layer: [1, num_heads, capacity, head_dim]
        self._values: list[torch.Tensor] = []
        for layer, part in zip(layout.layers, torch.split(storage, sizes), strict=True):
            keys, values = part.view(2, 1, layer.num_heads, capacity, layer.head_dim).unbind(0)
            self._keys.append(keys)
            self._values.append(values)

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are here, in every layer."""
        return self._num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory that the committed tokens hold; 0 once closed."""
        return self._layout.num_bytes(self._num_tokens)

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put `keys` and `values` [1, num_heads, num_new, head_dim] behind the committed ones.

        Returns all keys and all values up to and with the new ones, as views
        [1, num_heads, num_tokens + num_new, head_dim]. Raises `OutOfKVMemory` beyond the capacity
        or when closed.
        """
        num_new = keys.shape[2]
        end = self._num_tokens + num_new
        if not self._keys:
            raise OutOfKVMemory("the KV cache of this sequence was closed")
        if end > self._capacity:
            raise OutOfKVMemory(f"{end} tokens do not fit into a KV cache for {self._capacity}")
        all_keys = self._keys[layer].narrow(2, 0, end)
        all_values = self._values[layer].narrow(2, 0, end)
        all_keys.narrow(2, self._num_tokens, num_new).copy_(keys)
        all_values.narrow(2, self._num_tokens, num_new).copy_(values)
        return all_keys, all_values

    def commit(self, num_new: int) -> None:
        """Every layer has appended `num_new` tokens: they now belong to the sequence."""
        self._num_tokens += num_new

    def close(self) -> None:
        """Let the memory go. It is unmapped when the last view that someone took is gone too."""
        self._keys.clear()
        self._values.clear()
        self._num_tokens = 0


def _allocate(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.zeros(num_elements, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        raise OutOfKVMemory(
            f"the device can't hold {num_elements * dtype.itemsize >> 20} MiB for one sequence: "
            "serve with a smaller max_model_len"
        ) from error


def _map_private(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A zeroed mapping that has a name, is owned by the returned tensor's storage, and is
    committed page by page as it is touched. No file descriptor stays open."""
    num_bytes = num_elements * dtype.itemsize
    fd = os.memfd_create(MAPPING_NAME)
    try:
        os.ftruncate(fd, num_bytes)
        return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=num_elements, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise OutOfKVMemory(
            f"can't map {num_bytes >> 20} MiB for one sequence ({error}); "
            "serve with a smaller max_model_len"
        ) from error
    finally:
        os.close(fd)
