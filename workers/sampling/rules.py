"""What a request demands of logits before a token is chosen: masks, biases and penalties.

Owns their meaning and their order, vLLM's (v1/sample/sampler.py): grammar, `allowed_token_ids`,
`min_tokens`, `logit_bias`, then penalties. Invariants: a token that is forbidden gets no weight
whatever else is asked for; elements are changed each by itself, so that a row is the same in any
batch. Knows neither temperature nor how a token is chosen.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from workers.sampling.state import SequenceSampler

_NEVER: Final = float("-inf")


def apply_rules(rows: torch.Tensor, samplers: Sequence[SequenceSampler]) -> None:
    """Changes the float32 logits [n, vocab_size] in place; row i is that of sampler i."""
    _bias(rows, samplers)
    _penalize(rows, samplers)
    _forbid_ends(rows, samplers)
    _mask(rows, samplers)


def _bias(rows: torch.Tensor, samplers: Sequence[SequenceSampler]) -> None:
    """`logit_bias`, as in OpenAI's API: added to the logits."""
    for row, one in zip(rows, samplers, strict=True):
        if one.bias.numel():
            row.index_add_(0, one.bias_ids, one.bias)


def _penalize(rows: torch.Tensor, samplers: Sequence[SequenceSampler]) -> None:
    """`repetition_penalty` divides what speaks for a token of prompt or answer, and multiplies what
    speaks against it (N. S. Keskar et al., "CTRL", 2019, section 4.1, with the sign that
    transformers and vLLM mind). Then OpenAI's: `frequency_penalty` for each time that a token was
    generated, and `presence_penalty` once."""
    for row, one in zip(rows, samplers, strict=True):
        if one.counts is None or not one.counts.token_ids.numel():
            continue
        params, token_ids, numbers = one.params, one.counts.token_ids, one.counts.numbers
        logits = row[token_ids]
        if params.repetition_penalty != 1:
            factor = params.repetition_penalty
            logits = torch.where(logits > 0, logits / factor, logits * factor)
        if params.frequency_penalty:
            logits -= params.frequency_penalty * numbers
        if params.presence_penalty:
            logits -= params.presence_penalty * (numbers > 0)
        row[token_ids] = logits


def _forbid_ends(rows: torch.Tensor, samplers: Sequence[SequenceSampler]) -> None:
    """`min_tokens`, except where a grammar's text is complete and nothing else could follow."""
    for row, one in zip(rows, samplers, strict=True):
        if one.ends_too_early and not (one.grammar is not None and one.grammar.must_end):
            row[one.end_ids] = _NEVER


def _mask(rows: torch.Tensor, samplers: Sequence[SequenceSampler]) -> None:
    """`allowed_token_ids` and grammars, all rows at once."""
    masked = [
        index
        for index, one in enumerate(samplers)
        if one.allowed is not None or one.grammar is not None
    ]
    if not masked:
        return
    vocab_size = rows.shape[-1]
    packed = np.zeros((len(masked), -(-vocab_size // 8)), dtype=np.uint8)
    for bits, index in zip(packed, masked, strict=True):
        one = samplers[index]
        if one.grammar is not None:
            one.grammar.fill_mask(bits)
        else:
            bits[:] = 0xFF
        if one.allowed is not None:
            bits &= one.allowed
    forbidden = np.unpackbits(~packed, axis=1, count=vocab_size, bitorder="little")
    mask = torch.from_numpy(forbidden.view(np.bool_))
    if len(masked) == len(samplers):
        rows.masked_fill_(mask, _NEVER)
    else:
        for bits, index in zip(mask, masked, strict=True):
            rows[index].masked_fill_(bits, _NEVER)
