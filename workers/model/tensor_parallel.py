"""One rank's part of a decoder: views of weights that all ranks have, and sums behind them.

Owns how an architecture of `transformers` is narrowed to some of its heads and some of its MLPs'
width, by transformers' own plan for it (`base_model_tp_plan`). Invariants: a rank's weight is a
view of the whole one, never a copy; what the plan does not name is whole on every rank; an
architecture whose plan asks for more than this, or has parts that a rank would compute wrong, is
refused by name. Does not know how ranks sum, or where weights are.

    colwise   rows of the weight, and of its bias    queries, keys, values; gate, up
    rowwise   columns of the weight                  output, down: the ranks' results are summed;
                                                     the first rank adds the bias
    head      rows of the weight, and of its bias    logits: each rank's in their places

A packed weight is cut between strips of 16 rows, and between groups of columns.
Embeddings are whole: a rank reads the rows of its tokens where they lie, which is less than a sum.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from workers.errors import UnsupportedCheckpoint
from workers.model.shares import HeadGranule, HeadShare, Share, head_shares, width_shares
from workers.packed_format import ROWS, PackedFormat
from workers.ranks import Ranks
from workers.skeleton.decoder import attentions, head_dim
from workers.skeleton.packed import with_ties

_WHOLE: Final = frozenset({"replicate", "replicated_with_grad_allreduce"})
_CUT: Final = frozenset({"colwise", "rowwise"})


@dataclass(frozen=True, slots=True)
class _Cut:
    """Rows (0) or columns (1) of a tensor."""

    dimension: int
    share: Share
    layout: PackedFormat | None = None
    """Of a packed one."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the whole tensor."""
        begin, end = self.share
        if self.layout is None:
            return tensor.narrow(self.dimension, begin, end - begin)
        return (self.layout.columns if self.dimension else self.layout.rows)(tensor, begin, end)


