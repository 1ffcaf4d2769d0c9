"""Sharing of any torch module: its parameters once in memory, however many processes use it.

Owns the way from a module to a weight set (lay out, copy, seal) and back (match, bind). Invariants:
  - what shared bytes in the publisher's module shares them in every process, and nothing else does:
    tensors that overlap are one extent, laid out once, and one torch storage;
  - an extent that holds a parameter is shared and read-only, so a buffer that overlaps a parameter
    is too: it has always been the same memory. An extent of buffers alone is copied privately;
  - until the weight set is sealed and found to match, the module is not touched.

What a module keeps as plain attributes does not travel.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

import torch
from torch.utils.dlpack import from_dlpack

from allocator.client.share.layout import LARGEST_ITEM_BYTES, Span, SpanGroup, grouped, lay_out
from allocator.client.share.manifest import (
    LAYOUT_VERSION,
    Form,
    buffers_of,
    check_forms,
    groups_of,
    make_manifest,
)
from allocator.client.weights.tensor import dtype_by_name, dtype_name
from allocator.client.weights.weight_set import WeightSetReader, WeightSetWriter
from allocator.errors import AllocatorGone, FingerprintMismatch, InvalidMessage, UnknownWeightSet
from allocator.messages import Manifest, TensorEntry, manifest_bytes

_PIECE_BYTES: Final = 64 << 20
_PROGRESS_STEP: Final = 32
"""Progress is reported at most this many times, so that messages do not grow with the module."""


class OpensWeightSets(Protocol):
    """As much of a client as sharing needs."""

    def open_weight_set(
        self, key: str, fingerprint: Mapping[str, str] | None, *, timeout_s: float
    ) -> WeightSetReader | WeightSetWriter:
        """See `Client.open_weight_set`."""


@dataclass(frozen=True)
class _Place:
    """One name under which a module holds a tensor."""

    owner: torch.nn.Module
    attribute: str
    tensor: torch.Tensor
    kind: str  # "parameter" or "buffer"

    @property
    def form(self) -> Form:
        """What must be the same in all processes."""
        return Form(self.kind, dtype_name(self.tensor.dtype), tuple(self.tensor.shape))


@dataclass(frozen=True)
class _Plan:
    """`num_bytes` bytes hold all tensors; the manifest is written behind them."""

    manifest: Manifest
    num_bytes: int
    pieces: list[tuple[int, torch.Tensor]]
    """Offset in the segment, and what goes there: uint8 [any], a view of the module's memory."""


class SharedModule:
    """This process's hold on a shared module. As a context it is released at the end."""

    def __init__(self, reader: WeightSetReader, *, loaded: bool):
        self.reader: Final = reader
        self.loaded: Final = loaded
        """Whether this process published the module, rather than finding it sealed."""
        self._released = False

    @property
    def num_bytes(self) -> int:
        """The segment's size."""
        return self.reader.handle.num_bytes

    def release(self) -> None:
        """Tell the allocator that this process reads the module no longer. Idempotent, and done
        where the allocator is gone. Drop the module first: its parameters stay valid, but the
        memory that they keep alive is no longer accounted for."""
        if not self._released:
            self._released = True
            with contextlib.suppress(AllocatorGone):
                self.reader.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def share(
    client: OpensWeightSets,
    module: torch.nn.Module,
    key: str,
    *,
    fingerprint: Mapping[str, str] | None = None,
    timeout_s: float = 3600.0,
) -> SharedModule:
    """Let all processes that call this with `key` use one copy of the module's parameters.

    The first one publishes its tensors; the others wait for it, up to `timeout_s`. Then, in every
    process, the publisher too:
      - each parameter aliases the one sealed, read-only copy, with the publisher's values, strides
        and ties. The memory it had before is given back, unless something outside of the module
        still refers to it. It takes no gradient any more, and an in-place write to it ends the
        writing process by SIGSEGV and harms nobody else;
      - each buffer, persistent or not, is a private, writable copy of the publisher's values. One
        that overlaps a parameter goes on sharing its bytes instead, read-only like them.
    Names, hooks, train or eval mode stay as they are. Modules on the meta device become real.

    Class, `fingerprint`, and the names, dtypes and shapes of all tensors must be the publisher's.
    Raises FingerprintMismatch where they are not; InvalidMessage where a tensor can't be shared;
    UnknownWeightSet where nobody has shared `key` yet and this module, on meta, has nothing to
    publish; WaitTimeout, OutOfDeviceMemory, AllocatorGone. Whatever is raised, the module is as it
    was, and the next process can publish.
    """
    places = _places(module)
    opened = client.open_weight_set(
        key, _fingerprint(module, fingerprint or {}), timeout_s=timeout_s
    )
    loaded = isinstance(opened, WeightSetWriter)
    reader = _publish(opened, places) if isinstance(opened, WeightSetWriter) else opened
    shared = SharedModule(reader, loaded=loaded)
    try:
        _bind(reader, places)
    except BaseException:
        shared.release()
        raise
    return shared


