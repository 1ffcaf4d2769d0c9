"""Log probabilities, of generated tokens and of a prompt's.

Owns how they are computed. They are those of the model's own logits, as vLLM gives them by default
(`raw_logprobs`): nothing that a request asks for changes them. Invariant: what comes out is finite.
"""

from collections.abc import Sequence
from typing import Final

import torch

from workers.errors import InvalidLogits
from workers.messages import TokenLogprobs
from workers.sampling.draw import likeliest

LEAST: Final = -9999.0
"""What stands for the logarithm of nothing, as in OpenAI's API: JSON has no infinity."""
_PIECE_BYTES: Final = 32 << 20
"""A prompt's logits are converted so many bytes at a time."""


def token_logprobs(row: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Of `token` and of the `count` likeliest tokens. `row`: float32 logits of one position."""
    own = row[token]
    normalizer = row.logsumexp(0)
    top = likeliest(row, count) if count else None
    return TokenLogprobs(
        logprob=max(float(own - normalizer), LEAST),
        rank=int((row > own).sum()) + 1,
        top_ids=tuple(top.tolist()) if top is not None else (),
        top_logprobs=(
            tuple((row[top] - normalizer).clamp(min=LEAST).tolist()) if top is not None else ()
        ),
    )


def prompt_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], count: int
) -> tuple[TokenLogprobs, ...]:
    """Of the tokens of a prompt: row i of `logits` [n, vocab_size] is the distribution that
    `token_ids[i]` was chosen from, so it belongs to the position before that token. Raises
    `InvalidLogits`."""
    rows_at_once = max(1, _PIECE_BYTES // (4 * logits.shape[-1]))
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), rows_at_once):
        rows = logits[start : start + rows_at_once].float()
        if not bool(rows.amax(dim=-1).isfinite().all()):
            raise InvalidLogits("the model's logits for the prompt are not finite")
        found += (
            token_logprobs(row, token, count)
            for row, token in zip(rows, token_ids[start : start + rows_at_once], strict=True)
        )
    return tuple(found)
