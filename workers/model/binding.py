"""Tensors that someone else owns, put into a module of `transformers` that was built on meta.

Owns the rules of which tensor goes where and which may be left over. Invariants: every parameter is
one of the given tensors, never a copy and never written to; buffers are private; nothing is left on
meta. Does not know configs, architectures or what a module computes.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from workers.errors import CheckpointMismatch

logger = logging.getLogger(__name__)

_NAMES_SHOWN: Final = 5


def bind(module: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Put each tensor in its parameter's place; a tied parameter without one shares its twin's."""
    ties = _ties(module)
    keeps_fp32 = _pattern(module._keep_in_fp32_modules | module._keep_in_fp32_modules_strict)
    bound: dict[int, torch.nn.Parameter] = {}  # one parameter for one tensor keeps ties visible
    known: set[str] = set()
    missing: list[str] = []
    wrong: list[str] = []
    for prefix, owner in module.named_modules():
        for kind in (owner._parameters, owner._buffers):
            for short_name, slot in kind.items():
                name = f"{prefix}.{short_name}" if prefix else short_name
                if slot is None or short_name in owner._non_persistent_buffers_set:
                    continue
                known.add(name)
                source = next((n for n in (name, *ties.get(name, ())) if n in tensors), None)
                if source is None:
                    missing.append(name)
                    continue
                tensor = tensors[source]
                is_fp32 = tensor.dtype == torch.float32 and keeps_fp32.search(name) is not None
                fits_dtype = tensor.dtype == slot.dtype or is_fp32 or kind is owner._buffers
                if tensor.shape != slot.shape or not fits_dtype:
                    wrong.append(
                        f"{name} is {_shown(tensor.shape, tensor.dtype)}, "
                        f"the config says {_shown(slot.shape, slot.dtype)}"
                    )
                elif kind is owner._buffers:
                    # A forward pass may write to a buffer.
                    kind[short_name] = tensor.to(
                        torch.float32 if is_fp32 else slot.dtype, copy=True
                    )
                else:
                    kind[short_name] = bound.setdefault(
                        id(tensor), torch.nn.Parameter(tensor, requires_grad=False)
                    )
    surplus = sorted(tensors.keys() - known)
    unplaced = _would_change_results(module, surplus)
    problems = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (
            ("missing", missing),
            ("of another shape or dtype", wrong),
            ("that this architecture has no place for", unplaced),
        )
        if names
    ]
    if problems:
        raise CheckpointMismatch(
            f"the checkpoint's tensors don't fit {type(module).__name__} in {dtype}: "
            + "; ".join(problems)
        )
    if surplus:
        logger.warning("%d tensors are not used: %s", len(surplus), _first(surplus))


def _ties(module: Any) -> dict[str, list[str]]:
    """Of each tied parameter, its twins: whichever the checkpoint has stands for all."""
    groups: dict[str, list[str]] = {}
    for target, source in module.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    return {name: group for group in groups.values() for name in group}


def _would_change_results(module: Any, surplus: Sequence[str]) -> list[str]:
    """Those of the `surplus` tensors that a module of ours would use if only it had a place for
    them (a bias, say, that the config denies), or that make up a further layer: leaving them out
    would compute another model. Copies of derived buffers and unknown side heads may go."""
    ignored = _pattern(module._keys_to_ignore_on_load_unexpected)
    modules = dict(module.named_modules())
    lists = [name for name, part in modules.items() if isinstance(part, torch.nn.ModuleList)]
    unplaced = []
    for name in surplus:
        owner_name, _, short_name = name.rpartition(".")
        owner = modules.get(owner_name)
        if ignored.search(name) or (owner is not None and short_name in owner._buffers):
            continue
        further_layer = any(
            name.startswith(f"{prefix}.") and name[len(prefix) + 1 :].split(".")[0].isdecimal()
            for prefix in lists
        )
        if owner is not None or further_layer:
            unplaced.append(name)
    return unplaced


def _pattern(patterns: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{part})" for part in sorted(patterns)) or r"(?!)")


def _shown(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
