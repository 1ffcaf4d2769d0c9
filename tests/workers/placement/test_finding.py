"""What a series' name stands for, and what is refused: in one process, of one rank."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from workers.errors import InvalidSetting, SeriesClosed, SeriesOutOfOrder
from workers.placement.finding import find_series
from workers.placement.group import Ranks
from workers.placement.sharded import ShardedSeries, shard_series
from workers.placement.transport_gloo import GlooTransport


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.o_proj = nn.Linear(8, width)


class Layer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.cross = nn.Module()
        self.cross.q_proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention.o_proj(self.attention.q_proj(x))[..., :8]


class Model(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def alone(module: nn.Module, *names: str, start: int = 0) -> ShardedSeries:
    ranks = Ranks(dist.HashStore(), 0, 1)
    return shard_series(module, names, GlooTransport(ranks), start=start)


def test_one_rank_computes_as_before() -> None:
    model = Model(8, 8, 8)
    x = torch.randn(2, 8)
    wanted = model(x)
    with alone(model, "o_proj", "attention.q_proj"):
        assert torch.equal(model(x), wanted)
        with torch.inference_mode():
            assert torch.equal(model(x), wanted)
    with pytest.raises(SeriesClosed, match=r"series attention.q_proj has been unloaded"):
        model(x)


def test_a_series_is_of_one_path_in_the_outermost_list() -> None:
    found = find_series(Model(8, 8), "o_proj", 0, None)
    assert [one.name for one in found.linears] == [
        "layers.0.attention.o_proj",
        "layers.1.attention.o_proj",
    ]
    assert found.layout.num_bytes == 4 * (8 * 8 + 8)
    experts = find_series(Model(8, 8), "experts.1", 0, None)
    assert [one.name for one in experts.linears] == ["layers.0.experts.1", "layers.1.experts.1"]


def test_a_series_may_begin_where_linears_become_equal() -> None:
    with pytest.raises(InvalidSetting, match=r"layers.2.attention.o_proj is not as .* later layer"):
        find_series(Model(16, 16, 8, 8), "o_proj", 0, None)
    found = find_series(Model(16, 16, 8, 8), "o_proj", 2, None)
    assert (found.start, len(found.linears)) == (2, 2)


def test_a_name_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidSetting, match=r"proj is no linear .* there are .*o_proj, q_proj"):
        find_series(Model(8), "proj", 0, None)
    with pytest.raises(InvalidSetting, match="no linears in lists of layers"):
        find_series(nn.Linear(2, 2), "o_proj", 0, None)


def test_a_name_of_several_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"\*\.attention\.q_proj, layers\.\*\.cross\.q_proj"):
        find_series(Model(8), "q_proj", 0, None)
    with pytest.raises(InvalidSetting, match="two of them are the same series"):
        alone(Model(8), "o_proj", "attention.o_proj")
    with pytest.raises(InvalidSetting, match="name each series once"):
        alone(Model(8), "o_proj", "o_proj")


def test_a_tensor_that_something_else_uses_is_refused() -> None:
    tied = Model(8, 8)
    tied.layers[1].attention.o_proj.weight = tied.layers[0].attention.o_proj.weight
    with pytest.raises(InvalidSetting, match=r"layers.1.* and layers.0.* are one tensor"):
        find_series(tied, "o_proj", 0, None)
    outside = Model(8, 8)
    outside.head = outside.layers[1].attention.o_proj
    with pytest.raises(InvalidSetting, match="are one tensor"):
        find_series(outside, "o_proj", 0, None)


def test_what_nobody_has_is_refused() -> None:
    with torch.device("meta"):
        model = Model(8)
    with pytest.raises(InvalidSetting, match="on meta, and this rank is the one that has it"):
        alone(model, "o_proj")


def test_another_order_is_an_error_and_the_next_pass_right() -> None:
    model = Model(8, 8, 8, 8)
    x = torch.randn(2, 8)
    wanted = model(x)
    with alone(model, "o_proj"):
        model.layers[0](x)
        with pytest.raises(SeriesOutOfOrder, match="linear 2 of the series o_proj was not next"):
            model.layers[2](x)
        assert torch.equal(model(x), wanted)


def test_ranks_are_numbered_from_0() -> None:
    with pytest.raises(InvalidSetting, match="rank 2 of 2"):
        Ranks(dist.HashStore(), 2, 2)
    with pytest.raises(InvalidSetting, match="deadlines of 0 s"):
        Ranks(dist.HashStore(), 0, 2, timeout_s=0)
