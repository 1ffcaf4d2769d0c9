"""What responses look like, as OpenAI's API defines them. Extensions are named as in vLLM."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, SerializerFunctionWrapHandler
from pydantic import model_serializer as serializer

from server.api.openai.logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprobs

Finish = Literal["stop", "length"]


class Reply(BaseModel):
    """Base of responses. Fields named in `_optional` are left out when they are null."""

    _optional: ClassVar[frozenset[str]] = frozenset()

    @property
    def left_out(self) -> frozenset[str]:
        """Fields that are left out when they are null."""
        return self._optional

    @serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {k: v for k, v in fields.items() if v is not None or k not in self._optional}


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, num_prompt: int, num_completion: int, num_cached: int) -> "Usage":
        return cls(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )


class CompletionChoice(Reply):
    _optional = frozenset({"token_ids", "prompt_token_ids", "prompt_logprobs"})

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Reply):
    """A whole response, and a chunk of a streamed one."""

    _optional = frozenset({"usage"})

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    _optional = frozenset({"token_ids"})

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    _optional = frozenset({"prompt_token_ids", "prompt_logprobs"})

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChatDelta(Reply):
    _optional = frozenset({"role", "content"})

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    _optional = frozenset({"token_ids"})

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    token_ids: list[int] | None = None


class ChatChunk(Reply):
    _optional = frozenset({"usage", "prompt_token_ids"})

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "onecopy"
    max_model_len: int | None = None
    task: Literal["generate", "embed"] | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody
