"""What requests look like, as OpenAI's API defines them.

Owns the bodies' types and bounds. Invariant: a value that passes is of the exact type (no "1" for
1, no NaN), and a parameter that would change the answer but isn't supported is refused by name,
never ignored. Extensions are named as in vLLM. Knows nothing of models and tokenizers.
"""

from abc import abstractmethod
from typing import Annotated, ClassVar, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from server.api.openai.chat_messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Message,
    Object,
    check_function,
)
from server.api.openai.fields import Place, check_unused
from server.errors import ContextLengthExceeded, InvalidRequest
from workers.messages import MAX_LOGPROBS, MAX_TOKEN_RULES

MAX_NAME_CHARS: Final = 1024
MAX_STOPS: Final = 16
MAX_PROMPTS: Final = 128
_VALUES_PER_MESSAGE: Final = 16
MAX_CHOICES: Final = 64
"""The most sequences for one prompt."""

MAX_CHOICE: Final = 1024
"""The most texts to choose from."""

_NAMES_OF_TEMPLATES: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    """Of what the form is for: the model is not told of it."""
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(BaseModel):
    """vLLM's; exactly one of them. A schema may be given as text, too."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: Annotated[str | dict[str, JsonValue] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=MAX_CHOICE)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None
    """There is one library that does it."""
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None
    structural_tag: None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Noise against who counts bytes: none is added."""
    continuous_usage_stats: Literal[False] | None = None


class Body(BaseModel):
    """What a request's body holds. Fields may be null, as if they weren't there."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    LONG: ClassVar[str]
    """The field that makes a large body large."""
    PLACE: ClassVar[Place]
    """What its fields are called together."""

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)]
    user: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None

    @classmethod
    @abstractmethod
    def most_values(cls, max_tokens: int) -> int:
        """How many JSON values the long field can hold, at most, where no prompt has more than
        `max_tokens` tokens."""

    @abstractmethod
    def check_supported(self) -> None:
        """Raises `InvalidRequest` for a parameter that would have to be ignored."""

    @abstractmethod
    def check_lengths(self, max_tokens: int, max_chars: int) -> None:
        """Raises `ContextLengthExceeded` where token ids or characters are so many that the model
        can't take them, whatever they are."""


class GenerationRequest(Body):
    """What both endpoints that generate text take."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_TOKEN_RULES),
        ]
        | None
    ) = None
    allowed_token_ids: (
        Annotated[TokenIds, Field(min_length=1, max_length=MAX_TOKEN_RULES)] | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, JsonValue] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=MAX_CHOICE)] | None = None
    guided_grammar: str | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer puts its special tokens, such as BOS, around what it is given: around a
    prompt if nothing else is said, around a chat, whose template writes them, not."""

    def check_supported(self) -> None:
        """Raises `InvalidRequest` for a parameter that would have to be ignored."""
        check_unused(self.model_extra or {}, self.PLACE)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                "'prompt_logprobs' doesn't go together with 'stream'. Omit one.",
                param="prompt_logprobs",
            )
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequest(
                "'best_of' other than 'n' isn't supported here. Omit it.", param="best_of"
            )

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted at each position; None: no figures at all."""

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


def texts_or_ids(value: Prompt) -> list[str | list[int]]:
    """Each of them; a plain list of ids is one."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        return [value]
    return cast("list[str | list[int]]", value)


def check_length(one: str | list[int], max_tokens: int, max_chars: int, param: str) -> None:
    """Raises `ContextLengthExceeded` for a text or ids that are too long, whatever they are."""
    most, unit = (max_chars, "characters") if isinstance(one, str) else (max_tokens, "token ids")
    if len(one) > most:
        raise ContextLengthExceeded(
            f"The {param} has {len(one)} {unit}, and the model's context holds {max_tokens} "
            f"tokens. Shorten the {param}.",
            param=param,
        )


class CompletionRequest(GenerationRequest):
    LONG: ClassVar[str] = "prompt"
    PLACE: ClassVar[Place] = "completions"

    prompt: Prompt
    # Nothing may be generated where only the prompt is wanted.
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @classmethod
    def most_values(cls, max_tokens: int) -> int:
        """As in the base."""
        return MAX_PROMPTS * (max_tokens + 1)

    def check_supported(self) -> None:
        """As in the base."""
        super().check_supported()
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "'max_tokens' is 0, which makes sense with 'echo' only. Ask for more.",
                param="max_tokens",
            )

    def check_lengths(self, max_tokens: int, max_chars: int) -> None:
        """As in the base."""
        for one in texts_or_ids(self.prompt):
            check_length(one, max_tokens, max_chars, "prompt")

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class ChatRequest(GenerationRequest):
    LONG: ClassVar[str] = "messages"
    PLACE: ClassVar[Place] = "chat"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Object], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | Object | None = None
    documents: Annotated[list[Object], Field(max_length=MAX_MESSAGES)] | None = None
    chat_template_kwargs: Object | None = None
    """Variables of the model's template, such as `enable_thinking`."""
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @classmethod
    def most_values(cls, max_tokens: int) -> int:
        """As in the base; of a message's parts few have no text."""
        return MAX_MESSAGES * _VALUES_PER_MESSAGE + 4 * max_tokens

    def check_supported(self) -> None:
        """As in the base."""
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs"
            )
        for index, message in enumerate(self.messages):
            message.check_supported(index)
        self._check_tools()
        self._check_template()

    def _check_tools(self) -> None:
        if self.tools and self.tool_choice != "none":
            raise InvalidRequest(
                "Calls of tools are not read out of an answer here. Set 'tool_choice' to 'none': "
                "then the model is told of the tools, and its calls are text. Or omit 'tools'.",
                param="tools",
            )
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest(
                "'tool_choice' (other than 'none') isn't supported here. Omit it.",
                param="tool_choice",
            )
        for number, tool in enumerate(self.tools or ()):
            check_function(tool, f"tools[{number}]")

    def _check_template(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "'add_generation_prompt' and 'continue_final_message' exclude each other. Keep "
                "one.",
                param="continue_final_message",
            )
        for name in self.chat_template_kwargs or ():
            if name in _NAMES_OF_TEMPLATES:
                raise InvalidRequest(
                    f"'chat_template_kwargs' can't set {name!r}. Give it beside 'model'.",
                    param="chat_template_kwargs",
                )

    def check_lengths(self, max_tokens: int, max_chars: int) -> None:
        """As in the base."""
        num_chars = sum(len(message.text) for message in self.messages)
        if num_chars > max_chars:
            raise ContextLengthExceeded(
                f"The messages have {num_chars} characters, and the model's context holds "
                f"{max_tokens} tokens. Shorten them.",
                param="messages",
            )

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
