"""What single tokens show, as log probabilities name them.

Invariant: what a token shows does not depend on its neighbours, so the texts of several tokens,
joined, need not be what they are decoded to together: a token may be a part of a character.
"""

from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from workers import UnknownVocabulary, read_vocabulary


class TokenTexts:
    """The tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, file: Path | None) -> None:
        """`file`: its tokenizer.json, read when the first token is asked for."""
        self._tokenizer = tokenizer
        self._file = file

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        """What a token shows, a special one by its name, and the bytes that it stands for. Bytes
        that are no whole character show as U+FFFD."""
        raw = self._bytes[token_id] if token_id < len(self._bytes) else b""
        if raw:
            return raw.decode(errors="replace"), raw
        shown = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return shown, shown.encode()

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Of all tokens; of none, where the tokenizer is of a kind that does not say."""
        if self._file is None:
            return []
        try:
            return read_vocabulary(self._file, self._tokenizer.get_vocab_size())
        except UnknownVocabulary:
            return []
