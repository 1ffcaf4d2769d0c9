"""`shard_series`: linears of any module that lie on one rank each, and come to the others in time.

    ranks = Ranks(store, rank, num_ranks)
    sharded = shard_series(model, ["o_proj"], GlooTransport(ranks))
    model(x)                       # as before, bit for bit, on all ranks at once
    sharded.close()

Owns the hooks of a module's series. Invariants: all ranks use the same linears in the same order,
or get SeriesTimedOut; whatever ended a pass, the next one begins with new groups if it must. What
the linears hold is only read. For one thread at a time, without gradients.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch

from workers.checkpoint import Checkpoint
from workers.errors import InvalidSetting, SeriesClosed, SeriesOutOfOrder
from workers.placement.finding import FoundSeries, find_series
from workers.placement.series import Series
from workers.placement.transport import Transport


@torch.inference_mode(False)
def shard_series(
    module: torch.nn.Module,
    names: Iterable[str],
    transport: Transport,
    *,
    ahead: int = 1,
    start: int = 0,
    checkpoint: Checkpoint | None = None,
) -> "ShardedSeries":
    """From now on keep linear i of each series on rank i % K alone, and have it broadcast to the
    others while the `ahead` ones before it are computed. A name is the end of a path within a
    layer, as `o_proj`; a series is of the layers from `start` on that have such a linear. Where
    there is a checkpoint, this rank reads its own linears from it, by their names in `module`, and
    no others; else it copies those of the module, which may be on meta where they are others'.

    All ranks call this, each with the same of everything, and compute as many passes. Raises
    InvalidSetting, CheckpointError before anything has changed; SeriesTimedOut where not all ranks
    come, what the transport raises for want of memory, and CheckpointError in reading: the module
    is of no use then."""
    names = list(names)
    if len(set(names)) != len(names):
        raise InvalidSetting(f"{', '.join(names)}: name each series once")
    found = {name: find_series(module, name, start, checkpoint) for name in names}
    paths = [linear.name for each in found.values() for linear in each.linears]
    if len(set(paths)) != len(paths):
        raise InvalidSetting(f"{', '.join(names)}: two of them are the same series")
    _check_meta(found, transport, checkpoint)
    return ShardedSeries(module, found, transport, ahead, checkpoint)


class ShardedSeries:
    """Made by `shard_series`. As a context it is closed at the end."""

    def __init__(
        self,
        module: torch.nn.Module,
        found: dict[str, FoundSeries],
        transport: Transport,
        ahead: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._series: list[Series] = []
        self._is_joined = False
        self._is_closed = False
        try:
            for name, each in found.items():
                series = Series(
                    name,
                    each.start,
                    each.linears,
                    each.layout,
                    transport.open(name),
                    rank=transport.rank,
                    num_ranks=transport.num_ranks,
                    ahead=ahead,
                )
                self._series.append(series)
                series.place(_fill(each, checkpoint))
                for number, linear in enumerate(each.linears):
                    self._hook(series, each.start + number, module.get_submodule(linear.name))
            self.rebuild()
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        """What all series take of this rank's memory: its own linears, and windows."""
        return sum(series.num_bytes for series in self._series)

    @torch.inference_mode(False)
    def rebuild(self) -> None:
        """Leave all groups and make them anew, with all ranks; the next pass begins behind this.
        Nobody must call it: a pass that begins behind one that was given up does. Raises
        SeriesTimedOut."""
        self._leave()
        try:
            for series in self._series:
                series.join()
        except BaseException:
            self._leave()
            raise
        self._is_joined = True

    @torch.inference_mode(False)
    def close(self) -> None:
        """Forget the series: their memory, groups and connections are given back, and the module
        can't be computed with any more. Idempotent."""
        self._is_closed = True
        for series in self._series:
            series.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _hook(self, series: Series, index: int, linear: torch.nn.Module) -> None:
        @torch.inference_mode(False)
        def begin(_module: Any, _arguments: Any) -> None:
            self._use(series, index)

        @torch.inference_mode(False)
        def end(_module: Any, _arguments: Any, _result: Any) -> None:
            series.used(index)

        linear.register_forward_pre_hook(begin)
        linear.register_forward_hook(end, always_call=True)

    def _use(self, series: Series, index: int) -> None:
        if self._is_closed:
            raise SeriesClosed(f"the series {series.name} has been unloaded: load the model again")
        if not (self._is_joined and series.follows(index)):
            if index != series.start:
                self._leave()
                raise SeriesOutOfOrder(
                    f"linear {index} of the series {series.name} was not next: each pass uses all "
                    f"of them in order, and behind one that was given up begins at {series.start}"
                )
            self.rebuild()
        try:
            series.use(index)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        self._is_joined = False
        for series in self._series:
            series.leave()


def _check_meta(
    found: dict[str, FoundSeries], transport: Transport, checkpoint: Checkpoint | None
) -> None:
    if checkpoint is not None:
        return
    for each in found.values():
        for number, linear in enumerate(each.linears):
            if (each.start + number) % transport.num_ranks != transport.rank:
                continue
            for name in linear.places:
                if linear.tensor(name).is_meta:
                    raise InvalidSetting(
                        f"{linear.name}.{name} is on meta, and this rank is the one that has it: "
                        "give a checkpoint to read it from"
                    )


def _fill(found: FoundSeries, checkpoint: Checkpoint | None) -> Any:
    stored = set() if checkpoint is None else {one.name for one in checkpoint.tensors()}

    def fill(number: int, tensors: dict[str, torch.Tensor]) -> None:
        linear = found.linears[number]
        for name, tensor in tensors.items():
            qualified = f"{linear.name}.{name}"
            if checkpoint is not None and qualified in stored:
                checkpoint.copy_into(qualified, tensor, lambda _num_bytes: None)
            else:
                tensor.copy_(linear.tensor(name).detach())

    return fill
