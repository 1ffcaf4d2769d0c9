"""What a request demands of logits before a token is chosen: biases, penalties and masks.

Owns their meaning, which is vLLM's (v1/sample/sampler.py). Invariants: a token that is forbidden
gets no weight whatever else is asked for; elements are changed each by itself, so that a row is the
same in any batch. Knows neither temperature nor how a token is chosen.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from workers.errors import GrammarFailed
from workers.grammar.bitmask import clear_bits
from workers.sampling.sequence_sampler import SequenceSampler

_NEVER: Final = float("-inf")


def apply_rules(
    rows: Sequence[torch.Tensor], samplers: Sequence[SequenceSampler]
) -> list[GrammarFailed | None]:
    """Change float32 logits [vocab_size] in place; row i is that of sampler i. Returns for each why
    its grammar can't go on, if so."""
    for row, one in zip(rows, samplers, strict=True):
        if one.bias.numel():
            # As in OpenAI's API: added to the logits.
            row.index_add_(0, one.bias_ids, one.bias)
        if one.counts is not None:
            _penalize(row, one)
        if one.ends_too_early and one.grammar is None:
            row.index_fill_(0, one.end_ids, _NEVER)
    return _mask(rows, samplers)


def _penalize(row: torch.Tensor, sampler: SequenceSampler) -> None:
    """`repetition_penalty` divides what speaks for a token of prompt or answer, and multiplies what
    speaks against it (N. S. Keskar et al., "CTRL", 2019, section 4.1, with the sign that
    transformers and vLLM mind). Then OpenAI's: `frequency_penalty` for each time that a token was
    generated, and `presence_penalty` once."""
    assert sampler.counts is not None  # noqa: S101 - the caller looked
    params, token_ids, numbers = sampler.params, sampler.counts.token_ids, sampler.counts.numbers
    logits = row[token_ids]
    if params.repetition_penalty != 1:
        factor = params.repetition_penalty
        logits = torch.where(logits > 0, logits / factor, logits * factor)
    if params.frequency_penalty:
        logits -= params.frequency_penalty * numbers
    if params.presence_penalty:
        logits -= params.presence_penalty * (numbers > 0)
    row[token_ids] = logits


def _mask(
    rows: Sequence[torch.Tensor], samplers: Sequence[SequenceSampler]
) -> list[GrammarFailed | None]:
    """`allowed_token_ids` and grammars: a bit for each token, unpacked for all rows at once."""
    problems: list[GrammarFailed | None] = [None] * len(samplers)
    masked = [
        index
        for index, one in enumerate(samplers)
        if one.allowed is not None or one.grammar is not None
    ]
    if not masked:
        return problems
    vocab_size = rows[0].numel()
    packed = np.full((len(masked), -(-vocab_size // 8)), 0xFF, dtype=np.uint8)
    for bits, index in zip(packed, masked, strict=True):
        try:
            _restrict(bits, samplers[index])
        except GrammarFailed as error:
            problems[index] = error
    forbidden = np.unpackbits(~packed, axis=1, count=vocab_size, bitorder="little")
    for mask, index in zip(torch.from_numpy(forbidden.view(np.bool_)), masked, strict=True):
        rows[index].masked_fill_(mask, _NEVER)
    return problems


def _restrict(bits: NDArray[np.uint8], sampler: SequenceSampler) -> None:
    grammar = sampler.grammar
    if grammar is not None:
        grammar.fill_mask(bits, sampler.text_end_ids)
    if sampler.allowed is not None:
        bits &= sampler.allowed
    if grammar is not None and (sampler.ends_too_early or sampler.params.ignore_eos):
        going_on = bits.copy()
        clear_bits(going_on, sampler.text_end_ids)
        if going_on.any():  # else the text is complete, and nothing could follow but its end
            bits[:] = going_on
