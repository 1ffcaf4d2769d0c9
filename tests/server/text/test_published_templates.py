"""Prompts are what transformers makes of them, for the chat templates of the families of models
that people use most.

The templates in `published_templates/` are written anew for these tests: the tokens, the blanks and
the means (macros, namespaces, loops over parts, ...) are those of the published ones, the words are
not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from tokenizers import Tokenizer, models

from server.text.chat_template import Chat, ChatTemplate, TemplateFailed

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "published_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
Message = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """One, and what it was written to read."""

    name: str
    content: Literal["text", "parts", "both"] = "text"
    arguments: Literal["none", "text", "object", "both"] = "none"
    """Of tool calls. "none": it reads neither tools nor calls."""
    takes_system: bool = True

    @property
    def source(self) -> str:
        return (FOLDER / f"{self.name}.jinja").read_text()


PUBLISHED = (
    Published("chatml"),
    Published("smollm2"),
    Published("qwen2.5", arguments="object"),
    Published("qwen3", arguments="both"),
    Published("qwen2-vl", content="both"),
    Published("llama2"),
    Published("llama3"),
    Published("llama3.1", arguments="object"),
    Published("llama3.2-vision", content="both"),
    Published("llama-guard-3", content="parts", takes_system=False),
    Published("llama4", content="both"),
    Published("mistral-v1", takes_system=False),
    Published("mistral-v3", arguments="object"),
    Published("mistral-small-3", content="both"),
    Published("gemma", takes_system=False),
    Published("gemma3", content="both"),
    Published("phi3"),
    Published("phi4"),
    Published("deepseek-v2"),
    Published("deepseek-r1"),
    Published("command-r"),
    Published("zephyr"),
    Published("vicuna"),
    Published("falcon"),
    Published("olmo2"),
    Published("granite3", arguments="object"),
    Published("smollm3"),
    Published("internlm2"),
    Published("glm4", content="both", arguments="object"),
    Published("hermes2-pro", arguments="object"),
    Published("exaone"),
    Published("openchat"),
    Published("solar"),
    Published("kimi-k2", content="both", arguments="both"),
    Published("gpt-oss", arguments="object"),
    Published("arguments-as-text", arguments="text"),
    Published("loop-controls", takes_system=False),
)


def said(role: str, *texts: str, **more: Any) -> Message:
    """A text, or several parts."""
    parts = [{"type": "text", "text": text} for text in texts]
    return {"role": role, "content": texts[0] if len(texts) == 1 else parts, **more}


def in_one_part(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def calls(arguments: Any, **more: Any) -> Message:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "abcdef123", "type": "function", "function": function}],
        **more,
    }


ANSWERED = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdef123", "content": "20 °C"}
CITY = {"city": "Zürich <&>"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "é"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "<now>", "parameters": PARAMETERS},
    }
]
LONG = "many words, and then some more\n" * 2000

PLAIN: dict[str, list[Message]] = {
    "one": [said("user", "Hello <b>&")],
    "blanks": [said("user", "  two  \n")],
    "nothing": [said("user", "")],
    "long": [said("user", LONG), said("assistant", LONG), said("user", "日本語 🎉")],
    "turns": [said("user", "a b"), said("assistant", "c d"), said("user", "e f")],
    "answered": [said("user", "a b"), said("assistant", "c d")],
    "one part": [in_one_part("user", "a b")],
    "parts": [said("user", "a b", "c d"), in_one_part("assistant", "e f"), said("user", "g h")],
    "thoughts": [
        said("user", "a b"),
        said("assistant", "c d", reasoning_content="thus"),
        said("user", "e f"),
        said("assistant", "<think>\nhence\n</think>\n\ng h"),
        said("user", "i j"),
    ],
    "last thought": [said("user", "a b"), said("assistant", "c d", reasoning="thus")],
}
WITH_SYSTEM: dict[str, list[Message]] = {
    "system": [said("system", "Be brief."), said("user", "a b")],
    "no system": [said("system", ""), said("user", "a b")],
    "system and turns": [said("system", "Be brief."), *PLAIN["turns"]],
    "system of one part": [in_one_part("system", "Be brief."), in_one_part("user", "a b")],
}
WITH_TOOLS: dict[str, list[Message]] = {
    "tools": [said("system", "Be brief."), said("user", "a b")],
    "called": [said("user", "a b"), calls(CITY), ANSWERED],
    "called as text": [said("user", "a b"), calls(json.dumps(CITY)), ANSWERED],
    "called, null said": [said("user", "a b"), calls(CITY, content=None), ANSWERED],
    "called and told": [
        said("user", "a b"),
        calls(CITY, reasoning_content="thus"),
        ANSWERED,
        said("assistant", "c d"),
        said("user", "e f"),
    ],
}
CASES = [
    pytest.param(one, messages, tools, id=f"{one.name}-{name}")
    for one in PUBLISHED
    for chats, tools, wanted in (
        (PLAIN, None, True),
        (WITH_SYSTEM, None, one.takes_system),
        (WITH_TOOLS, TOOLS, one.arguments != "none"),
    )
    for name, messages in chats.items()
    if wanted
]


@pytest.fixture(scope="module")
def templates() -> Iterator[Mapping[str, ChatTemplate]]:
    made = {one.name: ChatTemplate(one.source, TOKENS) for one in PUBLISHED}
    yield made
    for template in made.values():
        template.close()


def as_it_reads(one: Published, messages: Sequence[Message]) -> list[Message]:
    """The same chat, in the form for which the template was written."""
    return [_as_it_reads(one, message) for message in messages]


def _as_it_reads(one: Published, message: Message) -> Message:
    content, read = message.get("content"), {**message}
    if one.content == "text" and isinstance(content, list):
        read["content"] = "\n".join(part["text"] for part in content)
    if one.content == "parts" and isinstance(content, str):
        read["content"] = [{"type": "text", "text": content}]
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if one.arguments == "object" and isinstance(arguments, str):
            arguments = json.loads(arguments)
        if one.arguments == "text" and isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        read["tool_calls"] = [{**call, "function": {**call["function"], "arguments": arguments}}]
    return read


def of_transformers(
    source: str, messages: Sequence[Message], tools: Any = None, **options: Any
) -> str:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    prompt: str = tokenizer.apply_chat_template(
        list(messages),
        tools=tools,
        chat_template=source,
        tokenize=False,
        **{"add_generation_prompt": True, **options},
    )
    return prompt


@pytest.mark.parametrize(("one", "messages", "tools"), CASES)
def test_a_prompt_is_that_of_transformers(
    templates: Mapping[str, ChatTemplate], one: Published, messages: list[Message], tools: Any
) -> None:
    theirs = of_transformers(one.source, as_it_reads(one, messages), tools)
    assert templates[one.name].render(Chat(messages, tools), max_chars=1 << 20) == theirs
    for message in messages:  # nothing was lost on the way, and no notation is in it
        texts = message["content"] if isinstance(message.get("content"), list) else ()
        assert all(part["text"] in theirs for part in texts if message["role"] != "system")
    assert "{'type':" not in theirs


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: one.name)
def test_so_is_one_that_goes_on_with_the_last_message(
    templates: Mapping[str, ChatTemplate], one: Published
) -> None:
    messages = PLAIN["answered"]
    chat = Chat(messages, continues_last=True)
    theirs = of_transformers(
        one.source,
        as_it_reads(one, messages),
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert templates[one.name].render(chat, max_chars=1 << 20) == theirs
    assert theirs.endswith("c d")


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: one.name)
@pytest.mark.parametrize(
    "variables", [{"enable_thinking": False}, {"bos_token": "<other>"}, {"date_string": "today"}]
)
def test_variables_are_passed_on(
    templates: Mapping[str, ChatTemplate], one: Published, variables: dict[str, Any]
) -> None:
    messages = PLAIN["turns"]
    theirs = of_transformers(one.source, as_it_reads(one, messages), **variables)
    chat = Chat(messages, variables=variables)
    assert templates[one.name].render(chat, max_chars=1 << 20) == theirs


def test_documents_are_passed_on(templates: Mapping[str, ChatTemplate]) -> None:
    documents = [{"doc_id": 3, "title": "T", "text": "one"}, {"text": "two"}]
    for name in ("command-r", "granite3"):
        source = (FOLDER / f"{name}.jinja").read_text()
        theirs = of_transformers(source, PLAIN["one"], documents=documents)
        chat = Chat(PLAIN["one"], documents=documents, needed={"documents": "documents"})
        assert templates[name].render(chat, max_chars=1 << 20) == theirs
        assert "two" in theirs


def test_what_a_template_does_not_read_is_refused(templates: Mapping[str, ChatTemplate]) -> None:
    for name in ("tools", "documents", "reasoning_effort"):
        chat = Chat(PLAIN["one"], needed={name: name})
        with pytest.raises(TemplateFailed, match=f"does not read '{name}'") as refused:
            templates["chatml"].render(chat, max_chars=1000)
        assert refused.value.param == name


def test_arguments_that_are_no_object_are_refused(templates: Mapping[str, ChatTemplate]) -> None:
    chat = Chat([said("user", "a"), calls("{"), ANSWERED], TOOLS)
    with pytest.raises(TemplateFailed, match=r"messages\[1\]\.tool_calls\[0\].*JSON object"):
        templates["qwen2.5"].render(chat, max_chars=1000)


@pytest.mark.parametrize("arguments", [CITY, json.dumps(CITY, ensure_ascii=False)])
@pytest.mark.parametrize("said_nothing", [{}, {"content": None}])
def test_calls_reach_a_template_that_asks_for_null(
    templates: Mapping[str, ChatTemplate], arguments: Any, said_nothing: dict[str, Any]
) -> None:
    """Which transformers leaves out, so that it fails."""
    chat = Chat([said("user", "a"), calls(arguments, **said_nothing), ANSWERED])
    prompt = templates["deepseek-r1"].render(chat, max_chars=1000)
    assert 'get_weather\n```json\n{"city": "Zürich <&>"}\n```' in prompt
    assert "<｜tool▁outputs▁begin｜>20 °C<｜tool▁outputs▁end｜>" in prompt


@pytest.mark.parametrize("name", ["qwen2.5", "chatml", "gpt-oss"])
def test_a_thought_without_words_is_a_message(
    templates: Mapping[str, ChatTemplate], name: str
) -> None:
    thought = {"role": "assistant", "reasoning_content": "thus"}
    chat = Chat([said("user", "a b"), thought, said("user", "c d")])
    prompt = templates[name].render(chat, max_chars=1000)
    assert "a b" in prompt
    assert "c d" in prompt
    assert "None" not in prompt


def test_the_newer_name_of_system_is_for_those_who_know_it(
    templates: Mapping[str, ChatTemplate],
) -> None:
    chat = Chat([said("developer", "Be brief."), said("user", "a b")])
    for name, role in (("chatml", "<|im_start|>system"), ("gpt-oss", "<|start|>developer")):
        assert role in templates[name].render(chat, max_chars=1000)


def test_of_several_templates_the_one_for_tools_is_for_tools() -> None:
    several = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tools"})
    other = ChatTemplate({"rag": "x"})
    try:
        assert several.render(Chat(PLAIN["one"]), max_chars=99) == "plain"
        assert several.render(Chat(PLAIN["one"], TOOLS), max_chars=99) == "1 tools"
        with pytest.raises(TemplateFailed, match="templates rag, and none is the default"):
            other.render(Chat(PLAIN["one"]), max_chars=99)
    finally:
        several.close()
        other.close()