def _fingerprint(module: torch.nn.Module, asked: Mapping[str, str]) -> dict[str, str]:
    # Names, dtypes and shapes are compared with the manifest instead, where a difference can be
    # called by its name; a digest of them could only say that there is one.
    cls = type(module)
    ours = {
        "module": f"{cls.__module__}.{cls.__qualname__}",
        "module_layout": str(LAYOUT_VERSION),
    }
    if taken := sorted(ours.keys() & asked.keys()):
        raise InvalidMessage(f"the fingerprint has a field {taken[0]!r} of its own already")
    return {**asked, **ours}


def _places(module: torch.nn.Module) -> dict[str, _Place]:
    """Name → place of each parameter and buffer. Raises InvalidMessage for what can't be shared."""
    found: dict[str, _Place] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            found[prefix + name] = _Place(owner, name, parameter, "parameter")
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            found[prefix + name] = _Place(owner, name, buffer, "buffer")
    for name, place in found.items():
        if problem := _problem(place):
            raise InvalidMessage(f"the {place.kind} {name!r} can't be shared: {problem}")
    held = {id(place.tensor) for place in found.values()}
    for name, value in module.state_dict(keep_vars=True).items():
        if value is not None and id(value) not in held:  # packed weights, extra state
            raise InvalidMessage(
                f"the state {name!r} can't be shared: it is neither a parameter nor a buffer"
            )
    return found


def _problem(place: _Place) -> str | None:
    """Why the bytes of this tensor would not be the whole of it, if so."""
    tensor = place.tensor
    if type(tensor) is not (torch.nn.Parameter if place.kind == "parameter" else torch.Tensor):
        return f"it is a {type(tensor).__name__}, not a plain {place.kind}"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}, not torch.strided"
    if tensor.device.type not in ("cpu", "meta"):
        return f"it is on {tensor.device}; move the module to the CPU first"
    if tensor.is_quantized:
        return f"its scales are not in its bytes ({tensor.dtype})"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a lazily conjugated or negated view; resolve_conj() or resolve_neg() first"
    return None


# --- lay out, copy, seal


def _publish(writer: WeightSetWriter, places: Mapping[str, _Place]) -> WeightSetReader:
    with writer:  # an error on the way gives the election back
        for name, place in places.items():
            if place.tensor.is_meta:
                raise UnknownWeightSet(
                    f"nobody has shared {writer.key!r} yet, and this module is on the meta device "
                    f"({name!r}), so it has nothing to publish"
                )
        plan = _plan(places)
        writer.reserve(plan.num_bytes + manifest_bytes(plan.manifest))
        if plan.num_bytes:
            _copy(writer, plan)
        return writer.seal(plan.manifest, plan.num_bytes)


def _plan(places: Mapping[str, _Place]) -> _Plan:
    """One extent after the other, in the module's order."""
    spans = {name: _span(name, p.tensor) for name, p in places.items() if p.tensor.numel()}
    order = {name: index for index, name in enumerate(places)}
    found = sorted(
        grouped(spans.values()), key=lambda extent: min(order[span.name] for span in extent.spans)
    )
    starts, num_bytes = lay_out(found)
    offsets: dict[str, int] = {}
    pieces: list[tuple[int, torch.Tensor]] = []
    for extent, start in zip(found, starts, strict=True):
        offsets |= {span.name: start + span.start - extent.start for span in extent.spans}
        pieces += _pieces(extent, places, start)
    entries = {
        name: TensorEntry(
            dtype=dtype_name(place.tensor.dtype),
            shape=tuple(place.tensor.shape),
            stride=place.tensor.stride(),
            offset=offsets.get(name, 0),
            num_bytes=spans[name].end - spans[name].start if name in spans else 0,
        )
        for name, place in places.items()
    }
    buffers = [name for name, place in places.items() if place.kind == "buffer"]
    manifest = make_manifest(entries, buffers, _same_object(places))
    return _Plan(manifest, num_bytes, pieces)


def _span(name: str, tensor: torch.Tensor) -> Span:
    """By address, so that two storages over the same memory are seen to be the same memory."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return Span(start, start + (last + 1) * tensor.itemsize, tensor.itemsize, name)


def _pieces(
    extent: SpanGroup, places: Mapping[str, _Place], offset: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The extent's bytes, each once; a tensor's own storage gives those that it reaches."""
    done = extent.start
    for span in extent.spans:
        if span.end > done:
            first = max(span.start, done)
            tensor = places[span.name].tensor
            at = int(tensor.storage_offset()) * tensor.itemsize + first - span.start
            source = _bytes_of(tensor.untyped_storage(), at, span.end - first)
            yield offset + first - extent.start, source
            done = span.end


