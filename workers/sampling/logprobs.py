"""Log probabilities, of generated tokens and of a prompt's.

Owns how they are computed. They are those of the model's own logits, as vLLM gives them by default
(`raw_logprobs`): nothing that a request asks for changes them. Invariant: what comes out is finite.
"""

from collections.abc import Sequence
from typing import Final

import torch

from workers.errors import InvalidLogits
from workers.messages import TokenLogprobs
from workers.sampling.pieces import falling, piece_maxima, top
from workers.sampling.scratch import groups

LEAST: Final = -9999.0
"""What stands for the logarithm of nothing, as in OpenAI's API: JSON has no infinity."""


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Of `token_ids[i]`, and of the `counts[i]` likeliest tokens, in the distribution of row i of
    `logits` [n, vocab_size]. Raises `InvalidLogits` if a row has no finite maximum."""
    found: list[TokenLogprobs] = []
    for start, rows in groups(logits):
        maxima = piece_maxima(rows)
        best = maxima.amax(dim=1)
        if not bool(best.isfinite().all()):
            raise InvalidLogits("the model's logits are not finite")
        ids, asked = token_ids[start : start + len(rows)], counts[start : start + len(rows)]
        own = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
        ranks = [
            1 if is_best else int((row > logit).count_nonzero()) + 1
            for row, logit, is_best in zip(rows, own, (own == best).tolist(), strict=True)
        ]
        top_ids = [
            falling(row, top(row, count, of_row)) if count else torch.empty(0, dtype=torch.int64)
            for row, of_row, count in zip(rows, maxima, asked, strict=True)
        ]
        top_logits = [row[of_row] for row, of_row in zip(rows, top_ids, strict=True)]
        # The likeliest token's probability is exp(best - normalizer).
        torch.softmax(rows, dim=-1, out=rows)
        normalizers = best - piece_maxima(rows).amax(dim=1).log()
        own_logprobs = (own - normalizers).clamp(min=LEAST).tolist()
        found += (
            TokenLogprobs(
                logprob=own_logprobs[index],
                rank=ranks[index],
                top_ids=tuple(top_ids[index].tolist()),
                top_logprobs=tuple(
                    (top_logits[index] - normalizers[index]).clamp(min=LEAST).tolist()
                ),
            )
            for index in range(len(rows))
        )
    return found


def prompt_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], count: int
) -> tuple[TokenLogprobs, ...]:
    """Of the tokens of a prompt: row i of `logits` [n, vocab_size] is the distribution that
    `token_ids[i]` was chosen from, so it belongs to the position before that token. Raises
    `InvalidLogits`."""
    return tuple(token_logprobs(logits, token_ids, [count] * len(token_ids)))
