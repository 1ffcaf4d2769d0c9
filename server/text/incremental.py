"""Text as it is generated: pieces of it from ids, and its end at a stop string.

Owns the little that has to be kept between the tokens of one sequence. Invariants: nothing that was
given out is taken back; half a character is never given out; the pieces that a detokenizer gives,
joined, are what decoding all the ids at once gives. Knows no tokenizer, only its decoding function.
"""

from collections.abc import Callable, Sequence
from typing import Final

REPLACEMENT: Final = "\ufffd"


class Detokenizer:
    """Ids of one sequence to pieces of text, as they come.

    Decodes a small window of ids again and again: those not yet shown, behind those shown last,
    since a decoder may treat the first token of a text in its own way (drop its blank). A text that
    ends in U+FFFD may be a character whose last bytes are still to come; it is held back.

    `tokenizers.decoders.DecodeStream` works alike, but keeps what is unfinished at the end, holds
    back without limit, and raises in the middle of a text when a byte turns out not to belong to a
    character.
    """

    _MAX_HELD: Final = 16
    """More ids than any character needs: then only its last three characters can still change (a
    character has four bytes at most, and a decoder may show one U+FFFD for each)."""
    _UNSURE_CHARS: Final = 3

    def __init__(
        self, decode: Callable[[Sequence[int]], str], special_ids: frozenset[int] = frozenset()
    ):
        self._decode = decode
        self._special_ids = special_ids
        self._window: list[int] = []
        self._num_shown = 0  # ids of the window whose text is out
        self._num_chars = 0  # characters of the window's text that are out

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these ids finish, perhaps none."""
        return "".join(self._step(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """What was held back, with U+FFFD for what never became a character."""
        text = self._decode(self._window)[self._num_chars :]
        self._window, self._num_shown, self._num_chars = [], 0, 0
        return text

    def _step(self, token_id: int) -> str:
        if token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            piece = text[self._num_chars :]
            if piece:
                self._window = self._window[self._num_shown :]
                self._num_shown = len(self._window)
                self._num_chars = len(self._decode(self._window))
            return piece
        if len(self._window) - self._num_shown <= self._MAX_HELD:
            return ""
        sure = max(len(text) - self._UNSURE_CHARS, self._num_chars)
        piece, self._num_chars = text[self._num_chars : sure], sure
        if len(self._window) > 4 * self._MAX_HELD:
            self._forget(text)
        return piece

    def _forget(self, text: str) -> None:
        """Drops ids whose text is out from a window that would grow with the sequence."""
        last = len(self._window) - self._MAX_HELD
        for cut in range(last, last - self._MAX_HELD, -1):
            head = self._decode(self._window[:cut])
            if len(head) <= self._num_chars and head + self._decode(self._window[cut:]) == text:
                self._window = self._window[cut:]
                self._num_shown = 0
                self._num_chars -= len(head)
                return


class StopStrings:
    """Ends a text where one of some strings would begin.

    The string that is complete first decides, at equal ends the longest, so that the result doesn't
    depend on how the text is cut into pieces. Only what may become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]):
        """`stops`: none is empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """What may be shown now. Once `matched` is set, the text has ended."""
        if not self._stops or self.matched is not None:
            return piece if self.matched is None else ""
        text = self._held + piece
        found = [
            (begin + len(stop), begin, stop)
            for stop in self._stops
            if (begin := text.find(stop)) >= 0
        ]
        if found:
            _, begin, self.matched = min(found)
            self._held = ""
            return text[:begin]
        shown = min(self._possible_begin(text, stop) for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _possible_begin(text: str, stop: str) -> int:
        """Where the longest end of `text` begins that begins `stop`; the text's end if none."""
        begin = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while begin >= 0:
            if stop.startswith(text[begin:]):
                return begin
            begin = text.find(stop[0], begin + 1)
        return len(text)