@dataclass
class Shard:
    """What a rank has of a module that was built on meta and is narrow now."""

    rank: int
    num_kv_heads: tuple[int, ...]
    """Of each rank."""
    num_parameters: int
    """The module's, before it was cut."""
    weights_bytes: int
    cuts: dict[str, _Cut] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    """Parameters that another rank has."""
    linears: list[str] = field(default_factory=list)
    """Behind which ranks sum."""
    head: str = ""
    vocab_size: int = 0
    """The head's, before it was cut."""
    ties: tuple[tuple[str, str], ...] = ()
    """Names of what is one tensor in a checkpoint, of which either may be missing."""

    @property
    def first_columns(self) -> dict[str, int]:
        """Of packed weights of which the rank has a part of one tile, where that begins."""
        found: dict[str, int] = {}
        for name, cut in self.cuts.items():
            if cut.layout is not None and cut.dimension == 1:
                first = cut.layout.first_column(*cut.share)
                found |= {} if first is None else {name: first}
        return found

    def views(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of whole weights, by the checkpoint's names, what the rank's module is made of."""
        whole = dict(tensors)
        for name, twin in self.ties:
            tensor = whole.get(name, whole.get(twin))
            if tensor is not None:
                whole.setdefault(name, tensor)
                whole.setdefault(twin, tensor)
        return {
            name: self._view(name, tensor)
            for name, tensor in whole.items()
            if name not in self.left_out
        }

    def sum_by(self, module: Any, ranks: Ranks) -> None:
        """From now on the results of the module, which was narrowed, are those of all ranks
        together."""

        def total(_linear: Any, _arguments: Any, values: torch.Tensor) -> torch.Tensor:
            return ranks.sum(values)

        def all_logits(_head: Any, _arguments: Any, values: torch.Tensor) -> torch.Tensor:
            return self.all_logits(values, ranks)

        for name in self.linears:
            module.get_submodule(name).register_forward_hook(total)
        module.get_submodule(self.head).register_forward_hook(all_logits)

    def all_logits(self, own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """Of this rank's logits # [..., its part of the vocabulary] those of all ranks. Raises
        RankError."""
        share = self.cuts[f"{self.head}.weight"].share
        whole = own.new_zeros(*own.shape[:-1], self.vocab_size)
        whole[..., share.begin : share.end] = own
        return ranks.sum(whole)

    def _view(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        cut = self.cuts.get(name)
        return tensor if cut is None else cut.of(tensor)


def narrow(
    module: Any, rank: int, num_ranks: int, packed: Mapping[str, PackedFormat] | None = None
) -> Shard:
    """Leave of a module on meta the part of one rank. Those weights that `packed` names will be
    packed, and are cut at their strips and groups. Raises UnsupportedCheckpoint, and InvalidSetting
    where there is less to divide than there are ranks."""
    return _Narrowed(module, rank, num_ranks, packed or {}).shard


class _Narrowed:
    def __init__(
        self, module: Any, rank: int, num_ranks: int, packed: Mapping[str, PackedFormat]
    ) -> None:
        self.module = module
        self.rank = rank
        self.num_ranks = num_ranks
        self.packed = with_ties(module, packed)
        parameters = dict(module.named_parameters())
        num_bytes = sum(self._num_bytes(name, one) for name, one in parameters.items())
        num_parameters = sum(one.numel() for one in parameters.values())
        self.shard = Shard(rank, (), num_parameters, num_bytes)
        self.plan: Mapping[str, str] = getattr(module.config, "base_model_tp_plan", None) or {}
        if not self.plan:
            self._refuse("has no base_model_tp_plan in transformers, so nobody says how to cut it")
        names = {part: name for name, part in module.named_modules()}
        self.prefix = f"{names[module.base_model]}." if names[module.base_model] else ""
        self._check_styles()
        own = attentions(module)
        shares = {self._heads(names[attention], attention) for attention in own}
        if len(shares) != 1 or len({head_dim(attention) for attention in own}) != 1:
            self._refuse("has layers with other numbers of heads than the rest")
        [[*of_ranks]] = shares
        heads = of_ranks[rank]
        self.shard.num_kv_heads = tuple(one.keys_values.size for one in of_ranks)
        for attention in own:
            self._narrow_attention(names[attention], attention, heads)
        self._narrow_rest({names[attention] for attention in own})
        self._narrow_head(names)
        self._tell_config(heads, head_dim(own[0]) or 0)

    def _refuse(self, what: str) -> None:
        raise UnsupportedCheckpoint(
            f"{type(self.module).__name__} {what}: only --tensor-parallel-size 1 is possible"
        )

    def _style(self, name: str) -> str:
        steps = name.removeprefix(self.prefix).split(".")
        return self.plan.get(".".join("*" if one.isdecimal() else one for one in steps), "")

    def _check_styles(self) -> None:
        kinds = {name: type(part) for name, part in self.module.named_modules()}
        tensors = [name for name, _ in self.module.named_parameters()]
        for name in (*kinds, *tensors):
            style = self._style(name)
            if style in _WHOLE or not style:
                continue
            if style not in _CUT or kinds.get(name) is not torch.nn.Linear:
                self._refuse(f"is cut by {style!r} at {name}, which is not computed here")
        if not any(self._style(name) in _CUT for name in kinds):
            self._refuse("has a base_model_tp_plan that names none of its parts")

    def _heads(self, prefix: str, attention: Any) -> tuple[HeadShare, ...]:
        num_heads = int(self.module.config.num_attention_heads)
        groups = int(getattr(attention, "num_key_value_groups", 1))
        granule = self._head_granule(prefix, attention, num_heads, groups)
        return head_shares(num_heads, num_heads // groups, self.num_ranks, granule)

    # --- packed weights

    def _num_bytes(self, name: str, parameter: torch.Tensor) -> int:
        layout = self.packed.get(name)
        if layout is None:
            return parameter.nbytes
        return math.prod(layout.shape(*parameter.shape))

    def _granule(self, name: str, linear: Any, style: str) -> int:
        """Rows, or columns, at whose multiples that linear can be cut."""
        layout = self.packed.get(f"{name}.weight")
        if layout is None:
            return 1
        return layout.column_granule(linear.in_features) if style == "rowwise" else ROWS

    def _head_granule(
        self, prefix: str, attention: Any, num_heads: int, groups: int
    ) -> HeadGranule:
        width = head_dim(attention) or 1
        queries = keys_values = 1
        for name, linear in attention.named_modules(prefix=prefix):
            style = self._style(name)
            if style not in _CUT:
                continue
            granule = self._granule(name, linear, style)
            heads = granule // math.gcd(granule, width)
            if style == "rowwise" or linear.out_features != num_heads // groups * width:
                queries = math.lcm(queries, heads)
            else:
                keys_values = math.lcm(keys_values, heads)
        return HeadGranule(queries, keys_values)

    # --- attention

    def _narrow_attention(self, prefix: str, attention: Any, heads: HeadShare) -> None:
        width = head_dim(attention) or 0
        groups = int(getattr(attention, "num_key_value_groups", 1))
        num_heads = int(self.module.config.num_attention_heads)
        by_rows = {  # outputs → the rank's
            num_heads // groups * width: heads.keys_values.of(width),
            num_heads * width: heads.queries.of(width),
        }
        if groups == 1:  # of each head its query, key and value
            by_rows[3 * num_heads * width] = heads.queries.of(3 * width)
        summed = 0
        for name, linear in attention.named_modules(prefix=prefix):
            style = self._style(name)
            if style not in _CUT:
                continue
            if style == "rowwise" and linear.in_features == num_heads * width:
                self._columns(name, linear, heads.queries.of(width))
                summed += 1
            elif style == "colwise" and linear.out_features in by_rows:
                self._rows(name, linear, by_rows[linear.out_features])
            else:
                self._refuse(f"has another shape than its heads at {name}")
        if summed != 1:
            self._refuse(f"has an attention without one output at {prefix}")
        for name, tensor in attention.named_parameters():
            is_cut = self._style(f"{prefix}.{name}".rpartition(".")[0]) in _CUT
            if not is_cut and tensor.numel() > width:
                self._refuse(f"has {prefix}.{name} over all heads")
        if hasattr(attention, "sinks"):
            self._refuse(f"has sinks at {prefix}")
        if hasattr(attention, "num_key_value_groups"):
            attention.num_key_value_groups = heads.queries.size // heads.keys_values.size

    # --- all else

    def _narrow_rest(self, attention_names: set[str]) -> None:
        """Sublayers of a module: what goes into one that is cut by columns comes from those beside
        it, which are cut by rows."""
        for prefix, parent in self.module.named_modules():
            if any(f"{prefix}.".startswith(f"{name}.") for name in attention_names):
                continue
            found = [
                (f"{prefix}.{name}", linear, style)
                for name, linear in parent.named_children()
                if (style := self._style(f"{prefix}.{name}")) in _CUT
            ]
            if not found:
                continue
            widths = {linear.in_features for _, linear, style in found if style == "rowwise"}
            widths |= {linear.out_features for _, linear, style in found if style == "colwise"}
            if len(widths) != 1 or sum(style == "rowwise" for *_, style in found) != 1:
                self._refuse(f"has parts of other widths at {prefix}")
            [width] = widths
            for name, tensor in parent.named_parameters(prefix=prefix):
                is_cut = self._style(name.rpartition(".")[0]) in _CUT
                if not is_cut and width in tensor.shape:
                    self._refuse(f"has {name} over all of a width that is cut")
            least = math.lcm(*(self._granule(*one) for one in found))
            share = width_shares(width, self.num_ranks, least)[self.rank]
            for name, linear, style in found:
                (self._columns if style == "rowwise" else self._rows)(name, linear, share)

    def _narrow_head(self, names: Mapping[Any, str]) -> None:
        head = self.module.get_output_embeddings()
        if type(head) is not torch.nn.Linear:
            self._refuse("has no linear head")
        name, vocab_size = names[head], head.out_features
        self.shard.head, self.shard.vocab_size = name, vocab_size
        self.shard.ties = tuple(self.module.all_tied_weights_keys.items())
        shares = width_shares(vocab_size, self.num_ranks, self._granule(name, head, "colwise"))
        self._rows(name, head, shares[self.rank])

    def _rows(self, name: str, linear: Any, share: Share) -> None:
        self.shard.cuts[f"{name}.weight"] = _Cut(0, share, self.packed.get(f"{name}.weight"))
        linear.weight = _parameter(linear.weight[share.begin : share.end])
        if linear.bias is not None:
            self.shard.cuts[f"{name}.bias"] = _Cut(0, share)
            linear.bias = _parameter(linear.bias[share.begin : share.end])
        linear.out_features = share.size

    def _columns(self, name: str, linear: Any, share: Share) -> None:
        self.shard.cuts[f"{name}.weight"] = _Cut(1, share, self.packed.get(f"{name}.weight"))
        linear.weight = _parameter(linear.weight[:, share.begin : share.end])
        linear.in_features = share.size
        if linear.bias is not None and self.rank:
            linear.bias = None
            self.shard.left_out.add(f"{name}.bias")
        self.shard.linears.append(name)

    def _tell_config(self, heads: HeadShare, width: int) -> None:
        """What is read of it from now on is about the rank's part. Rotations are of a head's
        width, which must not follow from the number of heads."""
        config = self.module.config
        config.head_dim = width
        config.num_attention_heads = heads.queries.size
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = heads.keys_values.size


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.detach(), requires_grad=False)
