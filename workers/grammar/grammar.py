"""One sequence's way through its grammar, as far as the engine sees it.

What may come next is found out elsewhere (`workers.grammar.cells`) and has to be waited for.
Invariants: an end token is allowed exactly where the text may end; tokens and position are enough
to begin anew in any process. Does not know requests or logits.
"""

import itertools
from collections.abc import Collection, Iterable
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.errors import GrammarFailed
from workers.grammar.bitmask import clear_bits, set_bits
from workers.grammar.follower import Position
from workers.messages import GrammarSpec

_ALLOWANCE_S: Final = 1.0
_ALLOWANCE_PER_TOKEN_S: Final = 0.01
"""What a sequence's grammar may compute in all. Usual ones take 0.1 ms for a token."""
_WAIT_S: Final = 1.0

_numbers = itertools.count()


class Follows(Protocol):
    """Who finds out what a grammar allows, meanwhile."""

    def begin(self, grammar: "Grammar") -> None:
        """It has its tokens, and wants to know what may come behind them."""

    def accept(self, grammar: "Grammar") -> None:
        """It has one more."""

    def leave(self, grammar: "Grammar") -> None:
        """It wants to know nothing more."""

    def receive(self, timeout_s: float, *, late_too: bool = False) -> None:
        """Wait so long for what is being found out; `late_too`: also for what others gave up
        waiting for."""


class Grammar:
    """One sequence's way through a grammar. What goes wrong on it shows in `problem`."""

    def __init__(self, spec: GrammarSpec, cells: Follows, vocab_size: int) -> None:
        self.number: Final = next(_numbers)
        self.spec = spec
        self.tokens: list[int] = []
        self.ends: list[bool] = []
        """Which of them end a text that is complete."""
        self.problem: str | None = None
        self.is_invalid = True
        """Whether the request is to blame for the problem."""
        self.cell = -1
        self.alone = False
        """Whether it shares its cell with nobody."""
        self.num_losses = 0
        self._cells = cells
        self._beyond = np.arange(vocab_size, -(-vocab_size // 8) * 8)
        """Bits of a mask that stand for no token of the model."""
        self._position: Position | None = None
        self._ended = False
        self._cpu_s = 0.0

    def begin(self, tokens: Iterable[int], ends: Collection[int]) -> None:
        """Call once. The sequence has these tokens; those of `ends` end a text that is complete."""
        self.tokens = list(tokens)
        self.ends = [token in ends for token in self.tokens]
        self._cells.begin(self)

    @property
    def arrived(self) -> bool:
        """Whether it is known what may come next, or that nothing can."""
        return self._position is not None or self.problem is not None

    def accept(self, token: int, *, ends: bool) -> None:
        """Take the next token. `ends`: it is one that ends a text where that is complete."""
        position = self._waited_for()
        if self._ended or position is None:
            return
        self.tokens.append(token)
        self.ends.append(ends)
        if ends and position.accepting:
            self._ended = True
        else:
            self._position = None
            self._cells.accept(self)

    @property
    def finished(self) -> bool:
        """Whether the end of the text was accepted."""
        return self._ended

    def fill_mask(self, bits: NDArray[np.uint8], end_ids: NDArray[np.int64]) -> None:
        """Make `bits` the tokens that may come next, of which `end_ids` end the text; waits where
        that has not arrived. Raises `GrammarFailed`."""
        position = self._waited_for()
        if position is None:
            raise GrammarFailed(self.problem or "")
        if self._ended:
            bits[:] = 0
        else:
            bits[:] = np.frombuffer(position.mask, dtype=np.uint8)[: len(bits)]
            clear_bits(bits, self._beyond)
            clear_bits(bits, end_ids)  # one that is text elsewhere would end it half-way
        if self._ended or position.accepting:
            set_bits(bits, end_ids)

    def leave(self) -> None:
        """The sequence has ended."""
        self._cells.leave(self)

    def _waited_for(self) -> Position | None:
        while not self.arrived:
            self._cells.receive(_WAIT_S, late_too=True)
        return None if self.problem is not None else self._position

    # --- told by its cell

    def came(self, position: Position) -> None:
        """Where a cell has followed it to. What is not after its last token is no news: it has been
        told of further ones, or begun anew while it went on from the position that it had."""
        self._cpu_s += position.cpu_s
        if position.num_tokens == len(self.tokens):
            self._position = position
            self._ended = position.ended
        allowed_s = _ALLOWANCE_S + _ALLOWANCE_PER_TOKEN_S * len(self.tokens)
        if self._cpu_s > allowed_s:
            self.failed(
                f"the grammar takes too long to follow: {self._cpu_s:.1f} s for "
                f"{len(self.tokens)} tokens. Make it less ambiguous"
            )
            self.leave()

    def failed(self, problem: str, *, invalid: bool = True) -> None:
        """It can't go on. `invalid`: the request is to blame."""
        self.problem, self.is_invalid = problem, invalid
