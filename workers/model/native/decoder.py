"""A `transformers` decoder computed by the native kernels, a whole step in one call.

Owns the decoder's handle, its rope tables and the checks of everything that a call is given.
Invariant: no pointer or index reaches the kernels unchecked; the addresses of blocks are the
caller's, who vouches that each is a block of the layout. The weights stay where they are. Does not
know requests, blocks' owners or sampling.
"""

import ctypes
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from workers.kv.layout import FULL, SECTION
from workers.model.native import library
from workers.model.native.architecture import (
    NotNative,
    PagedLayout,
    Rotation,
    base_of,
    describe,
    family_of,
    layers_of,
    longest,
    rope_tables,
)
from workers.model.native.placed import PlacedLayer
from workers.ranks import Ranks

_ROPE_STEP: Final = 1024  # positions whose rotations are computed at a time
_MAX_THREADS: Final = 256
_PADDING: Final = 32  # rows.h's kPad
_SPARE: Final = 16  # elements behind a rotation that a vector's load may reach

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def supports(module: Any, dtype: torch.dtype, kernels: str = "auto") -> str | None:
    """None if `NativeDecoder` computes `module`, else the reason why it does not."""
    if dtype != torch.bfloat16:
        return f"the native decoder computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        library.load(kernels)
        describe(module, None)
    except (library.Unavailable, NotNative) as reason:
        return str(reason)
    return None


