"""What a person says of a model's text in place of what its files say.

Owns these words. Invariant: a name that nobody knows is refused at once, whatever model it is for.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.text.gguf.splits import SPLITS, UnknownSplit


@dataclass(frozen=True)
class GivenText:
    """None: what the model's files say."""

    chat_template: Path | None = None
    """A file with the template to use."""
    pre_tokenizer: str | None = None
    """How a GGUF file's text is cut into words, by a name of `SPLITS`."""

    def check(self) -> None:
        """Raises UnknownSplit."""
        name = self.pre_tokenizer
        if name is None or name in SPLITS:
            return
        near = difflib.get_close_matches(name, SPLITS, 3, 0.5)
        did = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UnknownSplit(
            f"--pre-tokenizer is {name[:80]!r}, which is not known here.{did} docs/models.md tells "
            "where the names are listed."
        )


NOTHING_GIVEN: Final = GivenText()
