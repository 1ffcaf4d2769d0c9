"""What a request for embeddings looks like, as OpenAI's API defines it, and its answer.

Owns the bodies' types and bounds. Invariants as in `schemas`: exact types, and no parameter that
would change the answer is ignored. Extensions are named as in vLLM. Knows nothing of models.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.openai.schemas import TokenIds, refuse_unsupported

MAX_INPUTS: Final = 2048

_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    # parameter: the values that ask for nothing (besides null)
    "add_special_tokens": (True,),
    "chat_template": (),
    "messages": (),
    "mm_processor_kwargs": (),
    "normalize": (),
    "pooling": (),
    "truncation_side": ("right",),
}

Inputs = (
    str
    | Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS, fail_fast=True)]
)


class EmbeddingRequest(BaseModel):
    """Fields may be null, as if they weren't there."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Keep so many tokens of a text that has more, the special ones included; -1: what fits."""
    user: str | None = None

    def check_supported(self) -> None:
        """Raises `InvalidRequest` for a parameter that would have to be ignored."""
        refuse_unsupported(self.model_extra or {}, _UNSUPPORTED)


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
