"""A decoder of the `transformers` library, computing on tensors that someone else owns.

Owns the way from a config and a placement of weights to a model that answers a batch with logits.
Invariant: every parameter is one of the placement's tensors, never a copy and never written to; all
else that the model holds (rotary frequencies and the like) is small and private. Does not know
files, shared memory, scheduling or sampling, who computes the layers, or where their weights are.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from workers.config.architecture import architecture_errors
from workers.kv.layout import FULL
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.binding import bind
from workers.model.divided import Divided
from workers.model.geometry import Geometry, geometry_of
from workers.model.kernel_decoder import KernelDecoder
from workers.model.module_decoder import ModuleDecoder
from workers.model.native import load
from workers.model.native.architecture import NotNative
from workers.model.native.decoder import supports
from workers.model.stretch import Placement
from workers.model.tensor_parallel import Shard, narrow
from workers.packed_format import PackedFormat
from workers.ranks import Ranks
from workers.skeleton.buffers import move_buffers
from workers.skeleton.decoder import skeleton
from workers.skeleton.packed import NO_PARTS, put_packed


class Model:
    """A decoder and its weights. Made by `build_model`."""

    def __init__(
        self,
        module: Any,
        geometry: Geometry,
        placement: Placement,
        ranks: Ranks | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.geometry = geometry
        self.kernels: str | None = None
        """The native decoder's, once it computes."""
        self.passes: Callable[[Batch], AbstractContextManager[None]] = lambda _batch: nullcontext()
        """In which each pass is made: so other ranks are told of it."""
        self._placement = placement
        self._ranks = ranks
        self._shard = shard
        self._divided: Divided | None = None
        self._modules = ModuleDecoder(module, geometry, placement.device)
        placement.use(self._modules)

    @property
    def module(self) -> torch.nn.Module:
        """The `transformers` model underneath."""
        return self._modules.module

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._placement.device

    @property
    def workspace_bytes(self) -> int:
        """What attention of transformers' modules may take for itself."""
        return self._modules.workspace_bytes

    @workspace_bytes.setter
    def workspace_bytes(self, num_bytes: int) -> None:
        self._modules.workspace_bytes = num_bytes

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute the batch's tokens, which then belong to their tables.

        Returns the logits [num_logit_rows, vocab_size], in the model's dtype and on its device or
        float32 on the processor. If it raises, no table has changed. Raises ValueError where the
        batch has more rows than the native decoder was made for: the modules could not go on with
        its keys and values, which lie in another order.
        Raises RankError where other ranks can't go on.
        """
        with self.passes(batch):
            if self._divided is None:
                result = self._compute(batch)
            else:
                result = self._divided.forward(batch, self._compute)
        batch.commit()
        return result

    def _compute(self, batch: Batch) -> torch.Tensor:
        result: torch.Tensor | None = None
        for stretch in self._placement.stretches():
            result = stretch.forward(batch, result)
        assert result is not None  # noqa: S101 - there is a layer
        return result

    def divide_by(self, ranks: Ranks) -> None:
        """From now on compute, of each pass, this rank's part of the sequences; `ranks` all have
        the whole model, and their tables' blocks are the same memory."""
        self._divided = Divided(ranks, self.geometry.vocab_size)

    def accelerate(
        self,
        max_rows: int,
        max_model_len: int,
        num_threads: int,
        threads_now: Callable[[], int] | None = None,
        kernels: str = "auto",
    ) -> str | None:
        """From now on compute by the native decoder, on the same weights, batches of up to
        `max_rows` rows with up to `num_threads` threads; `threads_now` says how many for each, and
        `kernels` names the instruction set. Returns why not, where it does not know this model or
        this machine. No table may hold anything yet."""
        layout = self.geometry.kv_layout
        reason = supports(self.module, layout.dtype, kernels)
        if reason is not None:
            return reason
        try:
            decoder = KernelDecoder(
                self.module,
                layout,
                max_rows,
                max_model_len,
                num_threads,
                threads_now or (lambda: num_threads),
                load(kernels),
                self._ranks,
                self._shard,
            )
        except (NotNative, MemoryError) as error:
            return str(error)
        self._placement.use(decoder)
        self.kernels = decoder.kernels
        return None

    def compute_by_modules(self) -> None:
        """From now on compute by transformers' modules, as before `accelerate`. As there, and of
        keys and values that are not quantized."""
        self._placement.use(self._modules)
        self.kernels = None

    def warm_up(self, memory: PrivateSource | None = None) -> None:
        """Compute one token and forget it, so that what is slow the first time, or not supported
        by this architecture after all (`UnsupportedCheckpoint`), shows before a request does. Its
        keys and values are in `memory`, by default this process's own."""
        layout = self.geometry.kv_layout
        memory = memory or PrivateSource(layout, self.device)
        table = BlockTable(layout)
        table.grow(1, memory.lease(table.num_missing(1)))
        try:
            with architecture_errors(f"{self.geometry.architecture} can't compute a token"):
                self.forward(Batch.of([Part(table, [0], 1)]))
        finally:
            memory.release(table.clear())


def preload(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Import and warm up all that `build_model` will need for `config`, so that processes forked
    from here need not. Starts no threads and keeps no memory. Raises `UnsupportedCheckpoint`."""
    skeleton(config, dtype)


def build_model(
    config: Mapping[str, Any],
    placement: Placement,
    dtype: torch.dtype,
    eos_token_ids: Sequence[int] | None = None,
    ranks: Ranks | None = None,
    packed: Mapping[str, PackedFormat] | None = None,
    kv_bits: int = FULL,
) -> Model:
    """Bind the placement's tensors, named as in the checkpoint, to the architecture that `config`
    describes.

    `config` is the parsed JSON file; `eos_token_ids` None are its own. Tensors may be read-only
    memory and must stay mapped as long as the model lives. Of tied parameters, one is enough. Those
    that `packed` names hold packed weights. With less than 16 `kv_bits` keys and values are
    quantized, which the native decoder alone can compute. With
    `ranks` it is one rank's part, on views of the placement's whole tensors; all ranks then compute
    the same batches, and each has the logits of all of them together.
    Raises `UnsupportedCheckpoint`, `CheckpointMismatch`, `CheckpointCorrupt` and, with `ranks`,
    `InvalidSetting`.
    """
    module = skeleton(config, dtype)
    tensors = placement.tensors
    with architecture_errors(f"{type(module).__name__} can't be computed by this config.json"):
        shard = None
        if ranks is not None:
            shard = narrow(module, ranks.rank, ranks.num_ranks, packed)
            tensors = shard.views(tensors)
        parts = NO_PARTS if shard is None else shard.first_columns
        put_packed(module, packed or {}, dtype, parts)
        if shard is not None and ranks is not None:
            shard.sum_by(module, ranks)
        bind(module, tensors, dtype)
        move_buffers(module, placement.device)
        module.requires_grad_(False)
        module.eval()
        geometry = geometry_of(module, dtype, placement.device, eos_token_ids, shard, kv_bits)
        return Model(module, geometry, placement, ranks, shard)
