"""One step's tokens: which rows need what, and the choice.

Owns the order of a step's work. Invariants: a row whose logits can't be used gives an error in its
place and leaves the others alone; a row that is greedy and has no rules costs one pass over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.errors import InvalidLogits, NoTokenLeft
from workers.messages import TokenLogprobs
from workers.sampling.draw import LEAST_TEMPERATURE, draw
from workers.sampling.logprobs import token_logprobs
from workers.sampling.pieces import largest
from workers.sampling.rules import apply_rules
from workers.sampling.scratch import groups
from workers.sampling.sequence_sampler import SequenceSampler

_NOT_FINITE = "the model's logits are not finite"
_NOTHING_LEFT = "the request's rules leave no token to choose"


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
    who may yet drop a token. One thread at a time may call it with any of these samplers."""
    if not samplers:
        return []
    best, greedy = largest(logits)  # NaN wins, so that one number a row tells all
    tokens: list[int | InvalidLogits] = [
        token if usable else InvalidLogits(_NOT_FINITE)
        for token, usable in zip(greedy.tolist(), best.isfinite().tolist(), strict=True)
    ]
    laborious = [
        row
        for row, one in enumerate(samplers)
        if isinstance(tokens[row], int) and (one.has_rules or _is_random(one))
    ]
    for start, rows in groups(logits, laborious):
        indices = laborious[start : start + len(rows)]
        chosen = _choose(rows, best[indices], [samplers[index] for index in indices])
        for index, token in zip(indices, chosen, strict=True):
            tokens[index] = token
    return _with_logprobs(logits, tokens, samplers)


def _is_random(sampler: SequenceSampler) -> bool:
    return sampler.params.temperature >= LEAST_TEMPERATURE


def _choose(
    rows: torch.Tensor, best: torch.Tensor, samplers: Sequence[SequenceSampler]
) -> list[int | InvalidLogits]:
    """Tokens of rows that have rules or are random, or both. `best`: the rows' maxima. The rows are
    overwritten."""
    tokens: list[int | InvalidLogits] = [0] * len(samplers)
    best = best.float()
    ruled = [index for index, one in enumerate(samplers) if one.has_rules]
    if ruled:
        problems = apply_rules([rows[index] for index in ruled], [samplers[one] for one in ruled])
        best, greedy = largest(rows)
        usable, chosen = best.isfinite().tolist(), greedy.tolist()
        for index, problem in zip(ruled, problems, strict=True):
            if problem is not None:
                tokens[index] = NoTokenLeft(str(problem))
            elif usable[index]:
                tokens[index] = chosen[index]
            else:
                tokens[index] = NoTokenLeft(_NOTHING_LEFT)
    random = [
        index
        for index, one in enumerate(samplers)
        if _is_random(one) and isinstance(tokens[index], int)
    ]
    if random:
        all_of_them = len(random) == len(samplers)
        drawn = draw(
            rows if all_of_them else rows[random],
            best if all_of_them else best[random],
            [samplers[index].params for index in random],
            [samplers[index].random_number() for index in random],
        )
        for index, token in zip(random, drawn, strict=True):
            tokens[index] = token
    return tokens


def _with_logprobs(
    logits: torch.Tensor,
    tokens: Sequence[int | InvalidLogits],
    samplers: Sequence[SequenceSampler],
) -> list[Sampled | InvalidLogits]:
    found: dict[int, TokenLogprobs] = {}
    wanted = [
        (row, token, count)
        for row, (token, one) in enumerate(zip(tokens, samplers, strict=True))
        if isinstance(token, int) and (count := one.params.logprobs) is not None
    ]
    if wanted:
        indices, chosen, counts = zip(*wanted, strict=True)
        own = logits if len(indices) == len(logits) else logits[list(indices)]
        found = dict(zip(indices, token_logprobs(own, chosen, counts), strict=True))
    return [
        token if isinstance(token, InvalidLogits) else Sampled(token, found.get(row))
        for row, token in enumerate(tokens)
    ]
