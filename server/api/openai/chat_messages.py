"""What a chat's messages look like, as OpenAI's API defines them, and tools.

Owns their types and bounds. Invariants as in `schemas`. Does not know what templates make of them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from server.api.openai.fields import check_unused
from server.errors import InvalidRequest

MAX_MESSAGES: Final = 4096
MAX_TOOLS: Final = 1024

Object = dict[str, JsonValue]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str
    cache_control: JsonValue = None
    """Others' word of what to keep computed, which is found anyway."""


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[Object], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _content_may_be_missing(cls, value: Any) -> Any:
        """Where a model thought, or called tools, and said nothing."""
        if isinstance(value, dict) and (value.get("tool_calls") or cls._thought(value)):
            value.setdefault("content", None)
        return value

    @staticmethod
    def _thought(value: Mapping[str, Any]) -> bool:
        return any(value.get(name) for name in ("reasoning_content", "reasoning", "thinking"))

    def check_supported(self, index: int) -> None:
        """Raises `InvalidRequest` for what would have to be ignored, or is no message."""
        where = f"messages[{index}]."
        check_unused(self.model_extra or {}, "message", where)
        if self.content is None and not self.tool_calls and not self._thought(self.__dict__):
            raise InvalidRequest(f"{where}content is missing.", param=f"{where}content")
        for number, call in enumerate(self.tool_calls or ()):
            check_function(call, f"{where}tool_calls[{number}]")

    @property
    def text(self) -> str:
        """The content as one string; parts are parted by line breaks."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or ())

    def for_template(self) -> dict[str, Any]:
        """What a template may read, without what is null, and calls where there are none: templates
        ask whether there is such a key."""
        known = {name: getattr(self, name) for name in type(self).model_fields}
        if isinstance(self.content, list):
            known["content"] = [{"type": part.type, "text": part.text} for part in self.content]
        known["tool_calls"] = self.tool_calls or None
        return {name: value for name, value in known.items() if value is not None}


def check_function(value: Mapping[str, Any], where: str) -> None:
    """Raises `InvalidRequest` unless it is a tool, or a call of one, as OpenAI writes them."""
    function = value.get("function")
    if value.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidRequest(f"{where} is no function.", param=where)
    if not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where}.function has no name.", param=where)
    if not isinstance(function.get("arguments", ""), str | dict):
        raise InvalidRequest(
            f"{where}.function.arguments is neither an object nor the text of one.", param=where
        )
