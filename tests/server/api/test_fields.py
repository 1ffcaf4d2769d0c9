"""The table of fields: each is used, ignored or refused, as the documentation says."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.api.openai.bodies import parsed
from server.api.openai.chat_messages import Message
from server.api.openai.embedding_schemas import EmbeddingRequest
from server.api.openai.fields import UNUSED, Place, UnusedField
from server.api.openai.schemas import Body, ChatRequest, CompletionRequest
from server.errors import InvalidRequest

SCHEMAS: dict[Place, type[Body]] = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "embeddings": EmbeddingRequest,
}
LEAST: dict[Place, dict[str, Any]] = {
    "completions": {"prompt": "a"},
    "chat": {"messages": [{"role": "user", "content": "a"}]},
    "embeddings": {"input": "a"},
}
SOME: tuple[Any, ...] = ("something", 7, 0.5, True, False, [1], {"a": 1}, ["text", "audio"])
CASES = [(field, place) for field in UNUSED for place in field.places]
API = Path(__file__).parents[3] / "docs" / "api.md"


def as_markdown(used: Mapping[Place, Iterable[str]]) -> str:
    """The table, as docs/api.md has it."""
    lines = ["| field | of | from | here |", "|---|---|---|---|"]
    for place, names in used.items():
        listed = ", ".join(f"`{name}`" for name in sorted(names))
        lines.append(f"| {listed} | {place} | | used |")
    for field in UNUSED:
        if field.neutral is None:
            here = f"ignored: {field.instead}"
        else:
            allowed = " or ".join(f"`{json.dumps(value)}`" for value in field.neutral)
            here = f"refused{f', but for {allowed}' * bool(allowed)}"
            here += f": {field.instead}" * (field.instead != "Omit it.")
        lines.append(f"| `{field.name}` | {', '.join(field.places)} | {field.owners} | {here} |")
    return "\n".join(lines) + "\n"


def check(place: Place, fields: dict[str, Any]) -> None:
    """Raises `InvalidRequest`. The fields of a message are those of the first one."""
    body: dict[str, Any] = {"model": "m"}
    if place == "message":
        body |= {"messages": [{"role": "user", "content": "a", **fields}]}
        parsed(ChatRequest, json.dumps(body).encode()).check_supported()
    else:
        parsed(
            SCHEMAS[place], json.dumps({**body, **LEAST[place], **fields}).encode()
        ).check_supported()


def used() -> dict[Place, list[str]]:
    found: dict[Place, list[str]] = {
        place: list(schema.model_fields) for place, schema in SCHEMAS.items()
    }
    return found | {"message": list(Message.model_fields)}


@pytest.mark.parametrize(
    ("field", "place"), CASES, ids=[f"{place}-{field.name}" for field, place in CASES]
)
def test_a_field_is_refused_by_name_unless_it_asks_for_nothing(
    field: UnusedField, place: Place
) -> None:
    check(place, {field.name: None})
    for value in field.neutral or ():
        check(place, {field.name: value})
    for value in SOME:
        if field.neutral is None:
            check(place, {field.name: value})
        elif not any(type(value) is type(one) and value == one for one in field.neutral):
            with pytest.raises(InvalidRequest, match=f"{field.name}'.* isn't supported") as refused:
                check(place, {field.name: value})
            assert (refused.value.param or "").endswith(field.name)


@pytest.mark.parametrize("place", [*SCHEMAS, "message"])
def test_what_nobody_knows_is_refused_by_name(place: Place) -> None:
    for value in (None, 0, False, "", [], {}):
        check(place, {"never_heard_of": value})
    for value in SOME:
        if value is not False:
            with pytest.raises(InvalidRequest, match="never_heard_of' isn't known"):
                check(place, {"never_heard_of": value})


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"stream": True, "stream_options": {"other": 1}},
        {"response_format": {"type": "json_object", "other": 1}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "other": 1}}},
        {"structured_outputs": {"json_object": True, "whitespace_pattern": "x"}},
        {"structured_outputs": {"json_object": True, "other": 1}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "other": 1}]}]},
    ],
)
def test_so_is_what_lies_deeper(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"other|whitespace_pattern|continuous_usage_stats"):
        check("chat", fields)


def test_what_a_client_sends_of_itself_passes() -> None:
    """Whole objects of vLLM's and OpenAI's clients, whose fields are at their defaults."""
    outputs = {
        "json": {"type": "object"},
        **dict.fromkeys(("regex", "choice", "grammar", "json_object", "structural_tag")),
        **dict.fromkeys(("disable_fallback", "disable_any_whitespace"), False),
        **{"disable_additional_properties": False, "whitespace_pattern": None},
    }
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": False}
    check("chat", {"structured_outputs": outputs, "stream": True, "stream_options": options})


def test_a_field_is_one_thing_in_one_place() -> None:
    assert len({(field.name, place) for field, place in CASES}) == len(CASES)
    for place, names in used().items():
        assert not {field.name for field, of in CASES if of == place} & set(names)


def test_the_documentation_shows_the_table() -> None:
    """As `python -m tests.server.api.test_fields` prints it."""
    assert as_markdown(used()) in API.read_text()


if __name__ == "__main__":
    sys.stdout.write(as_markdown(used()))
