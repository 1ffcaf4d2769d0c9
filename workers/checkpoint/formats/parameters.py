"""Which stored elements make up each parameter of an architecture. Pure.

Owns the step from a checkpoint's names and layouts to those of `transformers`, by its own tables
(`conversion_mapping`): names change, and experts stored one by one become rows of one tensor.
Invariant: a parameter is a sequence of runs of stored elements, so that it can be written where it
will lie, a piece at a time, and nothing is computed; what takes more (a transposition) is refused
by name. Does not know files.

    stored    experts.0.gate_proj [I, H]   experts.0.up_proj [I, H]   experts.1.gate_proj [I, H] …
    laid out  experts.gate_up_proj [num_experts, 2 I, H]: these runs, in this order
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch

from workers.errors import CheckpointMismatch, UnsupportedCheckpoint

Shape = tuple[int, ...]

_MAX_RUNS: Final = 1 << 16
"""Of one parameter. More would be columns of a matrix rather than rows."""


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [begin, end) of a stored tensor, row-major."""

    source: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the architecture; or a tensor that it has no place for, as it is stored."""

    name: str
    shape: Shape
    runs: tuple[Run, ...]
    keeps_fp32: bool = False
    """Whatever the others are cast to."""


def parameters_of(
    config: Mapping[str, Any], stored: Mapping[str, Shape], dtype: torch.dtype | None
) -> list[Parameter]:
    """All that a checkpoint with these tensors holds, in the order of its files.

    `dtype` is the one that most parameters are cast to. Tensors that the architecture has no place
    for are left as they are, but for those that transformers ignores. Raises UnsupportedCheckpoint,
    so that what can't be computed is not loaded at all, and CheckpointMismatch.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    from workers.skeleton.decoder import skeleton

    module = skeleton(config, dtype or torch.float32)
    slots = module.state_dict()
    transforms = get_model_conversion_mapping(module)
    renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}

    plain: dict[str, str] = {}  # parameter → the tensor that it is
    fused: dict[str, _Fused] = {}  # first parameter → the tensors that it is made of
    # In the order of transformers, which says what follows what.
    for source in sorted(stored, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(
            source, renamings, converters, module.base_model_prefix, slots
        )
        if name not in slots and source in slots:
            name, pattern = source, None
        if name not in slots:
            continue
        if name in plain or (name in fused and pattern is None):
            raise CheckpointMismatch(f"the checkpoint holds {name!r} twice, once as {source!r}")
        if pattern is None:
            plain[name] = source
        else:
            group = fused.setdefault(name, _Fused(by_pattern[pattern], {}))
            group.sources.setdefault(pattern, []).append(source)

    keeps_fp32 = _fp32_names(module, dtype)
    made: dict[str, Parameter | None] = {  # each at its first tensor's place
        source: _whole(name, source, stored[source], keeps_fp32(name))
        for name, source in plain.items()
    }
    position = {source: index for index, source in enumerate(stored)}
    for name, group in fused.items():
        used = [source for part in group.sources.values() for source in part]
        made |= dict.fromkeys(used)
        rows = _convert(name, group, stored)
        first = min(used, key=position.__getitem__)
        made[first] = Parameter(name, rows.shape, rows.runs, keeps_fp32(name))
    ignored = re.compile("|".join(module._keys_to_ignore_on_load_unexpected) or r"(?!)")
    for source, shape in stored.items():
        if source not in made and ignored.search(source) is None:
            made[source] = as_stored(source, shape)
    return [one for source in stored if (one := made.get(source)) is not None]


def as_stored(name: str, shape: Shape) -> Parameter:
    """A tensor that is laid out under the name it has."""
    return _whole(name, name, shape, False)


@dataclass(frozen=True, slots=True)
class _Fused:
    converter: Any
    sources: dict[str, list[str]]
    """Of each of the converter's patterns: the tensors that match it, in order."""


class _Rows:
    """A tensor that consists of runs, one after the other in row-major order."""

    def __init__(self, shape: Shape, runs: Iterable[Run]):
        self.shape = shape
        self.runs = tuple(runs)
        self._ends = list(accumulate(run.end - run.begin for run in self.runs))

    def cut(self, begin: int, end: int) -> list[Run]:
        """Elements [begin, end)."""
        found = []
        for index in range(bisect_right(self._ends, begin), len(self.runs)):
            run, run_end = self.runs[index], self._ends[index]
            start = run_end - (run.end - run.begin)
            if start >= end:
                break
            low, high = max(begin, start) - start, min(end, run_end) - start
            found.append(Run(run.source, run.begin + low, run.begin + high))
        return found


def _whole(name: str, source: str, shape: Shape, keeps_fp32: bool) -> Parameter:
    return Parameter(name, shape, (Run(source, 0, math.prod(shape)),), keeps_fp32)


def _convert(name: str, group: _Fused, stored: Mapping[str, Shape]) -> _Rows:
    """What `WeightConverter.convert` of transformers makes of these tensors: a stack of each
    pattern's, and where there are several patterns, their stacks side by side."""
    patterns: Sequence[str] = group.converter.source_patterns
    stacks = [
        _stacked(name, [_Rows(stored[one], [Run(one, 0, math.prod(stored[one]))]) for one in part])
        for pattern in patterns
        if (part := group.sources.get(pattern))
    ]
    operations = [
        (type(one).__name__, getattr(one, "dim", None)) for one in group.converter.operations
    ]
    match operations:
        case [("MergeModulelist", 0)] if len(stacks) == 1:
            return stacks[0]
        case [("MergeModulelist", 0), ("Concatenate", int(dim))]:
            return _concatenated(name, stacks, dim)
    raise UnsupportedCheckpoint(
        f"{name} is made of {', '.join(patterns)} by {operations}, which is not done here"
    )


def _stacked(name: str, parts: Sequence[_Rows]) -> _Rows:
    """`torch.stack(parts, dim=0)`."""
    if len({part.shape for part in parts}) != 1:
        raise CheckpointMismatch(f"the tensors that make up {name} are not of one shape")
    return _Rows((len(parts), *parts[0].shape), (run for part in parts for run in part.runs))


def _concatenated(name: str, parts: Sequence[_Rows], dim: int) -> _Rows:
    """`torch.cat(parts, dim)`."""
    others = {(part.shape[:dim], part.shape[dim + 1 :]) for part in parts}
    if len(others) != 1 or not 0 <= dim < len(parts[0].shape):
        raise CheckpointMismatch(f"the tensors that make up {name} do not fit together")
    outer = math.prod(parts[0].shape[:dim])
    if outer * len(parts) > _MAX_RUNS:
        raise UnsupportedCheckpoint(f"{name} is made of columns, which is not done here")
    steps = [math.prod(part.shape[dim:]) for part in parts]
    runs = [
        run
        for index in range(outer)
        for part, step in zip(parts, steps, strict=True)
        for run in part.cut(index * step, (index + 1) * step)
    ]
    length = sum(part.shape[dim] for part in parts)
    return _Rows((*parts[0].shape[:dim], length, *parts[0].shape[dim + 1 :]), runs)


def _fp32_names(module: Any, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Which parameters transformers keeps in fp32 where the others are cast to `dtype`."""
    globs = module._get_dtype_plan(dtype) if dtype is not None else {}
    pattern = re.compile("|".join(glob.replace("*", ".*") for glob in globs) or r"(?!)")
    return lambda name: pattern.search(name) is not None
