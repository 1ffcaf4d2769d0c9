"""One series of equal linears, each of which lies on one rank alone.

Owns what a linear's tensors are views of at any moment. Invariants: while a linear computes, its
tensors have the values, dtypes, shapes and strides of those that its owner had; what another rank
owns is empty on this one while it does not compute, so that nobody takes something else for it; all
tensors of a linear travel together. Does not know how bytes travel, nor what the linears compute.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from workers.placement.transport import Arrival, Channel
from workers.placement.windows import Broadcast, Windows

_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Of one tensor in an extent."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of a dense tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Linear:
    """A module of the series, and who computes in it."""

    name: str
    """In the whole module."""
    places: Mapping[str, tuple[torch.nn.Module, str, bool]]
    """Tensor's name in the linear → who holds it, as what, and whether that is a buffer."""

    def tensor(self, name: str) -> torch.Tensor:
        """As it is now."""
        owner, attribute, is_buffer = self.places[name]
        found = (owner._buffers if is_buffer else owner._parameters)[attribute]
        assert found is not None  # noqa: S101 - it was there
        return found

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Hold another one from now on, of whatever device."""
        owner, attribute, is_buffer = self.places[name]
        if is_buffer:
            owner._buffers[attribute] = tensor
        else:
            owner._parameters[attribute] = torch.nn.Parameter(tensor, requires_grad=False)


class Layout:
    """How the tensors of one linear lie in an extent."""

    def __init__(self, forms: Mapping[str, TensorForm]) -> None:
        self.forms: Final = dict(forms)
        self._offsets: dict[str, int] = {}
        end = 0
        for name, form in forms.items():
            self._offsets[name] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = self._offsets[name] + form.num_bytes
        self.num_bytes: Final = end

    def views(self, extent: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in an extent, uint8 # [num_bytes], each with a version of its own."""
        return {
            name: extent[self._offsets[name] : self._offsets[name] + form.num_bytes]
            .view(form.dtype)
            .as_strided(form.shape, form.stride)
            .data
            for name, form in self.forms.items()
        }

    def described(self) -> dict[str, list[object]]:
        """For others to compare."""
        return {
            name: [str(form.dtype), form.shape, form.stride] for name, form in self.forms.items()
        }


class Series:
    """Linears `start` … of `num_ranks` ranks, of which this is `rank`, `ahead` on their way."""

    def __init__(
        self,
        name: str,
        start: int,
        linears: Sequence[Linear],
        layout: Layout,
        channel: Channel,
        *,
        rank: int,
        num_ranks: int,
        ahead: int,
    ) -> None:
        self.name: Final = name
        self.start: Final = start
        self._linears = linears
        self._layout = layout
        self._channel = channel
        self._num_ranks = num_ranks
        indices = range(start, start + len(linears))
        self._own = [index for index in indices if self.owner(index) == rank]
        here = indices if channel.maps_all else self._own
        self._plan = Windows(start, len(linears), ahead, here)
        self._windows: list[torch.Tensor] = []
        self._arrivals: dict[int, Arrival] = {}
        self._bound: dict[int, torch.Tensor] = {}
        """The extents that linears' tensors are views of."""
        self._in_window: int | None = None
        """That of them which is in use, where it is another rank's."""
        self._ahead = ahead

    @property
    def num_bytes(self) -> int:
        """Of the linears that lie on this rank, and of windows for others."""
        return (len(self._own) + self._plan.num_windows) * self._layout.num_bytes

    def owner(self, index: int) -> int:
        """The rank on which a linear lies."""
        return index % self._num_ranks

    def place(self, fill: Callable[[int, dict[str, torch.Tensor]], None]) -> None:
        """Have the own linears written to where they stay, by `fill`, which is given an index in
        the series and tensors; of the others nothing is left. Once."""

        def filling(number: int) -> Callable[[torch.Tensor], None]:
            def write(extent: torch.Tensor) -> None:
                fill(number, self._layout.views(extent))
                self._empty(number)  # one by one, so that no two copies of all are there

            return write

        own = {index: filling(index - self.start) for index in self._own}
        self._channel.place(self._layout.num_bytes, own)
        for number in range(len(self._linears)):
            self._empty(number)
        self._windows = [
            self._channel.window(self._layout.num_bytes) for _ in range(self._plan.num_windows)
        ]

    def join(self) -> None:
        """Be in a group with all ranks. Raises as `Channel.join` does."""
        form = {
            "linears": [linear.name for linear in self._linears],
            "start": self.start,
            "ahead": self._ahead,
            "tensors": self._layout.described(),
        }
        self._channel.join(json.dumps(form))

    def follows(self, index: int) -> bool:
        """Whether a linear may be used now."""
        return self._plan.follows(index)

    def use(self, index: int) -> None:
        """The linear is computed with now, until the next one is used. Raises SeriesTimedOut."""
        for broadcast in self._plan.use(index):
            self._arrivals[broadcast.index] = self._channel.broadcast(
                self._extent(broadcast), self.owner(broadcast.index)
            )
        arrival = self._arrivals.get(index)
        if arrival is not None:
            arrival.wait()
            del self._arrivals[index]
        window = self._plan.window(index)
        extent = self._extent(Broadcast(index, window))
        if self._bound.get(index) is not extent:
            self._bind(index, extent)
        if window is not None:
            self._in_window = index

    def used(self, index: int) -> None:
        """What was to be computed with the linear has been given to its device; or `use` failed."""
        if index == self._in_window:
            self._in_window = None
            self._channel.used(self._bound[index])
            self._unbind(index)

    def leave(self) -> None:
        """Give up the pass and the group. Idempotent."""
        self._arrivals.clear()
        self._plan.forget()
        self._channel.leave()

    def close(self) -> None:
        """Leave, and forget everything. Idempotent."""
        self.leave()
        for index in list(self._bound):
            self._unbind(index)
        self._windows.clear()
        self._channel.close()

    def _extent(self, broadcast: Broadcast) -> torch.Tensor:
        if broadcast.window is not None:
            return self._windows[broadcast.window]
        extent = self._channel.extent(broadcast.index)
        assert extent is not None  # noqa: S101 - it needs no window
        return extent

    def _bind(self, index: int, extent: torch.Tensor) -> None:
        linear = self._linears[index - self.start]
        for name, view in self._layout.views(extent).items():
            linear.tensor(name).data = view
        self._bound[index] = extent

    def _unbind(self, index: int) -> None:
        del self._bound[index]
        linear = self._linears[index - self.start]
        for name in linear.places:
            tensor = linear.tensor(name)
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def _empty(self, number: int) -> None:
        for name, form in self._layout.forms.items():
            empty = torch.empty(0, dtype=form.dtype, device=self._channel.device)
            self._linears[number].replace(name, empty)
