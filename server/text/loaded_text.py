"""A model's text side as it was at one moment: tokenizer, template, and the file of its tokens that
instances read.

Owns what is loaded. Invariant: whatever becomes of the model's files, who was given this goes on
with what they held. Does not know who is served by it.
"""

import os
from pathlib import Path
from typing import Self

from server.text.folder_tokens import completed
from server.text.given import NOTHING_GIVEN, GivenText
from server.text.kept_file import KeptFile
from server.text.template_files import read_template
from server.text.text import BadChatTemplate, Text
from server.text.tokenizer_check import try_tokenizer
from server.text.tokenizer_files import TokenizerFilesError, tokenizer_file, tokenizer_folder
from workers import MAX_TOKENIZER_BYTES, read_file


class UnusedPreTokenizer(TokenizerFilesError):
    """A way to cut text was named for a model that is told by other files how."""


class KeptTokenizer:
    """A model's tokenizer.json. That of a folder is kept as it is now, with the tokens that other
    files add; one that is built from a GGUF file lies in the cache, under a name that stands for
    what it was built from."""

    def __init__(
        self,
        model: Path,
        kept: KeptFile | None,
        chat_template: str | None = None,
        pre_tokenizer: str | None = None,
    ):
        self.model = model
        self.chat_template = chat_template
        """What is used in place of the model's own, if something is."""
        self.path = kept.path if kept is not None else tokenizer_file(model, None, pre_tokenizer)
        """Where it is, or will be."""
        self._kept = kept
        self._pre_tokenizer = pre_tokenizer

    @classmethod
    def of(cls, model: Path, given: GivenText = NOTHING_GIVEN) -> Self:
        """`given` goes before what the model's files say. Raises ServerError, CheckpointError."""
        given.check()
        chat_template = given.chat_template
        if chat_template is not None and not os.path.isfile(chat_template):  # noqa: PTH113 - never raises
            raise BadChatTemplate(f"There is no file {chat_template} to take a chat template from.")
        template = None if chat_template is None else read_template(chat_template)
        if not model.is_dir():
            return cls(model, None, template, given.pre_tokenizer)
        if given.pre_tokenizer is not None:
            raise UnusedPreTokenizer(
                f"--pre-tokenizer is for GGUF files; {model} has a tokenizer.json, which says how "
                "text is cut into words. Omit the option."
            )
        file = tokenizer_folder(model) / "tokenizer.json"
        content = completed(model, read_file(file, MAX_TOKENIZER_BYTES))
        return cls(model, KeptFile.holding(content, file.name), template)

    def folder(self) -> Path:
        """With all of its files; the first call for a GGUF file builds it. Raises
        TokenizerFilesError."""
        return tokenizer_folder(self.model, None, self._pre_tokenizer)

    def close(self) -> None:
        """Idempotent."""
        if self._kept is not None:
            self._kept.close()


class LoadedText:
    """Text that can be used, and the tokenizer.json that it was loaded from."""

    def __init__(self, text: Text, tokenizer: KeptTokenizer):
        self.text = text
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer: KeptTokenizer) -> Self:
        """Tried out first; blocks. Raises ServerError."""
        folder = tokenizer.folder()
        try_tokenizer(tokenizer.path, folder / "tokenizer.json")
        given = tokenizer.chat_template
        text = Text.load(folder, chat_template=given, tokenizer_file=tokenizer.path)
        try:
            if given is not None:
                text.check_chat_template()
        except BaseException:
            text.close()
            raise
        return cls(text, tokenizer)

    def close(self) -> None:
        """Once no request and no instance needs it."""
        self.text.close()
        self.tokenizer.close()
