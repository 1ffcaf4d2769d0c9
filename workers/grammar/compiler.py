"""Grammars: which tokens may come next, so that the text matches what was asked for.

Owns the cells of one model's grammars. Invariant: nothing is started, and no tokenizer read, before
the first grammar comes.
"""

from collections.abc import Collection
from pathlib import Path

from workers.errors import GrammarFailed
from workers.grammar.cells import GrammarCells
from workers.grammar.grammar import Grammar
from workers.messages import SamplingParams


class GrammarCompiler:
    """Makes grammars for one model."""

    def __init__(self, tokenizer: Path | None, vocab_size: int, eos_token_ids: Collection[int]):
        """`tokenizer`: the model's tokenizer.json, read when the first grammar comes."""
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._cells = (
            None if tokenizer is None else GrammarCells(tokenizer, vocab_size, eos_token_ids)
        )

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """The one that these ask for, if any; to be begun. Raises `GrammarFailed`."""
        if params.grammar is None:
            return None
        if not self._eos_token_ids and not params.stop_token_ids:
            raise GrammarFailed("the model has no end token; give one in stop_token_ids")
        if self._cells is None:
            raise GrammarFailed("this instance was given no tokenizer, which a grammar needs")
        return Grammar(params.grammar, self._cells, self._vocab_size)

    def receive(self, timeout_s: float, *, late_too: bool = False) -> None:
        """As `GrammarCells.receive`."""
        if self._cells is not None:
            self._cells.receive(timeout_s, late_too=late_too)

    def close(self) -> None:
        """End the processes."""
        if self._cells is not None:
            self._cells.close()
