"""What a chat's fields make of its prompt, over HTTP: small bodies, and those that a cell reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.openai.body_reader import INLINE_BYTES
from server.text.text import Text
from tests.server.echo_model import DEADLINE_S, EchoModel, chat, echo_server, error_of

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% for call in m.tool_calls or [] %}!{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if 'tool_calls' in m %}?{% endif %}{% if m.name %}@{{ m.name }}{% endif %}{% endfor %}"
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for one in documents or [] %}[{{ one.text }}]{% endfor %}"
    "{% if add_generation_prompt %}<answer>{{ mode or '' }}{% endif %}"
    "{{ max_chars }}{{ deadline_s }}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city": "x"}'}}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture(scope="module")
def templated(tokenizer_dir: Path) -> Iterator[Text]:
    loaded = Text.load(tokenizer_dir, chat_template=TEMPLATE)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def http(model: EchoModel, templated: Text) -> Iterator[httpx.Client]:
    with (
        echo_server(model, templated) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
    ):
        yield client


@pytest.mark.parametrize("metadata", ["", "x" * INLINE_BYTES], ids=["small", "large"])
@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "<user>hi<answer>"),
        ({"add_generation_prompt": False}, "<user>hi"),
        ({"continue_final_message": True}, "<user>hi"),
        ({"chat_template_kwargs": {"mode": "fast"}}, "<user>hi<answer>fast"),
        ({"chat_template_kwargs": {"max_chars": 3, "deadline_s": 4}}, "<user>hi<answer>34"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<user>hi<answer>"),
        ({"chat_template_kwargs": {"never_read": None}}, "<user>hi<answer>"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "<user>hi<answer>"),
        ({"tools": [TOOL], "tool_choice": "none"}, "<user>hi[look]<answer>"),
        ({"tools": [], "tool_choice": "auto"}, "<user>hi<answer>"),
        ({"documents": [{"text": "a"}, {"text": "b"}]}, "<user>hi[a][b]<answer>"),
        (
            {"messages": [{"role": "developer", "content": "a", "name": "n"}, *HI]},
            "<system>a@n<user>hi<answer>",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "content": "a", "reasoning": "b"}, *HI]},
            "<user>hi<assistant>a(b)<user>hi<answer>",
        ),
        (
            {
                "messages": [
                    *HI,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "12"},
                ]
            },
            '<user>hi<assistant>!look{"city": "x"}?<tool>12<answer>',
        ),
        (
            {
                "messages": [
                    *HI,
                    {
                        **{"role": "assistant", "content": "a", "tool_calls": []},
                        **dict.fromkeys(("refusal", "audio", "function_call", "name")),
                        **{"annotations": [], "reasoning_content": None},
                    },
                    *HI,
                ]
            },
            "<user>hi<assistant>a<user>hi<answer>",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]},
            "<user>a\na<answer>",
        ),
    ],
)
def test_a_field_is_in_the_prompt(
    http: httpx.Client,
    model: EchoModel,
    templated: Text,
    fields: dict[str, Any],
    prompt: str,
    metadata: str,
) -> None:
    model.reset()
    response = chat(http, **{"messages": HI, "metadata": metadata, **fields})
    assert response.status_code == 200, response.text
    ((_, ids, _),) = model.submitted
    assert templated.decode(ids) == prompt


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [TOOL]}, "tools", "Set 'tool_choice' to 'none'"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools", "Set 'tool_choice' to 'none'"),
        ({"tools": [{"type": "x"}], "tool_choice": "none"}, "tools[0]", "is no function"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "isn't supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "template does not read"),
        (
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "can't set 'messages'",
        ),
        (
            {"chat_template_kwargs": {"mod": "fast"}},
            "chat_template_kwargs",
            "does not read 'mod', which 'chat_template_kwargs' would set. Of such variables it "
            "reads deadline_s, max_chars, mode. Correct the name",
        ),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "it reads"),
        ({"chat_template_kwargs": {"mod": False}}, "chat_template_kwargs", "it reads deadline_s"),
        ({"chat_template": "x"}, "chat_template", "--chat-template FILE"),
        ({"enable_thinking": False}, "enable_thinking", "chat_template_kwargs"),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low"}},
            "chat_template_kwargs",
            "two efforts",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format",
            "takes no 'json_schema'",
        ),
        ({"presence_penalty": 1.0, "repeat_last_n": 4}, "repeat_last_n", "repeat_last_n"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "exclude each other",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "messages[0].content",
            "is missing",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
            "messages[0].tool_calls[0]",
            "has no name",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "prefix": True}]},
            "messages[0].prefix",
            "continue_final_message",
        ),
    ],
)
def test_what_can_not_be_had_is_refused_by_name(
    http: httpx.Client, model: EchoModel, fields: dict[str, Any], param: str, message: str
) -> None:
    model.reset()
    response = chat(http, **{"messages": HI, **fields})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert message in error["message"]
    assert model.submitted == []
