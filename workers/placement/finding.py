"""The linears of a module that make up a series: found by name, and shown to be equal.

Owns what a name may mean. Invariants: a series is of one path in one list of layers, in their
order; a tensor that anything else uses, too, is in no series. Changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from workers.checkpoint import Checkpoint
from workers.errors import CheckpointMismatch, InvalidSetting
from workers.placement.series import Layout, Linear, TensorForm

_MOST_NAMES: Final = 20
"""In a message."""


@dataclass(frozen=True, slots=True)
class FoundSeries:
    """Equal linears of the layers from `start` on."""

    start: int
    linears: Sequence[Linear]
    layout: Layout


def find_series(
    module: torch.nn.Module, name: str, start: int, checkpoint: Checkpoint | None
) -> FoundSeries:
    """The series that `name`, the end of a path as `o_proj` or `self_attn.o_proj`, stands for in
    the layers from number `start` on. Forms are the checkpoint's where there is one.

    Raises InvalidSetting, which lists the names that there are, and CheckpointMismatch."""
    found: dict[str, list[tuple[int, str, torch.nn.Module]]] = {}
    for path, number, qualified, linear in _in_layers(module):
        if number >= start and f".{path}".endswith(f".{name}"):
            found.setdefault(path, []).append((number, qualified, linear))
    if not found:
        names = sorted({path.rpartition(".")[2] for path, _, _, _ in _in_layers(module)})
        some = ", ".join(names[:_MOST_NAMES]) or "no linears in lists of layers"
        where = "this model's layers" if not start else f"the layers from {start} on"
        raise InvalidSetting(f"{name} is no linear of {where}: there are {some}")
    if len(found) > 1:
        raise InvalidSetting(
            f"{name} is more than one series: say which by more of its path, as "
            + ", ".join(sorted(found)[:_MOST_NAMES])
        )
    [members] = found.values()
    linears = [_linear(qualified, linear) for _, qualified, linear in members]
    _check_alone(module, linears)
    forms = [_forms(linear, checkpoint) for linear in linears]
    for one, form in zip(linears, forms, strict=True):
        if form != forms[0]:
            raise InvalidSetting(
                f"{one.name} is not as {linears[0].name} is, {form} instead of {forms[0]}: a "
                "series is of equal linears; it may begin at a later layer"
            )
    return FoundSeries(members[0][0], linears, Layout(forms[0]))


def _in_layers(
    module: torch.nn.Module,
) -> Iterator[tuple[str, int, str, torch.nn.Module]]:
    """Path with `*` for the layer's number, that number, the name in `module`, and the module, of
    whatever has a matrix of its own in a list of layers that is in no other one."""
    lists = [
        (name, layers)
        for name, layers in module.named_modules(remove_duplicate=False)
        if isinstance(layers, torch.nn.ModuleList)
    ]
    for list_name, layers in lists:
        if any(
            list_name.startswith(f"{outer}.") or not outer
            for outer, _ in lists
            if outer != list_name
        ):
            continue
        prefix = f"{list_name}." if list_name else ""
        for number, layer in enumerate(layers):
            for path, linear in layer.named_modules():
                if path and _has_matrix(linear):
                    yield f"{prefix}*.{path}", number, f"{prefix}{number}.{path}", linear


def _has_matrix(linear: torch.nn.Module) -> bool:
    own = (*linear._parameters.values(), *linear._buffers.values())
    return any(tensor is not None and tensor.ndim > 1 for tensor in own)


def _tensors(
    linear: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, str, bool, torch.Tensor]]:
    for owner_name, owner in linear.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        for own, is_buffer in ((owner._parameters, False), (owner._buffers, True)):
            for attribute, tensor in own.items():
                if tensor is not None:
                    yield f"{prefix}{attribute}", owner, attribute, is_buffer, tensor


def _linear(qualified: str, module: torch.nn.Module) -> Linear:
    places = {}
    for name, owner, attribute, is_buffer, tensor in _tensors(module):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise InvalidSetting(
                f"{qualified}.{name} is a {type(tensor).__name__}, whose bytes are its own matter: "
                "a series is of plain tensors"
            )
        places[name] = (owner, attribute, is_buffer)
    return Linear(qualified, places)


def _check_alone(module: torch.nn.Module, linears: Sequence[Linear]) -> None:
    users: dict[object, str] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        begin = id(tensor) if tensor.is_meta or not tensor.numel() else tensor.data_ptr()
        other = users.setdefault((tensor.is_meta, begin), name)
        if other != name and any(
            each.startswith(f"{linear.name}.") for linear in linears for each in (name, other)
        ):
            raise InvalidSetting(
                f"{name} and {other} are one tensor: it is there once already, so shard others"
            )


def _forms(linear: Linear, checkpoint: Checkpoint | None) -> dict[str, TensorForm]:
    sources = {} if checkpoint is None else {one.name: one for one in checkpoint.tensors()}
    forms = {}
    for name in linear.places:
        tensor = linear.tensor(name)
        source = sources.get(f"{linear.name}.{name}")
        if source is not None:
            if source.shape != tuple(tensor.shape):
                raise CheckpointMismatch(
                    f"{source.name} has the shape {source.shape} in the checkpoint, and "
                    f"{tuple(tensor.shape)} in the module"
                )
            tensor = torch.empty(source.shape, dtype=source.dtype, device="meta")
        elif checkpoint is not None and tensor.is_meta:
            raise CheckpointMismatch(f"{linear.name}.{name} is not in the checkpoint")
        dense = torch.empty_like(tensor, device="meta")  # strides as far as they leave no gaps
        forms[name] = TensorForm(dense.dtype, tuple(dense.shape), dense.stride())
    return forms
