"""`offload`: blocks of any module, read from a file just before each of them computes.

    blocks = offload(model.transformer_blocks, budget_bytes=2 << 30)
    model(x)                       # as before, bit for bit
    blocks.close()                 # everything is in memory again

Owns what a module's blocks become for that. Invariants: a block computes on tensors of the same
values, dtypes, shapes and strides as before; while it does not compute, its offloaded tensors are
empty, so that nobody takes something else for them, and nothing that it returned lies in a slot;
what a block writes to a tensor is kept, unless it is written by way of `.data`. What several blocks
have in common stays where it is, and so does what is small. For one thread at a time, on the
processor, without gradients.
"""

import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch.utils._pytree import tree_map

from allocator import Client, cache_folder
from workers.checkpoint.offloaded import FileRun, OffloadedTensor
from workers.errors import InvalidSetting
from workers.placement.budget import Sizes, offloaded_layers
from workers.placement.layer_slots import LayerSlots, memory_bytes
from workers.placement.reader import Reader
from workers.placement.slots import BLOCK, SlotLayout, slot_layout

_LEAST_BYTES: Final = 64 << 10
"""What is smaller is not worth a read."""
_ALIGNMENT: Final = 64


def offload(
    blocks: Iterable[torch.nn.Module],
    *,
    budget_bytes: int | None = None,
    depth: int = 1,
    directory: Path | str | None = None,
    memory: Client | None = None,
) -> "OffloadedBlocks":
    """From now on keep as many of the blocks in memory as fit into `budget_bytes`, with the slots
    for the others, none where it is None; the others lie in a file in `directory` (default: where
    onecopy's caches are, since /tmp may be memory), which nobody else sees, and are read `depth`
    ahead in the order of `blocks`, over and over. They may be called in any order, some of them not
    at all or several times. Slots are leased from the allocator that `memory` is connected to, else
    private.

    Raises InvalidSetting where the budget is too small or a block is not on the processor, OSError
    where the file can't be written: the blocks are as they were then."""
    return OffloadedBlocks(tuple(blocks), budget_bytes, depth, directory, memory)


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of a block: `offset` elements into a span of bytes."""

    owner: torch.nn.Module
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    span: str
    offset: int

    @property
    def tensor(self) -> torch.Tensor:
        """It as it is now."""
        own = self.owner._parameters.get(self.name)
        tensor = own if own is not None else self.owner._buffers[self.name]
        assert tensor is not None  # noqa: S101 - it was there
        return tensor

    def view(self, span: torch.Tensor) -> torch.Tensor:
        """It in the span's bytes, with a version of its own."""
        itemsize = self.dtype.itemsize
        elements = span[: span.numel() // itemsize * itemsize].view(self.dtype)
        offset = int(elements.storage_offset()) + self.offset
        return elements.as_strided(self.shape, self.stride, offset).data

    def nothing(self) -> torch.Tensor:
        """Of its dtype."""
        return torch.empty(0, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class _Block:
    module: torch.nn.Module
    spans: dict[str, torch.Tensor]
    """uint8; whatever its tensors lie in."""
    places: list[_Place]
    own: set[str] = field(default_factory=set)
    """Spans that were written to, and are in memory since."""

    @property
    def num_bytes(self) -> int:
        return sum(span.numel() for span in self.spans.values())


class OffloadedBlocks:
    """Made by `offload`. As a context it is closed at the end."""

    def __init__(
        self,
        modules: tuple[torch.nn.Module, ...],
        budget_bytes: int | None,
        depth: int,
        directory: Path | str | None,
        memory: Client | None,
    ) -> None:
        _check(modules)
        blocks = [_block(module) for module in modules]
        _keep_shared(blocks)
        self.indices = _chosen(blocks, _all_bytes(modules), depth, budget_bytes)
        """Of the blocks that are read."""
        self._blocks = [blocks[index] for index in self.indices]
        self._computes = False
        self._slots: LayerSlots | None = None
        self._ends = ExitStack()
        if self._blocks:
            self._slots = self._begin(depth, directory, memory)

    @property
    def waited_s(self) -> float:
        """For blocks that were not there yet when they were called, altogether."""
        return self._slots.waited_s if self._slots is not None else 0.0

    def close(self) -> None:
        """Bring everything back into memory; nothing is offloaded any more. Raises ReadFailed, and
        then all is as it was. Idempotent."""
        if self._slots is None:
            return
        back: list[tuple[_Place, torch.Tensor]] = []
        for item, block in enumerate(self._blocks):
            views = self._slots.views(item, self._slots.use(item))
            spans = {name: views[name].clone() for name in block.spans if name not in block.own}
            back += [
                (place, place.view(spans[place.span]))
                for place in block.places
                if place.span in spans
            ]
        for place, tensor in back:
            place.tensor.data = tensor
        self._slots = None
        self._ends.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, depth: int, directory: Path | str | None, memory: Client | None) -> LayerSlots:
        with ExitStack() as stack:
            reader = stack.enter_context(Reader())
            layouts = _written(self._blocks, _folder(directory), reader)
            num_bytes = memory_bytes(layouts, depth)
            if memory is None:
                area = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                slots = torch.frombuffer(area, dtype=torch.uint8)
            else:
                lease = memory.lease(num_bytes)
                stack.callback(memory.release_many, [lease])
                stack.push(reader)  # ends before the memory that it writes to
                slots = lease.tensor()
            found = LayerSlots(layouts, depth, slots, reader)
            for item, block in enumerate(self._blocks):
                stack.callback(_restoring(block.module))
                vars(block.module)["forward"] = partial(self._forward, item, block.module.forward)
            for block in self._blocks:
                for place in block.places:
                    place.tensor.data = place.nothing()
                block.spans.update(dict.fromkeys(block.spans, torch.empty(0)))
            self._ends = stack.pop_all()
        return found

    def _forward(
        self, item: int, forward: Callable[..., Any], *arguments: Any, **named: Any
    ) -> Any:
        """The block's own, with its tensors in a slot meanwhile, however it ends."""
        slots = self._slots
        assert slots is not None  # noqa: S101 - else it has its own forward again
        if self._computes:
            raise InvalidSetting(
                "a block is called while another one computes: offload the outer ones only, and "
                "call them from one thread at a time"
            )
        self._computes = True
        try:
            with torch.inference_mode(False):
                spans = slots.views(item, slots.use(item))
            with _placed(self._blocks[item], spans):
                result = forward(*arguments, **named)
                return tree_map(partial(_out_of, next(iter(spans.values()))), result)
        finally:
            self._computes = False


@contextmanager
def _placed(block: _Block, spans: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Its tensors lie in these spans. What was written to is the block's own afterwards, with all
    that lies in the same span."""
    places = [place for place in block.places if place.span not in block.own]
    versions = []
    with torch.inference_mode(False):
        for place in places:
            place.tensor.data = place.view(spans[place.span])
            versions.append(place.tensor._version)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            pairs = zip(places, versions, strict=True)
            written = {place.span for place, version in pairs if place.tensor._version != version}
            own = {name: spans[name].clone() for name in written}
            for place in places:
                is_own = place.span in own
                place.tensor.data = place.view(own[place.span]) if is_own else place.nothing()
            block.own.update(written)


def _out_of(span: torch.Tensor, value: Any) -> Any:
    """The value; of a tensor that lies in the same memory as the span a copy."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    slots = span.untyped_storage().data_ptr()
    return value.clone() if value.untyped_storage().data_ptr() == slots else value


def _restoring(module: torch.nn.Module) -> Callable[[], None]:
    """What gives the module the `forward` back that it has now."""
    own = vars(module)
    before = own.get("forward")

    def restore() -> None:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before

    return restore


def _chosen(
    blocks: list[_Block], all_bytes: int, depth: int, budget_bytes: int | None
) -> tuple[int, ...]:
    layers = tuple(block.num_bytes for block in blocks)
    sizes = Sizes(
        layers=layers,
        slots=tuple(_layout(block, 0).num_bytes if block.spans else 0 for block in blocks),
        others=all_bytes - sum(layers),
    )
    everything = [index for index, block in enumerate(blocks) if block.spans]
    least = min(sizes.needed(everything, depth), all_bytes)
    if budget_bytes is not None and budget_bytes < least:
        raise InvalidSetting(
            f"budget_bytes is {budget_bytes:,}, and {least:,} is the least: of {all_bytes:,} "
            f"bytes {sum(layers):,} can be offloaded, {depth} blocks ahead"
        )
    return offloaded_layers(sizes, "all" if budget_bytes is None else "auto", depth, budget_bytes)


def _check(modules: tuple[torch.nn.Module, ...]) -> None:
    if len(set(modules)) != len(modules):
        raise InvalidSetting("the same block is there twice: call it twice instead")
    for number, module in enumerate(modules):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.device.type != "cpu":
                raise InvalidSetting(
                    f"{name} of block {number} is on {tensor.device}: blocks are offloaded from "
                    "the processor's memory"
                )


def _keep_shared(blocks: list[_Block]) -> None:
    """What lies in bytes of several blocks is none's to offload."""
    extents = sorted(
        (span.data_ptr(), span.data_ptr() + span.numel(), number, name)
        for number, block in enumerate(blocks)
        for name, span in block.spans.items()
    )
    shared: set[tuple[int, str]] = set()
    reach, holder = 0, (-1, "")
    for begin, end, number, name in extents:
        if begin < reach and holder[0] != number:
            shared |= {holder, (number, name)}
        if end > reach:
            reach, holder = end, (number, name)
    for number, name in shared:
        block = blocks[number]
        del block.spans[name]
        block.places[:] = [place for place in block.places if place.span != name]


def _all_bytes(modules: tuple[torch.nn.Module, ...]) -> int:
    """Of all parameters and buffers, what is common once."""
    tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    return sum({(one.data_ptr(), one.nbytes): one.nbytes for one in tensors}.values())


def _tensors(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Those that may go. Buffers of a module in training may be written to by operations that tell
    nobody, and so may tensors without a version."""
    for owner in module.modules():
        for own in (owner._parameters, {} if owner.training else owner._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.numel() and not tensor.is_inference():
                    yield owner, name, tensor


def _block(module: torch.nn.Module) -> _Block:
    by_storage: dict[int, list[tuple[torch.nn.Module, str, torch.Tensor]]] = defaultdict(list)
    for owner, name, tensor in _tensors(module):
        by_storage[tensor.untyped_storage().data_ptr()].append((owner, name, tensor))
    spans: dict[str, torch.Tensor] = {}
    places: list[_Place] = []
    for own in by_storage.values():
        begin = min(_begin_of(tensor) for _, _, tensor in own)
        begin -= begin % _ALIGNMENT
        end = max(_end_of(tensor) for _, _, tensor in own)
        if end - begin < _LEAST_BYTES:
            continue
        key = str(len(spans))
        whole = torch.empty(0, dtype=torch.uint8).set_(own[0][2].untyped_storage())
        spans[key] = whole[begin:end]
        for owner, name, tensor in own:
            offset = (_begin_of(tensor) - begin) // tensor.dtype.itemsize
            of = (tensor.dtype, tuple(tensor.shape), tensor.stride())
            places.append(_Place(owner, name, *of, key, offset))
    return _Block(module, spans, places)


def _begin_of(tensor: torch.Tensor) -> int:
    """Its first byte in its storage."""
    return int(tensor.storage_offset()) * tensor.dtype.itemsize


def _end_of(tensor: torch.Tensor) -> int:
    """Behind its last byte there."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _begin_of(tensor) + (last + 1) * tensor.dtype.itemsize


def _layout(block: _Block, begin: int, file: int = 0) -> SlotLayout:
    """Of a block whose spans lie in the file from `begin` on, as `_written` writes them."""
    tensors = {}
    for name, span in block.spans.items():
        run = FileRun(file, begin, span.numel())
        tensors[name] = OffloadedTensor("uint8", (span.numel(),), (run,))
        begin += -(-span.numel() // _ALIGNMENT) * _ALIGNMENT
    return slot_layout(tensors)


def _folder(directory: Path | str | None) -> Path:
    if directory is not None:
        return Path(directory)
    folder = cache_folder() / "layers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _written(blocks: Iterable[_Block], directory: Path, reader: Reader) -> list[SlotLayout]:
    """A file with all of them, open in the reader and without a name."""
    descriptor, name = tempfile.mkstemp(prefix="onecopy-blocks-", dir=directory)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as out:
            layouts, begin = [], 0
            for block in blocks:
                layouts.append(_layout(block, begin, file=0))
                for span in block.spans.values():
                    _write(out.fileno(), span, begin)
                    begin += -(-span.numel() // _ALIGNMENT) * _ALIGNMENT
                begin += -begin % BLOCK
            os.ftruncate(out.fileno(), begin)
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader.open(Path(name))
    finally:
        Path(name).unlink()
    return layouts


def _write(descriptor: int, span: torch.Tensor, begin: int) -> None:
    data = memoryview(span.detach().numpy().data)
    while data:
        written = os.pwrite(descriptor, data[: 64 << 20], begin)
        data, begin = data[written:], begin + written
