"""Prompts are what transformers makes of them, for templates that are in public use: those that the
packages trl and axolotl ship, of which nothing else is used.

Each chat is given to transformers in every form that OpenAI's API has for it, and the first that
loses nothing is what has to come out, whichever form it comes in. A call that the template does not
write is refused.
"""

import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.conformance.differences import expected_prompt
from server.text.template_process import Template, answered
from tests.server.text.test_published_templates import (
    PLAIN,
    TOKENS,
    TOOLS,
    WITH_SYSTEM,
    WITH_TOOLS,
    Message,
    of_transformers,
)

pytestmark = pytest.mark.slow

LEAST = 84
CHATS = {
    name: (messages, tools)
    for chats, tools in ((PLAIN, None), (WITH_SYSTEM, None), (WITH_TOOLS, TOOLS))
    for name, messages in chats.items()
    if name != "long"  # says nothing of forms
}


def shipped() -> dict[str, str]:
    """Templates by package and name, each text once."""
    found: dict[str, str] = {}
    for package in ("trl", "axolotl"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for file in sorted(Path(spec.origin).parent.rglob("*.jinja")):
            source = file.read_text()
            if "chat_templates" in file.parts and source not in found.values():
                found[f"{package}-{file.stem}"] = source
    return found


SHIPPED = shipped()


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """As it is, then with contents as strings or parts, and arguments as objects or text; what
    calls and says nothing with an empty content."""
    yield messages
    for as_parts, as_text in itertools.product((False, True), repeat=2):
        yield [_formed(message, as_parts, as_text) for message in messages]


def _formed(message: Message, as_parts: bool, as_text: bool) -> Message:
    content = message.get("content") or ""
    if as_parts and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not as_parts and not isinstance(content, str):
        content = "\n".join(part["text"] for part in content)
    formed = {**message, "content": content}
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
        function = {**call["function"], "arguments": given}
        if as_text and arguments is given:
            function["arguments"] = json.dumps(given, ensure_ascii=False)
        elif as_text:
            function["arguments"] = arguments
        formed["tool_calls"] = [{**call, "function": function}]
    return formed


def needed(messages: list[Message]) -> list[str]:
    """What must be in a prompt."""
    found = []
    for message in messages:
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        found += [text.strip() for text in texts if "</think>" not in text]
        found += [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [text for text in found if text]


def rendered(source: str, messages: list[Message], tools: Any) -> dict[str, str]:
    given = [
        {name: value for name, value in message.items() if value is not None}
        for message in messages
    ]
    try:
        return {"text": of_transformers(source, given, tools)}
    except Exception as error:  # noqa: BLE001 - whatever a template raises
        return {"error": str(error)}


def asked(messages: list[Message], tools: Any) -> Mapping[str, Any]:
    return {
        "messages": messages,
        "tools": tools,
        "documents": None,
        "variables": {},
        "needed": {},
        "add_generation_prompt": True,
        "continues_last": False,
        "max_chars": 1 << 20,
    }


def test_there_are_as_many_as_there_should_be() -> None:
    if not SHIPPED:
        pytest.skip("the packages trl and axolotl, which ship chat templates, are not installed")
    assert len(SHIPPED) >= LEAST


@pytest.mark.parametrize("name", SHIPPED)
def test_prompts_are_those_of_transformers(name: str) -> None:
    source = SHIPPED[name]
    template = {"default": Template(source, TOKENS)}
    wrong = {}
    for chat, (messages, tools) in CHATS.items():
        theirs = expected_prompt(
            [rendered(source, form, tools) for form in forms(messages)], needed(messages)
        )
        ours = answered(template, asked(messages, tools))
        if not theirs.agrees(ours.get("text")):
            wrong[chat] = (ours, theirs)
    assert not wrong


def test_a_call_that_would_be_lost_is_refused() -> None:
    template = {"default": Template("{% for one in messages %}{{ one.content }}{% endfor %}", {})}
    messages, tools = CHATS["called"]
    answer = answered(template, asked(messages, tools))
    assert "messages[1].tool_calls[0]: the call of 'get_weather' would be lost" in answer["error"]
    assert answer["param"] == "messages"


def test_parts_that_are_written_as_they_are_in_one_place_are_read_in_none() -> None:
    """A system's message that comes first, here, as in one of Gemma's templates."""
    source = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = "
        "messages[1:] %}{% endif %}{% for one in messages %}[{% if one.content is string %}"
        "{{ one.content }}{% else %}{{ one.content[0].text }}{% endif %}]{% endfor %}"
    )
    messages, _ = CHATS["system of one part"]
    answer = answered({"default": Template(source, {})}, asked(messages, None))
    assert answer["text"] == "Be brief.[a b]"


def test_no_content_is_never_written_as_null() -> None:
    source = (
        "{% for one in messages %}[{{ one.content if one.content is string else one.content | "
        "tojson }}]{% for call in one.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
        "{% endfor %}"
    )
    messages, _ = CHATS["called"]
    answer = answered({"default": Template(source, {})}, asked(messages, None))
    assert answer["text"] == "[a b][]get_weather[20 °C]"
