"""Hidden states of whole texts, by the native kernels.

Owns the memory for the keys and values of the texts of a batch, one layer's, which the next layer
overwrites. Invariants: a text's states depend on that text alone; no padding is computed. Does not
know how states become a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from workers.kv.layout import FULL
from workers.model.native import library
from workers.model.native.architecture import describe, layers_of, padding_token
from workers.model.native.decoder import NativeDecoder

_BLOCK: Final = 16


@dataclass(frozen=True)
class _OneLayer:
    """All layers at the same place."""

    block_size: int
    layer_offsets: tuple[int, ...]
    bits: int = FULL
    open_places: tuple[tuple[int, int], ...] = ()


class NativeEmbedder:
    """Not for several threads at a time; they would wait for each other."""

    def __init__(
        self,
        module: Any,
        max_rows: int,
        max_model_len: int,
        num_threads: int,
        kernels: library.Kernels | None = None,
    ) -> None:
        """`module` has no head; `max_rows` are the tokens of a batch. Raises NotNative,
        library.Unavailable, ValueError, MemoryError."""
        layout = _OneLayer(_BLOCK, (0,) * len(layers_of(module)))
        self._decoder = NativeDecoder(module, layout, max_rows, max_model_len, num_threads, kernels)
        self.kernels: Final = self._decoder.kernels
        self.max_rows: Final = max_rows
        self._padding = padding_token(module)
        self.hidden_size: Final[int] = module.config.hidden_size
        heads = [layer.attention for layer in describe(module, layout).layers]
        self._block_bytes = max(2 * _BLOCK * one.num_kv_heads * one.head_dim * 2 for one in heads)
        self._block_bytes = -(-self._block_bytes // 64) * 64
        # Only what is used takes memory: at worst each token is a text of its own.
        self._memory = np.empty(max_rows * self._block_bytes + 64, np.uint8)
        self._base = -(-self._memory.ctypes.data // 64) * 64

    def takes(self, texts: Sequence[Sequence[int]]) -> bool:
        """Whether `forward` knows all tokens' positions. RoBERTa and its kin give a padding token
        the position of padding, also where it is part of the text."""
        return self._padding is None or not any(self._padding in text for text in texts)

    def forward(
        self, texts: Sequence[Sequence[int]], num_threads: int | None = None
    ) -> list[torch.Tensor]:
        """The last hidden states of each text, bf16 # [num_tokens, hidden_size]. Raises ValueError
        where the texts, none of them empty, have more than `max_rows` tokens in all."""
        lengths = np.array([len(text) for text in texts])
        num_rows = int(lengths.sum())
        starts = np.cumsum(lengths) - lengths
        hidden = torch.empty(num_rows, self._decoder.hidden_stride, dtype=torch.bfloat16)
        self._decoder.forward(
            np.fromiter((token for text in texts for token in text), np.int32, num_rows),
            (np.arange(num_rows) - np.repeat(starts, lengths)).astype(np.int32),
            np.repeat(np.arange(len(texts), dtype=np.int32), lengths),
            self._blocks(-(-lengths // _BLOCK)),
            np.empty(0, np.int32),
            num_threads=num_threads,
            hidden=hidden,
            norms_hidden=True,
        )
        states = hidden[:, : self.hidden_size]
        return list(torch.split(states, lengths.tolist()))

    def _blocks(self, counts: Any) -> Any:
        """The address of each text's blocks # [num_texts, most blocks], zeros behind."""
        index = np.arange(counts.max(initial=0))
        firsts = np.cumsum(counts) - counts
        blocks = firsts[:, None] + index
        addresses = self._base + blocks * self._block_bytes
        return np.where(index < counts[:, None], addresses, 0).astype(np.int64)

    def close(self) -> None:
        """Stop the threads and give the workspace back. A second time does nothing."""
        self._decoder.close()
