"""What a sequence carries from token to token for the choice of the next.

Owns its parameters in the form in which rows of logits take them, its counts and its grammar.
Invariant: it is a function of the parameters, the prompt and the generated tokens, so that any
instance can make it anew. Does not know logits.
"""

from collections.abc import Collection

import numpy as np
import torch

from workers.grammar.bitmask import packed
from workers.grammar.grammar import Grammar
from workers.messages import SamplingParams
from workers.sampling.counts import TokenCounts
from workers.sampling.random_number import uniform
from workers.sampling.tokens import Tokens


class SequenceSampler:
    """State of one sequence; made when it is admitted."""

    def __init__(
        self,
        params: SamplingParams,
        tokens: Tokens,
        vocab_size: int,
        eos_token_ids: Collection[int],
        grammar: Grammar | None = None,
    ) -> None:
        """`params` must be such that `invalid_params` finds nothing in them. `grammar` begins here,
        with those `tokens` that were generated. Only `accept` adds to them."""
        self.params = params
        self.tokens = tokens
        self.grammar = grammar
        self.end_ids = end_token_ids(params, vocab_size, eos_token_ids)
        self._ends = frozenset({*eos_token_ids, *params.stop_token_ids})
        self.text_end_ids = np.array(
            sorted(one for one in self._ends if one < vocab_size), dtype=np.int64
        )
        """What ends a text that a grammar says is complete, even if `ignore_eos` is set."""
        self.counts = _counts(params, tokens)
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self.bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self.allowed = (
            None
            if params.allowed_token_ids is None
            else packed(params.allowed_token_ids, vocab_size)
        )
        self._has_rules = (
            self.counts is not None
            or self.allowed is not None
            or grammar is not None
            or bool(params.logit_bias)
        )
        if grammar is not None:
            grammar.begin(tokens.generated, self._ends)

    def accept(self, token: int) -> None:
        """The sequence goes on with `token`."""
        if self.counts is not None:
            self.counts.add(token)
        if self.grammar is not None:
            self.grammar.accept(token, ends=token in self._ends)
        self.tokens.ids.append(token)

    def random_number(self) -> float:
        """The next token's own."""
        return uniform(self.params.seed, self.tokens.num_generated)

    def leave(self) -> None:
        """The sequence has ended."""
        if self.grammar is not None:
            self.grammar.leave()

    @property
    def finished(self) -> bool:
        """Whether the grammar allows nothing more: the last token accepted was its end."""
        return self.grammar is not None and self.grammar.finished

    @property
    def ends_too_early(self) -> bool:
        """Whether the next token may not be an end token yet."""
        return self.tokens.num_generated < self.params.min_tokens and self.end_ids.numel() > 0

    @property
    def has_rules(self) -> bool:
        """Whether anything but the logits and the filters decides on the next token."""
        return self._has_rules or self.ends_too_early


def invalid_params(params: SamplingParams, vocab_size: int) -> str | None:
    """What these parameters ask for that a model with this vocabulary can't do, if anything."""
    for name in ("logit_bias", "allowed_token_ids"):
        largest = max(getattr(params, name) or (0,))
        if largest >= vocab_size:
            return f"{name} names the token {largest}; the model has {vocab_size}"
    return None


def end_token_ids(
    params: SamplingParams, vocab_size: int, eos_token_ids: Collection[int]
) -> torch.Tensor:
    """The tokens that end a sequence, without those that the model can't generate."""
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    return torch.tensor(sorted(one for one in ends if one < vocab_size), dtype=torch.int64)


def _counts(params: SamplingParams, tokens: Tokens) -> TokenCounts | None:
    repetition = params.repetition_penalty != 1
    if not (repetition or params.presence_penalty or params.frequency_penalty):
        return None
    counts = TokenCounts(tokens.prompt if repetition else ())
    for token in tokens.generated:
        counts.add(token)
    return counts
