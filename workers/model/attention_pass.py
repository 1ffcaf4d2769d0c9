"""One pass through an architecture of `transformers`: the batch that its attention calls belong to.

The batch reaches attention beside the architecture's own arguments, which not every architecture
hands on. Invariant: what is computed is attention as `workers.model.attention` knows it, once for
each layer of the pass, with the shapes and the sliding window that the model's geometry tells; an
architecture that calls it otherwise (a window
that only its mask knows, two calls for a layer, a bias, values of another size) is refused by name
instead of computing something else. Does not know weights, scheduling or how attention is computed.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from workers.errors import UnsupportedCheckpoint
from workers.kv.layout import KVLayout
from workers.model.attention import attend
from workers.model.batch import Batch
from workers.skeleton.attention_hook import attention_by

_WITHOUT_EFFECT: Final = frozenset(
    {
        "cache_position",
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that change nothing where queries are causal and weights are not trained."""

_BIASES: Final = frozenset({"position_bias", "s_aux"})
"""Arguments that `attend` itself takes or refuses."""


@dataclass(slots=True)
class _Pass:
    batch: Batch
    layout: KVLayout
    windows: Sequence[int | None]
    max_model_len: int
    workspace_bytes: int
    layers: range
    seen: set[int] = field(default_factory=set)


@contextmanager
def attention_pass(
    batch: Batch,
    layout: KVLayout,
    windows: Sequence[int | None],
    max_model_len: int,
    workspace_bytes: int,
    layers: range | None = None,
) -> Iterator[None]:
    """While it is a context, attention calls compute `batch`. `windows`: of each layer, how many of
    the nearest keys a query sees, or all; one of `max_model_len` keys or more hides none. `layers`:
    those that are computed, by default all.

    Raises `UnsupportedCheckpoint` at the end where one of them has not called.
    """
    layers = range(len(layout.layers)) if layers is None else layers
    this = _Pass(batch, layout, windows, max_model_len, workspace_bytes, layers)
    with attention_by(functools.partial(_attend, this)):
        yield
    silent = sorted(set(layers) - this.seen)
    if silent:
        raise UnsupportedCheckpoint(f"layer {silent[0]} does not call the attention function")


def _attend(
    this: _Pass,
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `attend`, for the batch of the pass. Raises `UnsupportedCheckpoint` also for a call that
    is not what the geometry tells."""
    name = type(module).__name__
    layer: int = module.layer_idx  # type: ignore[assignment]
    problem = _problem(this, layer, key, value, sliding_window, is_causal)
    given = {key for key, argument in kwargs.items() if argument is not None}
    if unknown := given - _WITHOUT_EFFECT - _BIASES:
        problem = f"hands {', '.join(sorted(unknown))} to attention"
    if problem is not None:
        raise UnsupportedCheckpoint(f"{name} {problem}, which is not computed here")
    this.seen.add(layer)
    return attend(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        batch=this.batch,
        workspace_bytes=this.workspace_bytes,
        **{bias: kwargs[bias] for bias in given & _BIASES},
    )


def _problem(
    this: _Pass,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    is_causal: bool | None,
) -> str | None:
    """Why a call would compute something else, if so."""
    if layer in this.seen:
        return f"attends twice in layer {layer}"
    if layer not in this.layers:
        return f"has a layer {layer} beyond the last one"
    expected = this.layout.layers[layer]
    shape = (1, expected.num_heads, this.batch.num_rows, expected.head_dim)
    if key.shape != shape or value.shape != shape:
        return f"has keys {list(key.shape)} and values {list(value.shape)} in layer {layer}"
    if _effective(window, this) != _effective(this.windows[layer], this):
        return f"hides keys by other means than a sliding window in layer {layer}"
    return "looks at later tokens" if is_causal is False else None


def _effective(window: int | None, this: _Pass) -> int | None:
    """None for one that hides nothing."""
    return None if window is None or window >= this.max_model_len else window
