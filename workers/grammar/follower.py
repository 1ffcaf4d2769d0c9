"""The cell of one grammar: compiles it, and follows it for each sequence that an instance names.

Owns both sides' wire types, and the parsers. Invariants: each `Follow` is answered by one
`Position` or `Failed`, in their order, and a position says after how many tokens it is; a
sequence's parser is its own, but for what the library shares between copies. Knows neither logits
nor where tokens come from. Runs in a process of its own (`workers.process.warden`), since the
library compiles by recursion, takes what memory it likes, and holds the interpreter's lock for as
long as it accepts a token.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from workers.errors import GrammarFailed, UnknownVocabulary
from workers.grammar.translation import shortened, started, tokens_of
from workers.grammar.vocabulary import read_vocabulary
from workers.messages import GrammarKind, GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_FRAME_BYTES: Final = 1 << 18
"""A mask takes a bit for each token of the vocabulary."""
MAX_FOLLOWED: Final = 1024
"""Tokens of one `Follow`: far less than a socket holds, which is a few hundred kilobytes."""
STEP_S: Final = 1.0
REPLAYED_TOKEN_S: Final = 0.02
"""What a `Follow` may compute, and for each of its tokens, before the kernel ends the cell."""
_MUCH_S: Final = 0.1
_MUCH_PER_ANSWER_S: Final = 0.005
_NICE: Final = 15
"""A cell that has computed for so long, and for so long on average, lets all others go first."""


class Compile(msgspec.Struct, tag="compile", frozen=True):
    """What comes first. Answered by `Failed` alone."""

    kind: GrammarKind
    source: str


class Follow(msgspec.Struct, tag="follow", frozen=True):
    """The sequence's next tokens, `MAX_FOLLOWED` at most. `start`: how many it has before these; at
    0 it begins anew. `ends`: which of them end a text, if it is complete."""

    sequence: int
    start: int
    tokens: list[int]
    ends: list[bool]


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """Forget a sequence. Not answered."""

    sequence: int


class Position(msgspec.Struct, tag="position", frozen=True):
    """Where a sequence is after so many tokens. `mask`: a bit for each token that may come next,
    none where nothing may; `accepting`: whether the text may end here; `ended`: it has."""

    sequence: int
    num_tokens: int
    mask: bytes
    accepting: bool
    ended: bool
    cpu_s: float
    """What finding this out took."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The sequence can't go on; all can't, where None is named."""

    sequence: int | None
    message: str


ToCell = Follow | Leave
FromCell = Position | Failed
_to_cell: "msgspec.msgpack.Decoder[ToCell]" = msgspec.msgpack.Decoder(ToCell)
_from_cell: "msgspec.msgpack.Decoder[FromCell]" = msgspec.msgpack.Decoder(FromCell)
_compile: msgspec.msgpack.Decoder[Compile] = msgspec.msgpack.Decoder(Compile)


def decode_from_cell(frame: bytes) -> FromCell:
    """Raises `msgspec.DecodeError` on anything but a valid message."""
    try:
        return _from_cell.decode(frame)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


class _Vocabulary:
    """The model's, read once for all cells; or why it could not be."""

    tokens: "LLTokenizer | None" = None
    problem: str = ""


def prepare(setup: Mapping[str, Any]) -> None:
    """Read the vocabulary: `tokenizer` is the path of a tokenizer.json, `vocab_size` the model's,
    `eos_token_ids` those that are no text."""
    try:
        texts = read_vocabulary(
            Path(setup["tokenizer"]), setup["vocab_size"], setup["eos_token_ids"]
        )
    except UnknownVocabulary as error:
        _Vocabulary.problem = str(error)
        return
    _Vocabulary.tokens = tokens_of(texts)
    # What the first grammar makes the library set up is there for all cells then.
    started(GrammarSpec(kind="json_object"), _Vocabulary.tokens)


def run(_kind: str, _options: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Follow the grammar that comes first over the socket, until that is closed."""
    with socket.socket(fileno=fds[0]) as link, contextlib.suppress(ConnectionError):
        asked = _compile.decode(link.recv(MAX_FRAME_BYTES))
        try:
            follower = _Follower(_template(GrammarSpec(kind=asked.kind, source=asked.source)))
        except GrammarFailed as error:
            link.send(msgspec.msgpack.encode(Failed(None, str(error))))
            return
        while frame := link.recv(MAX_FRAME_BYTES):
            answer = follower.answer(_to_cell.decode(frame))
            if answer is not None:
                link.send(msgspec.msgpack.encode(answer))


def _template(spec: GrammarSpec) -> "LLMatcher":
    if _Vocabulary.tokens is None:
        raise GrammarFailed(_Vocabulary.problem)
    return started(spec, _Vocabulary.tokens)


class _Followed:
    """One sequence's way through the grammar."""

    def __init__(self, matcher: "LLMatcher"):
        self._matcher = matcher
        self.num_tokens = 0
        self._has_ended = False

    def take(self, tokens: Sequence[int], ends: Sequence[bool]) -> None:
        """Go on by these; nothing follows where the text has ended."""
        self.num_tokens += len(tokens)
        for token, may_end in zip(tokens, ends, strict=True):
            self._has_ended = self._has_ended or (may_end and self._matcher.is_accepting())
            if self._has_ended:
                return
            self._matcher.consume_token(token)

    def position(self, sequence: int, begun_at: float) -> Position:
        """Where it is now. Raises `GrammarFailed`."""
        matcher, ended = self._matcher, self._has_ended
        mask = b"" if ended else bytes(matcher.compute_bitmask())
        if matcher.is_error():
            raise GrammarFailed(f"the grammar can't go on: {shortened(matcher.get_error())}")
        accepting = ended or matcher.is_accepting()
        cpu_s = time.process_time() - begun_at
        return Position(sequence, self.num_tokens, mask, accepting, ended, cpu_s)


class _Follower:
    def __init__(self, template: "LLMatcher"):
        self._template = template  # before the first token
        self._sequences: dict[int, _Followed] = {}
        self._is_polite = False
        self._num_answers = 0
        self._cpu_s = 0.0

    def answer(self, message: ToCell) -> FromCell | None:
        if isinstance(message, Leave):
            self._sequences.pop(message.sequence, None)
            return None
        signal.setitimer(signal.ITIMER_PROF, STEP_S + len(message.tokens) * REPLAYED_TOKEN_S)
        begun_at = time.process_time()
        try:
            followed = self._followed(message)
            followed.take(message.tokens, message.ends)
            return followed.position(message.sequence, begun_at)
        except GrammarFailed as error:
            self._sequences.pop(message.sequence, None)
            return Failed(message.sequence, str(error))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._be_polite(time.process_time() - begun_at)

    def _followed(self, message: Follow) -> _Followed:
        """Raises `GrammarFailed` for what goes on from where the sequence is not: it has failed
        while more of it was on its way."""
        if message.start == 0:
            self._sequences[message.sequence] = _Followed(self._template.deep_copy())
        followed = self._sequences.get(message.sequence)
        if followed is None or followed.num_tokens != message.start:
            raise GrammarFailed("its grammar was not followed so far")
        return followed

    def _be_polite(self, took_s: float) -> None:
        self._num_answers += 1
        self._cpu_s += took_s
        much_s = max(_MUCH_S, _MUCH_PER_ANSWER_S * self._num_answers)
        if not self._is_polite and self._cpu_s > much_s:
            self._is_polite = True
            os.nice(_NICE)
