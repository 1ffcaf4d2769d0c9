"""Text as it is generated: pieces of it from ids, and its end at a stop string.

Owns the little that has to be kept between the tokens of one sequence. Invariants: nothing that was
given out is taken back; half a character is never given out; the pieces that a detokenizer gives,
joined, are what decoding all the ids at once gives, behind those that it was told come before.
Knows no tokenizer, only its decoding function.
"""

from collections.abc import Callable, Container, Sequence
from typing import Final

REPLACEMENT: Final = "\ufffd"
_UNSURE_CHARS: Final = 3
"""Of a text whose last character is not whole: it has four bytes at most, and a decoder may show
one U+FFFD for each."""


def num_unfinished(text: str) -> int:
    """How many characters at its end may still become another one."""
    return len(text[-_UNSURE_CHARS:]) - len(text[-_UNSURE_CHARS:].rstrip(REPLACEMENT))


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
    """More ids than any character needs: then only the last `_UNSURE_CHARS` can still change."""
    _MAX_CONTEXT: Final = 64
    """Ids of what comes before, special ones among them, that are looked at."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        special_ids: Container[int] = frozenset(),
        *,
        before: Sequence[int] = (),
        is_whole: bool = True,
    ):
        """`before`: ids whose text is out already, which the text goes on from. `is_whole`: that
        text ends with a whole character, whatever it looks like; else what `num_unfinished` says of
        it is not out."""
        self._decode = decode
        self._special_ids = special_ids
        self._window = self._context(before)
        self._num_shown = len(self._window)  # ids of the window whose text is out
        text = decode(self._window) if self._window else ""
        # Characters of the window's text that are out.
        self._num_chars = len(text) - (0 if is_whole else num_unfinished(text))

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these ids finish, perhaps none."""
        return "".join(self._step(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """What was held back, with U+FFFD for what never became a character."""
        text = self._decode(self._window)[self._num_chars :]
        self._window, self._num_shown, self._num_chars = [], 0, 0
        return text

    def _context(self, before: Sequence[int]) -> list[int]:
        """The last ids of them, as few as show what they show among the others: those that begin
        within a character do not."""
        ids = [one for one in before[-self._MAX_CONTEXT :] if one not in self._special_ids]
        for count in range(min(self._MAX_HELD, len(ids)), len(ids)):
            text = self._decode(ids[-count:])
            if text and not text.startswith(REPLACEMENT):
                return ids[-count:]
        return ids

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
            elif len(self._window) - self._num_shown > 4 * self._MAX_HELD:
                self._forget_silent(text)
            return piece
        if len(self._window) - self._num_shown <= self._MAX_HELD:
            return ""
        sure = max(len(text) - _UNSURE_CHARS, self._num_chars)
        piece, self._num_chars = text[self._num_chars : sure], sure
        if len(self._window) > 4 * self._MAX_HELD:
            self._forget(text)
        return piece

    def _forget_silent(self, text: str) -> None:
        """Drops ids that show nothing from a window that would grow with them: those between the
        first that is not shown, which may be the blank that a decoder drops at a text's begin, and
        the last."""
        shorter = [*self._window[: self._num_shown + 1], *self._window[-self._MAX_HELD :]]
        if self._decode(shorter) == text:
            self._window = shorter

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

    A special token is no part of the text, but may be one of a stop string: its name is fed as
    hidden, and takes part in the search alone.
    """

    def __init__(self, stops: Sequence[str]):
        """`stops`: none is empty."""
        self._stops = tuple(stops)
        self._held = ""
        self._hidden: list[tuple[int, int]] = []
        """Of what is held, what is never shown: half-open intervals, in order."""
        self.matched: str | None = None

    def feed(self, piece: str, *, hidden: bool = False) -> str:
        """What may be shown now. Once `matched` is set, the text has ended."""
        if not self._stops or self.matched is not None:
            return piece if self.matched is None and not hidden else ""
        if hidden:
            self._hidden.append((len(self._held), len(self._held) + len(piece)))
        text = self._held + piece
        found = [
            (begin + len(stop), begin, stop)
            for stop in self._stops
            if (begin := text.find(stop)) >= 0
        ]
        if found:
            _, begin, self.matched = min(found)
            shown, self._held, self._hidden = self._shown(text[:begin]), "", []
            return shown
        kept = min(self._possible_begin(text, stop) for stop in self._stops)
        shown, self._held = self._shown(text[:kept]), text[kept:]
        self._hidden = [(max(a - kept, 0), b - kept) for a, b in self._hidden if b > kept]
        return shown

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        shown, self._held, self._hidden = self._shown(self._held), "", []
        return shown

    def _shown(self, text: str) -> str:
        """Of the first of what is held."""
        for begin, end in reversed(self._hidden):
            text = text[:begin] + text[end:]
        return text

    @staticmethod
    def _possible_begin(text: str, stop: str) -> int:
        """Where the longest end of `text` begins that begins `stop`; the text's end if none."""
        begin = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while begin >= 0:
            if stop.startswith(text[begin:]):
                return begin
            begin = text.find(stop[0], begin + 1)
        return len(text)
