"""Grammars: which tokens may come next, so that the text matches what was asked for.

Owns what the library llguidance keeps: the tokens' bytes as a tree, made when the first grammar
comes, and each sequence's parser. Invariants: an end token is allowed exactly where the text may
end; what a grammar takes is bounded (`workers.grammar_source`). Does not know requests or logits.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workers.errors import GrammarFailed, UnknownVocabulary
from workers.grammar_source import shortened, started, tokens_of
from workers.messages import SamplingParams
from workers.sampling.bitmask import clear_bits, set_bits
from workers.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Grammar:
    """One sequence's way through a grammar. What goes wrong on it shows at the next mask."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._beyond = np.arange(vocab_size, -(-vocab_size // 8) * 8)
        """Bits of a mask that stand for no token of the model."""
        self._ended = False

    def accept(self, token: int, *, ends: bool) -> None:
        """Take the next token. `ends`: it is one that ends a text where that is complete."""
        if self._ended:
            return
        if ends and self._matcher.is_accepting():
            self._ended = True
        else:
            self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether the end of the text was accepted."""
        return self._ended

    def fill_mask(self, bits: NDArray[np.uint8], end_ids: NDArray[np.int64]) -> None:
        """Make `bits` the tokens that may come next, of which `end_ids` end the text. Raises
        `GrammarFailed`."""
        if self._ended:
            bits[:] = 0
        else:
            mask = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                raise GrammarFailed(
                    f"the grammar can't go on: {shortened(self._matcher.get_error())}"
                )
            bits[:] = np.frombuffer(mask, dtype=np.uint8)[: len(bits)]
            clear_bits(bits, self._beyond)
            clear_bits(bits, end_ids)  # one that is text elsewhere would end it half-way
        if self._ended or self._matcher.is_accepting():
            set_bits(bits, end_ids)


class GrammarCompiler:
    """Makes grammars for one model."""

    def __init__(self, tokenizer: Path | None, vocab_size: int, eos_token_ids: Collection[int]):
        """`tokenizer`: the model's tokenizer.json, read when the first grammar comes."""
        self._file = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokens: LLTokenizer | None = None

    def compile(self, params: SamplingParams) -> Grammar | None:
        """The grammar that these ask for, if any; it has taken no token yet. Raises
        `GrammarFailed`."""
        if params.grammar is None:
            return None
        if not self._eos_token_ids and not params.stop_token_ids:
            raise GrammarFailed("the model has no end token; give one in stop_token_ids")
        if self._tokens is None:
            self._tokens = self._load()
        return Grammar(started(params.grammar, self._tokens), self._vocab_size)

    def _load(self) -> "LLTokenizer":
        if self._file is None:
            raise GrammarFailed("this instance was given no tokenizer, which a grammar needs")
        try:
            texts = read_vocabulary(self._file, self._vocab_size, self._eos_token_ids)
        except UnknownVocabulary as error:
            raise GrammarFailed(str(error)) from error
        return tokens_of(texts)
