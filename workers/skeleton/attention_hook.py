"""The attention function of every architecture that is built here: whichever is in force.

Owns the name under which architectures look it up. Invariant: outside of `attention_by` a call is
refused. Does not know how attention is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from transformers import AttentionInterface

from workers.errors import UnsupportedCheckpoint

NAME: Final = "onecopy-pass"

Attend = Callable[..., tuple[torch.Tensor, None]]
"""Takes what transformers hands to an attention function."""

_current: ContextVar[Attend] = ContextVar("attention function in force")


@contextmanager
def attention_by(attend: Attend) -> Iterator[None]:
    """While it is a context, architectures' attention calls go to `attend`."""
    token = _current.set(attend)
    try:
        yield
    finally:
        _current.reset(token)


def _attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    attend = _current.get(None)
    if attend is None:
        raise UnsupportedCheckpoint(f"{type(module).__name__} calls attention outside of a pass")
    return attend(module, *args, **kwargs)


AttentionInterface.register(NAME, _attend)
