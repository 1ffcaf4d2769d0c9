"""When greedy generation in bf16 is that of a reference: every token is its choice, up to a tie.

Sums of the same numbers in another order differ by rounding, and where the two best tokens are that
near to each other, either may come first.
"""

from collections.abc import Sequence
from typing import Any

import torch

BF16_TIE_ULPS = 4
"""Two logits nearer than that are a tie: each is rounded to bf16 itself, after a sum of products
that were rounded to bf16 in every layer."""


def ulps_below_the_best(reference: Any, prompt: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """Of each token of `new`: by how many bf16 ulps the reference, given all tokens before it,
    prefers its own choice. 0 for the same choice."""
    inputs = torch.tensor([[*prompt, *new]])
    with torch.inference_mode():
        logits = reference(inputs, logits_to_keep=len(new) + 1).logits[0, :-1].float()
    best = logits.max(dim=-1).values
    chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
    ulp = 2.0 ** (best.abs().log2().floor() - 7)  # bf16 has 8 bits of precision
    return (best - chosen) / ulp
