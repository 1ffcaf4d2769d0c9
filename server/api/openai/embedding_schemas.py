"""What a request for embeddings looks like, as OpenAI's API defines it, and its answer.

Owns the bodies' types and bounds. Invariants as in `schemas`: exact types, and no parameter that
would change the answer is ignored. Extensions are named as in vLLM. Knows nothing of models.
"""

from typing import Annotated, ClassVar, Final, Literal, cast

from pydantic import BaseModel, Field

from server.api.openai.fields import Place, check_unused
from server.api.openai.schemas import Body, TokenIds, check_length, texts_or_ids

MAX_INPUTS: Final = 2048

Inputs = (
    str
    | Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS, fail_fast=True)]
)


class EmbeddingRequest(Body):
    LONG: ClassVar[str] = "input"
    PLACE: ClassVar[Place] = "embeddings"

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Keep so many tokens of a text that has more, the special ones included; -1: what fits."""

    @classmethod
    def most_values(cls, max_tokens: int) -> int:
        """As in the base; where all are to be cut, it may be twice as much."""
        return 2 * MAX_INPUTS * (max_tokens + 1)

    def check_supported(self) -> None:
        """As in the base."""
        check_unused(self.model_extra or {}, self.PLACE)

    def check_lengths(self, max_tokens: int, max_chars: int) -> None:
        """As in the base. Where all are to be cut, none is too long; what goes in any case, goes
        here."""
        given = texts_or_ids(self.input)
        if self.truncate_prompt_tokens is None:
            for one in given:
                check_length(one, max_tokens, max_chars, "input")
            return
        cut = [one[: max_chars if isinstance(one, str) else max_tokens] for one in given]
        self.input = cast("Inputs", cut if given is self.input else cut[0])


class EmbeddingItem(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers; or their bytes as float32, little-endian, in base64."""


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
