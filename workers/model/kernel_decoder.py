"""A decoder's layers by the native kernels, a stretch of them in one call.

Owns what a batch becomes for a call. Invariant: of a pass that raises nothing is kept. Does not
know how the kernels are called, or where weights are.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from workers.kv.layout import KVLayout
from workers.model.batch import Batch
from workers.model.native import Kernels
from workers.model.native.decoder import NativeDecoder
from workers.model.native.placed import PlacedLayer
from workers.model.stretch import LayerWeights
from workers.model.tensor_parallel import Shard
from workers.ranks import Ranks

_KEPT_BYTES: Final = 8 << 20
"""Logits of so many bytes stay mapped for the next pass: memory that is new each time costs a fault
for every page."""


class KernelDecoder:
    """See `workers.model.stretch.Decoder`."""

    def __init__(
        self,
        module: Any,
        layout: KVLayout,
        max_rows: int,
        max_model_len: int,
        num_threads: int,
        threads_now: Callable[[], int],
        kernels: Kernels,
        ranks: Ranks | None = None,
        shard: Shard | None = None,
    ) -> None:
        """For batches of up to `max_rows` rows; `threads_now` says how many of the `num_threads`
        compute one. With `ranks` the module is that `shard`, one rank's part. Raises NotNative,
        ValueError, MemoryError."""
        self._all_logits: Callable[[torch.Tensor], torch.Tensor] | None = None
        if ranks is not None and shard is not None:
            self._all_logits = functools.partial(shard.all_logits, ranks=ranks)
        self._native = NativeDecoder(
            module, layout, max_rows, max_model_len, num_threads, kernels, ranks
        )
        self._threads_now = threads_now

    @property
    def kernels(self) -> str:
        """Their instruction set."""
        return self._native.kernels.name

    @property
    def layers(self) -> Sequence[LayerWeights]:
        """Of each layer the weights that its structure points into."""
        return [layer.parameters for layer in self._native.layers]

    def whole(self) -> "_Stretch":
        """All layers by the structures that were made with the decoder."""
        return _Stretch(self._native, self._threads_now, None, self._all_logits)

    def stretch(self, first: int, weights: Sequence[LayerWeights]) -> "_Stretch":
        """Layers by structures that point into `weights`, made here."""
        own = self._native.layers[first : first + len(weights)]
        if not 0 < len(weights) == len(own):
            raise ValueError(f"{len(weights)} layers from {first} on of {len(self._native.layers)}")
        placed = tuple(layer.at(one) for layer, one in zip(own, weights, strict=True))
        return _Stretch(self._native, self._threads_now, placed, self._all_logits)


class _Stretch:
    """`layers` None are all, where the module has their weights."""

    def __init__(
        self,
        native: NativeDecoder,
        threads_now: Callable[[], int],
        layers: tuple[PlacedLayer, ...] | None,
        all_logits: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self._all_logits = all_logits
        self._native = native
        self._room = _Room(native.vocab_size)
        self._threads_now = threads_now
        self._layers = layers
        self._is_last = layers is None or layers[-1].index + 1 == len(native.layers)
        self._is_whole = layers is None or len(layers) == len(native.layers)

    def forward(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """One call of the kernels."""
        native = self._native
        if hidden is None and not self._is_whole:
            hidden = torch.empty(batch.num_rows, native.hidden_stride, dtype=torch.bfloat16)
        logit_rows = batch.logit_rows if self._is_last else batch.logit_rows[:0]
        logits = self._room.take(len(logit_rows))
        tables, addresses = batch.tables()
        native.forward(
            batch.token_ids,
            batch.positions,
            tables,
            addresses,
            logit_rows,
            logits,
            num_threads=self._threads_now(),
            layers=self._layers,
            hidden=hidden,
            open_blocks=batch.open_blocks(),
        )
        if not self._is_last and hidden is not None:
            return hidden
        if self._all_logits is not None and len(logits):
            return self._all_logits(logits)
        return logits


class _Room:
    """Memory for the logits of one pass after the other. Invariant: what somebody holds, in whole
    or in part, is not handed out again."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._kept = np.empty((0, vocab_size), np.float32)
        self._handed_out: weakref.ref[Any] = weakref.ref(self._kept[:])

    def take(self, num_rows: int) -> torch.Tensor:
        """fp32 # [num_rows, vocab_size], with anything in it."""
        if num_rows * self._vocab_size * 4 > _KEPT_BYTES or self._handed_out() is not None:
            return torch.empty(num_rows, self._vocab_size)
        if num_rows > len(self._kept):
            self._kept = np.empty((num_rows, self._vocab_size), np.float32)
        rows = self._kept[:num_rows]  # lives as long as any tensor that points into it
        self._handed_out = weakref.ref(rows)
        return torch.from_numpy(rows)
