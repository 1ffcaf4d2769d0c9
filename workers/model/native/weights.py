"""Parameters of a module as the kernels' structures refer to them.

Owns which tensors are referred to. Invariants: each has the shape that its place asks for, lies on
the processor in a format of the kernels, in one piece or, of a matrix, as columns of one; none is
copied.
"""

from typing import Any

from torch import nn

from workers.model.native import library
from workers.model.native.families import NormKind
from workers.packed_format import ROWS
from workers.skeleton.packed import PackedEmbedding, PackedLinear
from workers.weight_format import WeightFormat


class NotNative(Exception):
    """The message says what the native decoder does not compute."""


class Weights:
    """Those of one module. Every method raises NotNative."""

    def __init__(self, *, need_places: bool = True) -> None:
        """Without places those on meta will do: enough to see what could be computed."""
        self._devices = ("cpu",) if need_places else ("cpu", "meta")
        self.kept: list[Any] = []
        """What the structures point into."""
        self._seen: set[int] = set()

    def unknown(self, module: Any) -> list[str]:
        """Names of the module's parameters that nobody asked for."""
        return [name for name, one in module.named_parameters() if id(one) not in self._seen]

    def address(self, tensor: Any, shape: tuple[int, ...], first_row: int = 0) -> int:
        """Where a weight of this shape lies, from its row `first_row` on."""
        found = WeightFormat.of(tensor)
        if tensor.device.type not in self._devices or found is None:
            raise NotNative(f"weights in {tensor.dtype} on {tensor.device.type}")
        is_laid_out = tensor.is_contiguous() or (tensor.dim() == 2 and _stride(tensor) > 0)
        if tuple(tensor.shape) != shape or not is_laid_out:
            raise NotNative(f"a weight laid out as {list(tensor.shape)}, {tensor.stride()}")
        self.kept.append(tensor)
        self._seen.add(id(tensor))
        width = _stride(tensor) or (tensor[0].numel() if tensor.dim() > 1 else 1)
        return int(tensor.data_ptr()) + first_row * found.row_bytes(width)

    def norm(self, norm: Any, size: int, kind: NormKind) -> library.Norm:
        """A norm over `size` elements."""
        name = type(norm).__name__
        if not name.endswith("LayerNorm" if kind == NormKind.LAYER else "RMSNorm"):
            raise NotNative(f"a norm of type {name}")
        bias = getattr(norm, "bias", None)
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        return library.Norm(
            self.address(norm.weight, (size,)),
            self.address(bias, (size,)) if bias is not None else None,
            eps,
            kind,
        )

    def matrix(
        self,
        weight: Any,
        bias: Any,
        shape: tuple[int, int],
        first: int = 0,
        count: int | None = None,
    ) -> library.Matrix:
        """`count` rows, or all, of a weight of this shape, from row `first` on."""
        return library.Matrix(
            self.address(weight, shape, first),
            self.address(bias, shape[:1], first) if bias is not None else None,
            shape[0] if count is None else count,
            WeightFormat.of(weight),
            _stride(weight),
        )

    def rows_of(self, module: Any, first: int = 0, count: int | None = None) -> library.Matrix:
        """The weight of a linear or an embedding, packed or not; `count` rows, or all, from row
        `first` on."""
        num_rows, width = _shape(module)
        bias = getattr(module, "bias", None)
        if not isinstance(module, PackedLinear | PackedEmbedding):
            return self.matrix(module.weight, bias, (num_rows, width), first, count)
        tensor, layout = module.weight, module.layout
        skipped = getattr(module, "first_column", None)
        if skipped is not None and (skipped % 32 or width % 32):
            raise NotNative(f"{width} columns of a packed tile, from the {skipped}th on")
        strips, strip_bytes = layout.shape(num_rows, width if skipped is None else layout.group)
        if first % ROWS:
            raise NotNative(f"packed rows from the {first:,}th on")
        if tensor.device.type not in self._devices or tuple(tensor.shape) != (strips, strip_bytes):
            raise NotNative(f"packed weights as {list(tensor.shape)} on {tensor.device.type}")
        apart = _stride(tensor) or strip_bytes
        is_laid_out = tensor.is_contiguous() or (_stride(tensor) and not apart % layout.tile_bytes)
        is_whole = apart == strip_bytes and skipped is None
        if not is_laid_out or tensor.data_ptr() % 4:
            raise NotNative("packed weights that do not lie in one piece, nor as columns of one")
        self.kept.append(tensor)
        self._seen.add(id(tensor))
        return library.Matrix(
            int(tensor.data_ptr()) + first // ROWS * apart,
            self.address(bias, (num_rows,), first) if bias is not None else None,
            num_rows if count is None else count,
            layout.number,
            0 if is_whole else apart // layout.tile_bytes * layout.group,
            skipped or 0,
        )

    def linear(self, modules: list[Any]) -> library.Linear:
        """Projections of one input, their outputs one after the other."""
        linear = library.Linear(num_matrices=len(modules), width=modules[0].in_features)
        for index, module in enumerate(modules):
            if _shape(module)[1] != linear.width:
                raise NotNative("projections of one input with different widths")
            linear.matrices[index] = self.rows_of(module)
            linear.num_outputs += module.out_features
        return linear

    def split(self, module: Any, sizes: list[int]) -> library.Linear:
        """One matrix as several: its rows belong to one after the other."""
        if sum(sizes) != module.out_features:
            raise NotNative("a fused projection of another size")
        linear = library.Linear(
            num_matrices=len(sizes), width=module.in_features, num_outputs=module.out_features
        )
        first = 0
        for index, size in enumerate(sizes):
            linear.matrices[index] = self.rows_of(module, first, size)
            first += size
        return linear


def _stride(tensor: Any) -> int:
    """Of some columns of a wider matrix: elements from one row to the next; else 0."""
    if tensor.dim() != 2 or tensor.is_contiguous() or tensor.stride(1) != 1:
        return 0
    return int(tensor.stride(0)) if tensor.stride(0) > tensor.shape[1] else 0


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Embedding | PackedEmbedding):
        return module.num_embeddings, module.embedding_dim
    if type(module) not in (nn.Linear, PackedLinear):
        raise NotNative(f"a linear layer of type {type(module).__name__}")
    return module.out_features, module.in_features
