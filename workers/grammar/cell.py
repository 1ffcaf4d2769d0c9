"""One cell of a grammar, as the instance sees it: who uses it, and what has been said.

Owns the link. Invariants: nothing here waits, whether or not the cell reads; what it has yet to be
told is kept with its sequences, and nowhere else.
"""

import socket
import time

import msgspec

from workers.grammar.follower import (
    MAX_FOLLOWED,
    MAX_FRAME_BYTES,
    Failed,
    Follow,
    FromCell,
    Leave,
    Position,
    ToCell,
    decode_from_cell,
)
from workers.grammar.grammar import Grammar
from workers.messages import GrammarSpec


class Cell:
    """The one that follows `spec` for its users."""

    def __init__(self, number: int, spec: GrammarSpec, link: socket.socket, mask_bytes: int):
        """`link` does not block. A mask has `mask_bytes` at least."""
        self.number = number
        self.spec = spec
        self.link = link
        self.users: dict[int, Grammar] = {}
        self.has_answered = False
        self.was_used = self.was_shared = False
        self.waiting: set[int] = set()
        """Sequences that it owes an answer."""
        self.asked_at = 0.0
        """When it was last asked while it owed nobody, or last answered."""
        self.is_late = False
        """Somebody has waited in vain for what it owes now."""
        self.killed_at: float | None = None
        self._mask_bytes = mask_bytes
        self._told: dict[int, int] = {}
        """Of how many tokens of a sequence, of those that it has heard of."""
        self._untold: dict[int, None] = {}
        """Sequences that it is to be told more of, or that they have left, in turn."""

    @property
    def has_untold(self) -> bool:
        """Whether `tell` has something to say."""
        return bool(self._untold)

    def join(self, grammar: Grammar) -> None:
        """Somebody uses it. To be asked."""
        self.users[grammar.number] = grammar
        self.was_shared |= self.was_used
        self.was_used = True

    def ask(self, number: int) -> None:
        """Where is this sequence, with all its tokens? To be told."""
        if not self.waiting:
            self.asked_at = time.monotonic()
            self.is_late = False
        self.waiting.add(number)
        self._untold[number] = None

    def leave(self, number: int) -> None:
        """A sequence uses it no longer. To be told."""
        if number not in self._told:
            self.drop(number)
            return
        self.users.pop(number, None)
        self.waiting.discard(number)
        self._untold[number] = None

    def drop(self, number: int) -> None:
        """As `leave`, but it knows already."""
        self.users.pop(number, None)
        self.waiting.discard(number)
        self._told.pop(number, None)
        self._untold.pop(number, None)

    def tell(self) -> None:
        """All that it has not been told, as far as it takes that now: a part of each sequence in
        turn, so that short ones are not held up by what long ones have to be told anew. Raises
        OSError where it has ended."""
        while self._untold:
            number = next(iter(self._untold))
            message = self._next_part(number)
            try:
                self.link.send(msgspec.msgpack.encode(message))
            except BlockingIOError:
                return  # it has not read yet, or not begun
            del self._untold[number]
            if isinstance(message, Leave):
                self.drop(number)
                continue
            self._told[number] = message.start + len(message.tokens)
            if self._told[number] < len(self.users[number].tokens):
                self._untold[number] = None

    def answer(self) -> FromCell | None:
        """What it has said; None where that is nothing yet. Raises OSError where it has ended, and
        `msgspec.DecodeError` for what makes no sense."""
        try:
            frame = self.link.recv(MAX_FRAME_BYTES)
        except BlockingIOError:
            return None
        if not frame:
            raise ConnectionResetError("the cell ended")
        answer = decode_from_cell(frame)
        if isinstance(answer, Failed) and answer.sequence is None:
            return answer
        if isinstance(answer, Position):
            self._check_mask(answer)
            is_last = self._told.get(answer.sequence) == answer.num_tokens
            if is_last and answer.sequence not in self._untold:
                self.waiting.discard(answer.sequence)
        self.has_answered = True
        self.asked_at = time.monotonic()
        return answer

    def _next_part(self, number: int) -> ToCell:
        grammar = self.users.get(number)
        if grammar is None:
            return Leave(number)
        start = self._told.get(number, 0)
        part = slice(start, start + MAX_FOLLOWED)
        return Follow(number, start, grammar.tokens[part], grammar.ends[part])

    def _check_mask(self, position: Position) -> None:
        num_bytes = len(position.mask)
        if num_bytes < self._mask_bytes and not position.ended:
            text = f"a mask of {num_bytes} bytes, where {self._mask_bytes} are needed"
            raise msgspec.DecodeError(text)