def _same_object(places: Mapping[str, _Place]) -> list[list[str]]:
    """The names of each tensor object that has more than one."""
    names: dict[int, list[str]] = {}
    for name, place in places.items():
        names.setdefault(id(place.tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _copy(writer: WeightSetWriter, plan: _Plan) -> None:
    """A function of its own, so that no writable tensor outlives it."""
    whole = TensorEntry(
        dtype="uint8", shape=(plan.num_bytes,), stride=(1,), offset=0, num_bytes=plan.num_bytes
    )
    described = Manifest(version=LAYOUT_VERSION, tensors={"segment": whole}, metadata={})
    segment = writer.writable_tensors(described)["segment"]
    total = sum(source.numel() for _, source in plan.pieces)
    done = reported = 0
    for offset, source in plan.pieces:
        for first in range(0, source.numel(), _PIECE_BYTES):
            some = source[first : first + _PIECE_BYTES]
            segment[offset + first : offset + first + some.numel()].copy_(some)
            done += some.numel()
            if (done - reported) * _PROGRESS_STEP >= total:
                reported = done
                writer.progress(done)


# --- match, bind


def _bind(reader: WeightSetReader, places: Mapping[str, _Place]) -> None:
    """Make the module's tensors what the manifest says. What can fail comes before what changes."""
    manifest = reader.manifest
    check_forms(reader.key, manifest, {name: place.form for name, place in places.items()})
    groups = _groups(reader.key, manifest, places)
    # What is made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        views = _views(reader)
        claimed: set[int] = set()
        kept = [_kept(names, places, claimed) for names in groups]
        for names, tensor in zip(groups, kept, strict=True):
            before, view = places[names[0]], views[names[0]]
            if tensor is not None:
                tensor.data = view
            else:
                tensor = torch.nn.Parameter(view, False) if before.kind == "parameter" else view
                tensor.__dict__.update(before.tensor.__dict__)
            if before.kind == "parameter":
                tensor.requires_grad_(False)
                tensor.grad = None
            for name in names:
                if places[name].tensor is not tensor:
                    # By attribute, because modules may follow it: an LSTM lists its weights anew.
                    setattr(places[name].owner, places[name].attribute, tensor)


def _groups(key: str, manifest: Manifest, places: Mapping[str, _Place]) -> list[list[str]]:
    """All names, those of one tensor object together. The publisher's ties win: what was tied there
    becomes tied here, and what was not is taken apart. Raises FingerprintMismatch where it can't be
    taken apart, because this module has one submodule where the publisher had two."""
    groups = groups_of(manifest)
    held: dict[tuple[int, str], list[str]] = {}
    for group in groups:
        for name in group:
            place = places[name]
            first = held.setdefault((id(place.owner), place.attribute), group)
            if first is not group:
                raise FingerprintMismatch(
                    f"{first[0]!r} and {name!r} were two tensors in the module that was shared as "
                    f"{key!r}, and are now one, of one submodule with two names"
                )
    return groups


def _views(reader: WeightSetReader) -> dict[str, torch.Tensor]:
    """Name → tensor over the segment, or over a private copy. Each extent is a storage of its own:
    what looks at storages sees which tensors are tied, and a copy of one takes no other along."""
    entries, buffers = reader.manifest.tensors, buffers_of(reader.manifest)
    checked = reader.tensors()  # all of them views of the segment as one storage
    views = {
        name: torch.empty_strided(entry.shape, entry.stride, dtype=checked[name].dtype)
        for name, entry in entries.items()
        if not entry.num_bytes
    }
    spans = [
        Span(e.offset, e.offset + e.num_bytes, dtype_by_name(e.dtype).itemsize, name)
        for name, e in entries.items()
        if e.num_bytes
    ]
    for extent in grouped(spans):
        start = extent.start // LARGEST_ITEM_BYTES * LARGEST_ITEM_BYTES
        segment = checked[extent.spans[0].name].untyped_storage()
        data = _bytes_of(segment, start, extent.end - start)
        private = all(span.name in buffers for span in extent.spans)
        storage = (data.clone() if private else from_dlpack(data)).untyped_storage()
        for span in extent.spans:
            entry = entries[span.name]
            empty = torch.empty(0, dtype=checked[span.name].dtype)
            first = (span.start - start) // span.itemsize
            views[span.name] = empty.set_(storage, first, entry.shape, entry.stride)
    return views


def _kept(names: list[str], places: Mapping[str, _Place], claimed: set[int]) -> torch.Tensor | None:
    """The module's own tensor object that goes on under `names`, with new data; None where there
    must be a new one. A view, a part of a graph and a tensor of inference mode would keep their old
    memory or refuse the new one."""
    for name in names:
        tensor = places[name].tensor
        fixed = tensor.is_meta or not tensor.is_leaf or tensor._is_view() or tensor.is_inference()
        if not fixed and id(tensor) not in claimed:
            claimed.add(id(tensor))
            return tensor
    return None


def _bytes_of(storage: torch.UntypedStorage, offset: int, num_bytes: int) -> torch.Tensor:
    """Bytes [offset, offset + num_bytes) of a storage, aliased # uint8 [num_bytes]"""
    return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (num_bytes,), (1,))