def num_summed(max_rows: int, hidden_size: int) -> int:
    """Numbers that ranks sum at a time for passes of up to so many rows."""
    return max_rows * -(-hidden_size // _PADDING) * _PADDING


class NativeDecoder:
    """Not for several threads at a time; they would wait for each other.

    Its threads start with the first call, so it may be made before a fork and used after it.
    """

    def __init__(
        self,
        module: Any,
        layout: PagedLayout,
        max_rows: int,
        max_model_len: int,
        num_threads: int,
        kernels: library.Kernels | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`kernels` are by default the best that this machine can run. With `ranks` the module is
        one rank's part. Raises NotNative, library.Unavailable, ValueError, MemoryError."""
        self.kernels: Final = kernels or library.load()
        self._library = self.kernels.library
        if max_rows < 1 or max_model_len < 1 or not 1 <= num_threads <= _MAX_THREADS:
            raise ValueError("max_rows, max_model_len and num_threads must be positive")
        limit = longest(module)
        if limit is not None and max_model_len > limit:
            raise NotNative(f"there are no more than {limit} positions")
        if layout.block_size % 16:
            raise NotNative(f"blocks of {layout.block_size} tokens: not a multiple of 16")
        if layout.bits != FULL and layout.block_size % SECTION:
            raise NotNative(f"blocks of {layout.block_size} tokens: not a multiple of {SECTION}")
        if any(offset % 64 for offset in layout.layer_offsets):
            raise NotNative("layers that don't start at a multiple of 64 bytes")
        base = base_of(module)
        layers = layers_of(module)
        if len(layout.layer_offsets) != len(layers):
            raise ValueError("the layout is of another number of layers")
        described = describe(module, layout)
        spec, self._layers, self._kept = described.spec, described.layers, described.kept
        self.layers: Final = tuple(
            PlacedLayer(index, structure, dict(layer.named_parameters()))
            for index, (structure, layer) in enumerate(zip(described.layers, layers, strict=True))
        )
        """Each with its weights where the module has them."""
        self._ranks = ranks
        if ranks is not None:
            spec.ranks = _sums(ranks, num_summed(max_rows, spec.hidden_size))
        self._sees_all = family_of(module).sees_all
        self._rotary: Any = getattr(base, "rotary_emb", None)
        self._rope_kinds = rope_tables(module)
        self._rotation = Rotation(spec.rotation)
        half = spec.rotary_dim // 2
        # Only what is filled takes memory.
        self._cos = [_untouched(max_model_len, half) for _ in self._rope_kinds]
        self._sin = [_untouched(max_model_len, half) for _ in self._rope_kinds]
        self._num_rotations = 0
        for index, (cos, sin) in enumerate(zip(self._cos, self._sin, strict=True)):
            spec.rope_cos[index] = cos.data_ptr()
            spec.rope_sin[index] = sin.data_ptr()
        spec.max_rows, spec.max_model_len, spec.num_threads = max_rows, max_model_len, num_threads
        self.max_rows: Final = max_rows
        self.max_model_len: Final = max_model_len
        self.num_threads: Final = num_threads
        self.vocab_size: Final = int(spec.head.num_outputs)
        self._num_embeddings = module.get_input_embeddings().num_embeddings
        self._block_size = layout.block_size
        self._num_open_blocks = 1 + max((index for index, _ in layout.open_places), default=-1)
        self._lock = threading.Lock()
        self._call = library.Call()
        handle = self._library.onecopy_decoder_create(ctypes.byref(spec))
        if not handle:
            raise MemoryError("no memory for the native decoder's workspace")
        self._handle = handle
        self.hidden_stride: Final = int(self._library.onecopy_decoder_hidden_stride(handle))
        """Elements from one row of the residual stream to the next."""
        self._finalizer = weakref.finalize(self, self._library.onecopy_decoder_destroy, handle)

    @property
    def workspace_bytes(self) -> int:
        """Private memory that the kernels hold, fixed when the decoder is made."""
        self._check_open()
        return int(self._library.onecopy_decoder_workspace_bytes(self._handle))

    def counted(self) -> dict[str, int]:
        """Ticks of the calling thread since it was made, by operation."""
        self._check_open()
        counts = (ctypes.c_uint64 * len(library.OPERATIONS))()
        self._library.onecopy_decoder_counted(self._handle, counts)
        return dict(zip(library.OPERATIONS, counts, strict=True))

    def forward(
        self,
        token_ids: Int32s,
        positions: Int32s,
        tables: Int32s,
        addresses: Int64s,
        logit_rows: Int32s,
        logits_out: torch.Tensor | None = None,
        num_threads: int | None = None,
        layers: Sequence[PlacedLayer] | None = None,
        hidden: torch.Tensor | None = None,
        norms_hidden: bool = False,
        open_blocks: Int64s | None = None,
    ) -> None:
        """Compute rows: write their keys and values into blocks, and the logits asked for.

        A row is a token at a position of the sequence whose block addresses are a row of
        `addresses` [num_tables, max_blocks]; it attends to the positions up to its own, which
        earlier calls or earlier rows of this one have written. `logits_out` takes, for each of
        `logit_rows`, fp32 logits, which are not rounded to bf16. `num_threads` of the decoder's
        threads do it, by default all; the result does not depend on it.

        With `layers`, only those are computed, which must follow one on another. `hidden`, a bf16
        tensor # [num_rows, hidden_stride], then takes the residual stream as the last of them
        leaves it, and holds that which the first takes, unless it is the decoder's first; with
        `norms_hidden` the final norm of it. Logits can be had where the last is the decoder's last.

        Where a token sees those behind it, all of a sequence's rows must come together. Where keys
        and values are quantized, a sequence's rows must follow one on another; `open_blocks`
        # [num_tables, 2, num_open_blocks] then are the addresses of the section that they begin in,
        which matter unless they begin it, and of the one that the last of them is in.
        Raises ValueError, RankError, and RuntimeError if threads can't be started.
        """
        num_rows, num_logit_rows = token_ids.size, logit_rows.size
        if num_threads is not None and not 1 <= num_threads <= self.num_threads:
            raise ValueError(f"num_threads must be 1 to {self.num_threads}")
        for name, array, dtype in (
            ("token_ids", token_ids, np.int32),
            ("positions", positions, np.int32),
            ("tables", tables, np.int32),
            ("addresses", addresses, np.int64),
            ("logit_rows", logit_rows, np.int32),
        ):
            _check_array(name, array, dtype)
        if not num_rows <= self.max_rows or token_ids.ndim != 1:
            raise ValueError(f"{num_rows} rows: at most {self.max_rows}")
        if positions.shape != token_ids.shape or tables.shape != token_ids.shape:
            raise ValueError("token_ids, positions and tables differ in length")
        if addresses.ndim != 2 or logit_rows.ndim != 1:
            raise ValueError("addresses must be [num_tables, max_blocks], logit_rows [num]")
        if num_rows == 0:
            if num_logit_rows:
                raise ValueError("logits of no rows")
            return
        _check_range("token_ids", token_ids, self._num_embeddings)
        _check_range("positions", positions, self.max_model_len)
        _check_range("tables", tables, addresses.shape[0])
        if num_logit_rows:
            _check_range("logit_rows", logit_rows, num_rows)
            if num_logit_rows > num_rows:
                raise ValueError("more logit_rows than rows")
        if self._sees_all:
            _check_whole(positions, tables)
        furthest = int(positions.max())
        self._check_blocks(positions, tables, addresses)
        if self._num_open_blocks:
            self._check_open_blocks(positions, tables, open_blocks, addresses.shape[0])
        if logits_out is not None:
            _check_logits(logits_out, (num_logit_rows, self.vocab_size))
        if layers is not None:
            self._check_layers(layers, num_logit_rows)
        if num_logit_rows and logits_out is None:
            raise ValueError("logits_out must take the logits of logit_rows")
        if hidden is None and layers is not None and len(layers) < len(self.layers):
            raise ValueError("some of the layers without a residual stream")
        if hidden is not None:
            _check_hidden(hidden, (num_rows, self.hidden_stride))
        with self._lock:
            self._check_open()
            self._fill_rotations(furthest + 1)
            call = self._call
            structures, first = self._layers, 0
            if layers is not None:
                structures = (library.Layer * len(layers))(*(one.structure for one in layers))
                first = layers[0].index
            call.layers = ctypes.cast(structures, ctypes.POINTER(library.Layer))
            call.num_layers = len(structures)
            call.hidden = hidden.data_ptr() if hidden is not None else None
            call.token_ids = token_ids.ctypes.data if first == 0 else None
            call.positions = positions.ctypes.data
            call.tables = tables.ctypes.data
            call.addresses = addresses.ctypes.data
            call.open_blocks = None
            if self._num_open_blocks and open_blocks is not None:
                call.open_blocks = open_blocks.ctypes.data
            call.num_open_blocks = self._num_open_blocks
            call.logit_rows = logit_rows.ctypes.data
            call.logits = logits_out.data_ptr() if logits_out is not None else None
            call.norms_hidden = norms_hidden
            call.num_rows = num_rows
            call.max_blocks = addresses.shape[1]
            call.num_logit_rows = num_logit_rows
            call.num_threads = num_threads or self.num_threads
            failed = self._library.onecopy_decoder_forward(self._handle, ctypes.byref(call))
            if failed == 1:
                raise RuntimeError("the native decoder can't start its threads")
            if failed and self._ranks is not None:
                self._ranks.raise_for(call.result, call.failed_rank)

    def close(self) -> None:
        """Stop the threads and give the workspace back. A second time does nothing."""
        with self._lock:
            self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("the native decoder is closed")

    def _check_layers(self, layers: Sequence[PlacedLayer], num_logit_rows: int) -> None:
        indices = [one.index for one in layers]
        if not indices or indices != list(range(indices[0], indices[0] + len(indices))):
            raise ValueError(f"layers {indices}: not some that follow one on another")
        if indices[-1] >= len(self.layers):
            raise ValueError(f"layer {indices[-1]} of {len(self.layers)}")
        if num_logit_rows and indices[-1] + 1 != len(self.layers):
            raise ValueError("logits before the last layer")

    def _check_blocks(self, positions: Int32s, tables: Int32s, addresses: Int64s) -> None:
        """Every block up to a row's own must have an address."""
        num_blocks = np.zeros(addresses.shape[0], np.int64)
        np.maximum.at(num_blocks, tables, positions // self._block_size + 1)
        if num_blocks.max() > addresses.shape[1]:
            raise ValueError("a position lies beyond its table")
        needed = np.arange(addresses.shape[1]) < num_blocks[:, None]
        bad = (addresses <= 0) | (addresses & 63 != 0)
        if (bad & needed).any():
            raise ValueError("a block has no address, or one that is not a multiple of 64")

    def _check_open_blocks(
        self, positions: Int32s, tables: Int32s, open_blocks: Int64s | None, num_tables: int
    ) -> None:
        if open_blocks is None or open_blocks.shape != (num_tables, 2, self._num_open_blocks):
            raise ValueError("open_blocks must be [num_tables, 2, num_open_blocks]")
        _check_array("open_blocks", open_blocks, np.int64)
        starts = np.flatnonzero(np.diff(tables, prepend=-1))
        if len(starts) != len(np.unique(tables)):
            raise ValueError("rows of a sequence must come together")
        lengths = np.diff(starts, append=positions.size)
        first = positions[starts]
        own = np.arange(positions.size) - np.repeat(starts, lengths)
        if (positions != np.repeat(first, lengths) + own).any():
            raise ValueError("rows of a sequence must follow one on another")
        last = first + lengths - 1
        of_runs = open_blocks[tables[starts]]
        needed = np.stack(
            [(first % SECTION > 0) & (first // SECTION != last // SECTION), first >= 0]
        )
        bad = (of_runs <= 0) | (of_runs & 63 != 0)
        if (bad & needed.T[:, :, None]).any():
            raise ValueError("an open section has no address, or one that is not a multiple of 64")

    def _once(self, values: torch.Tensor) -> torch.Tensor:
        """Of rotations # [num_positions, 2 * half], in which each comes twice, one # [.., half]."""
        half = values.shape[-1] // 2
        first, second = values[:, :half], values[:, half:]
        if self._rotation == Rotation.PAIRS_UNROUNDED:
            first, second = values[:, ::2], values[:, 1::2]
        if not torch.equal(first, second):
            raise NotNative("rotations that differ between the halves of a head")
        return first.float()

    def _fill_rotations(self, num_positions: int) -> None:
        while self._num_rotations < num_positions:
            start = self._num_rotations
            stop = min(start + _ROPE_STEP, self.max_model_len)
            position_ids = torch.arange(start, stop)[None]
            like = torch.empty(0, dtype=torch.bfloat16)
            for index, kind in enumerate(self._rope_kinds):
                arguments = () if kind is None else (kind,)
                with torch.inference_mode():
                    cos, sin = self._rotary(like, position_ids, *arguments)
                for table, values in ((self._cos[index], cos[0]), (self._sin[index], sin[0])):
                    table[start:stop] = self._once(values)
            self._num_rotations = stop


def _untouched(num_positions: int, size: int) -> torch.Tensor:
    """fp32 # [num_positions, size], and room behind."""
    return torch.empty(num_positions * size + _SPARE)[: num_positions * size].view(-1, size)


def _check_array(name: str, array: Any, dtype: type) -> None:
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a contiguous array of {dtype.__name__}")


def _check_whole(positions: Int32s, tables: Int32s) -> None:
    starts = np.flatnonzero(np.diff(tables, prepend=-1))
    own = np.arange(positions.size) - np.repeat(starts, np.diff(starts, append=positions.size))
    if len(starts) != len(np.unique(tables)) or (own != positions).any():
        raise ValueError("rows of a sequence must come together, from its first to its last")


def _sums(ranks: Ranks, num_values: int) -> library.Ranks:
    """Raises NotNative where they can't sum so many values at once."""
    sums: library.Ranks | None = ranks.native()
    if sums is None:
        raise NotNative("ranks that do not sum in memory that they share")
    if ranks.capacity < num_values:
        raise NotNative(f"sums of {ranks.capacity} numbers at a time: {num_values} are needed")
    return sums


def _check_range(name: str, array: Int32s, end: int) -> None:
    if array.min() < 0 or array.max() >= end:
        raise ValueError(f"{name} must be in [0, {end})")


def _check_logits(logits: torch.Tensor, shape: tuple[int, int]) -> None:
    fits = logits.dtype == torch.float32 and logits.device.type == "cpu"
    if not fits or tuple(logits.shape) != shape or not logits.is_contiguous():
        raise ValueError(f"logits_out must be a contiguous fp32 tensor {list(shape)} on the CPU")


def _check_hidden(hidden: torch.Tensor, shape: tuple[int, int]) -> None:
    fits = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
    if not fits or tuple(hidden.shape) != shape or not hidden.is_contiguous():
        raise ValueError(f"hidden must be a contiguous bf16 tensor {list(shape)} on the CPU")
