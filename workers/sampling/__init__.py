"""The next token of every sequence of a step from its logits, and what there is to say of it.

Invariant: a token depends on its row of logits, its sequence's parameters and tokens, and its index
alone, never on the rest of the batch or on earlier draws, so that any instance can go on with a
sequence. Knows neither models nor when a sequence ends.

    logits [n, vocab_size] ─► rules.py       bias, penalties, masks, where a row has any
                           ─► argmax, or draw.py with its number from random_number.py
                           ─► logprobs.py    of the model's own logits, where they are asked for
    state.py     what a sequence carries from token to token
"""

from workers.grammar.compiler import GrammarCompiler
from workers.sampling.choice import Sampled, sample
from workers.sampling.logprobs import prompt_logprobs
from workers.sampling.sequence_sampler import SequenceSampler, invalid_params
from workers.sampling.tokens import Tokens

__all__ = [
    "GrammarCompiler",
    "Sampled",
    "SequenceSampler",
    "Tokens",
    "invalid_params",
    "prompt_logprobs",
    "sample",
]
