"""All tokens of a sequence, and which of them were generated."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Tokens:
    """ids  |    prompt    | generated earlier | generated here |
    0              ^ num_prompt                         ^ len(ids)
    """

    ids: list[int]
    num_prompt: int
    """Tokens that it came with, but for those generated before."""

    @property
    def num_generated(self) -> int:
        """Tokens at the end that were generated, here or by an earlier instance."""
        return len(self.ids) - self.num_prompt

    @property
    def prompt(self) -> Sequence[int]:
        """A copy of the first."""
        return self.ids[: self.num_prompt]

    @property
    def generated(self) -> Sequence[int]:
        """A copy of the others."""
        return self.ids[self.num_prompt :]
