"""One step's tokens: which rows need what, and the choice.

Owns the order of a step's work. Invariants: a row whose logits can't be used gives an error in its
place and leaves the others alone; a batch that is greedy throughout costs one pass over its logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.errors import InvalidLogits
from workers.messages import TokenLogprobs
from workers.sampling.draw import draw
from workers.sampling.logprobs import token_logprobs
from workers.sampling.random_number import uniform
from workers.sampling.rules import apply_rules
from workers.sampling.state import SequenceSampler


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token, and its log probabilities if the request asked for them."""

    token: int
    logprobs: TokenLogprobs | None


def sample(
    logits: torch.Tensor, samplers: Sequence[SequenceSampler]
) -> list[Sampled | InvalidLogits]:
    """The next token of each sequence. Row i of `logits` [n, vocab_size] (any float dtype, never
    written to) is that of sampler i; none may occur twice. Accepts nothing: that is the caller's,
    who may yet drop a token."""
    if not samplers:
        return []
    best, greedy = logits.max(dim=-1)  # NaN wins, so that one number a row tells all
    tokens: list[int | InvalidLogits] = [
        token if usable else InvalidLogits("the model's logits are not finite")
        for token, usable in zip(greedy.tolist(), best.isfinite().tolist(), strict=True)
    ]
    usable = [row for row, token in enumerate(tokens) if isinstance(token, int)]
    ruled = [row for row in usable if samplers[row].has_rules]
    changed = dict[int, torch.Tensor]()
    if ruled:
        rows = logits[ruled].float()
        apply_rules(rows, [samplers[row] for row in ruled])
        changed = dict(zip(ruled, rows, strict=True))
        best, greedy = rows.max(dim=-1)
        for row, token, left in zip(ruled, greedy.tolist(), best.isfinite().tolist(), strict=True):
            tokens[row] = (
                token if left else InvalidLogits("the request's rules leave no token to choose")
            )
    for row in usable:
        params = samplers[row].params
        if params.temperature and isinstance(tokens[row], int):
            own = changed[row] if row in changed else logits[row].float()
            number = uniform(params.seed, samplers[row].num_generated)
            tokens[row] = draw(own, params, number)
    return [
        token if isinstance(token, InvalidLogits) else _sampled(logits[row], token, samplers[row])
        for row, token in enumerate(tokens)
    ]


def _sampled(row: torch.Tensor, token: int, sampler: SequenceSampler) -> Sampled:
    count = sampler.params.logprobs
    return Sampled(token, None if count is None else token_logprobs(row.float(), token, count))
