"""Buffers that an architecture computes from its config: rotary frequencies and the like.

Invariant: they are private, small, and either have the values that the architecture gives them or
are refused.
"""

from typing import Any

import torch

from workers.config.architecture import check_buffers
from workers.errors import UnsupportedCheckpoint


def compute_buffers(module: Any) -> None:
    """Give buffers that no checkpoint holds their values, in private memory.

    Only the model's own initialisation knows the values, and it would also fill parameters: so it
    runs while those are still on meta. A value that no model has shows a buffer left alone.
    """
    check_buffers(
        sum(
            buffer.numel() * buffer.element_size()
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and name in owner._non_persistent_buffers_set
        )
    )
    owners: dict[str, torch.nn.Module] = {}
    for name, owner in module.named_modules():
        derived = owner._buffers.keys() & owner._non_persistent_buffers_set
        for buffer_name in derived:
            buffer = owner._buffers[buffer_name]
            if buffer is None or not buffer.is_meta:
                continue
            if buffer.dtype == torch.bool:  # no value would show that nobody has set it
                raise UnsupportedCheckpoint(
                    f"can't tell the values of the buffer {name}.{buffer_name}"
                )
            owner._buffers[buffer_name] = torch.full(
                buffer.shape, _unset(buffer.dtype), dtype=buffer.dtype
            )
            owners[name] = owner
    for name, owner in owners.items():
        module._init_weights(owner)
        for buffer_name in owner._buffers.keys() & owner._non_persistent_buffers_set:
            buffer = owner._buffers[buffer_name]
            if buffer is not None and _has_unset(buffer):
                raise UnsupportedCheckpoint(
                    f"can't tell the values of the buffer {name}.{buffer_name}: see what "
                    "config.json says of rotations (rope)"
                )
            if buffer is not None and "inv_freq" in buffer_name and not buffer.isfinite().all():
                raise UnsupportedCheckpoint(
                    f"{name}.{buffer_name}, by which tokens are told apart, is infinite: see what "
                    "config.json says of rotations (rope)"
                )


def _unset(dtype: torch.dtype) -> float:
    """The value that shows an element nobody has set."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _has_unset(buffer: torch.Tensor) -> bool:
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return bool((buffer == _unset(buffer.dtype)).any())


def move_buffers(module: Any, device: torch.device) -> None:
    """Private buffers go to where the module is computed."""
    if device.type in ("cpu", "meta"):
        return
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)
