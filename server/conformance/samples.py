"""What is compared: texts, chats and prompts that are shipped with the program.

Owns them. Invariant: the same model gets the same samples, whoever asks. The texts are of many
scripts and none: code, numbers, CJK, emoji, combining marks, blanks, what looks like a token.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Message = dict[str, Any]

TEXTS: Final[tuple[str, ...]] = tuple(
    json.loads(Path(__file__).with_name("texts.json").read_text())
)
PROMPTS: Final = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4, 5,",
    "日本の首都は",
)
NUM_NEW: Final = 16
"""Tokens that are generated behind each."""
_MOST_WHOLE: Final = 24

CITY: Final = {"city": "Zürich <&>", "days": [1, 2]}
TOOLS: Final = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of <now>.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "é"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    },
)


@dataclass(frozen=True)
class SampleChat:
    """One, as OpenAI's API lets a client write it."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    add_generation_prompt: bool = True

    @property
    def needed(self) -> list[str]:
        """What is lost where a template drops a message, or a call."""
        found = [text for message in self.messages for text in _texts(message)]
        return [text.strip() for text in found if text.strip()]


def whole_texts(names: Mapping[str, int]) -> Iterator[str]:
    """With a model's own special tokens, of which so many are looked at, among words and blanks."""
    for name in sorted(names, key=lambda one: (names[one], one))[:_MOST_WHOLE]:
        yield f"a {name} b"
        yield f"{name}c{name}\n {name}"


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _texts(message: Message) -> Iterator[str]:
    if message.get("content"):
        yield message["content"]
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]


_CALL: Final[Message] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "get_weather", "arguments": CITY},
        }
    ],
}
_ANSWER: Final[Message] = {
    "role": "tool",
    "name": "get_weather",
    "tool_call_id": "abcdef123",
    "content": "20 °C",
}
_TURNS: Final = (_said("user", "one <b>&"), _said("assistant", "two\n\n three"))

CHATS: Final = (
    SampleChat("one message", (_said("user", "Hello, 世界 🎉"),)),
    SampleChat("blanks around a message", (_said("user", "  two  words \n"),)),
    SampleChat("several turns", (*_TURNS, _said("user", "four"))),
    SampleChat("an answer at the end", _TURNS, add_generation_prompt=False),
    SampleChat("a system's message", (_said("system", "Be brief."), _said("user", "five"))),
    SampleChat(
        "a system's message and turns",
        (_said("system", "Be brief."), *_TURNS, _said("user", "four")),
    ),
    SampleChat("tools", (_said("user", "six"),), TOOLS),
    SampleChat("a tool that is called", (_said("user", "six"), _CALL, _ANSWER), TOOLS),
    SampleChat(
        "an answer after a call",
        (_said("user", "six"), _CALL, _ANSWER, _said("assistant", "seven"), _said("user", "eight")),
        TOOLS,
    ),
)
