"""What requests and responses look like, as OpenAI's API defines them.

Owns the bodies' types and bounds. Invariant: a value that passes is of the exact type (no "1" for
1, no NaN), and a parameter that would change the answer but isn't supported is refused by name,
never ignored. Extensions are named as in vLLM. Knows nothing of models and tokenizers.
"""

import logging
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler
from pydantic import model_serializer as serializer

from server.errors import InvalidRequest

_log = logging.getLogger(__name__)

MAX_STOPS: Final = 16
MAX_PROMPTS: Final = 128
MAX_MESSAGES: Final = 4096

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]

_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    # parameter: the values that ask for nothing (besides null)
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both endpoints take. Fields may be null, as if they weren't there."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    user: str | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    return_token_ids: bool | None = None

    def check_supported(self) -> None:
        """Raises `InvalidRequest` for a parameter that would have to be ignored."""
        for name, value in (self.model_extra or {}).items():
            if name not in _UNSUPPORTED:
                _log.debug("ignored unknown parameter %r", name[:100])
                continue
            neutral = _UNSUPPORTED[name]
            if value is None or any(type(value) is type(v) and value == v for v in neutral):
                continue
            allowed = f" (other than {neutral[0]!r})" if neutral else ""
            raise InvalidRequest(f"{name!r}{allowed} isn't supported here. Omit it.", param=name)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
            )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Prompt = (
    str
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(GenerationRequest):
    prompt: Prompt


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    name: str | None = None

    def check_supported(self, index: int) -> None:
        """Raises `InvalidRequest` for tool calls and the like."""
        for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
            if (self.model_extra or {}).get(name):
                raise InvalidRequest(
                    f"{name!r} isn't supported here. Omit it.", param=f"messages[{index}].{name}"
                )

    @property
    def text(self) -> str:
        """The content as one string; parts are parted by line breaks."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


# --- responses

Finish = Literal["stop", "length"]


class Reply(BaseModel):
    """Base of responses. Fields named in `_optional` are left out when they are null."""

    _optional: ClassVar[frozenset[str]] = frozenset()

    @serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {k: v for k, v in fields.items() if v is not None or k not in self._optional}


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, num_prompt: int, num_completion: int) -> "Usage":
        return cls(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
        )


class CompletionChoice(Reply):
    _optional = frozenset({"token_ids", "prompt_token_ids"})

    index: int
    text: str
    logprobs: None = None
    finish_reason: Finish | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


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
    logprobs: None = None
    finish_reason: Finish
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    _optional = frozenset({"prompt_token_ids"})

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatDelta(Reply):
    _optional = frozenset({"role", "content"})

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    _optional = frozenset({"token_ids"})

    index: int
    delta: ChatDelta
    logprobs: None = None
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
