"""Bodies: read in a cell or not, they give the same request, or the same error; large ones of every
kind are refused or taken, and nobody else waits for them."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.openai.bodies import cell_options, parsed, read_in_cell, received
from server.api.openai.body_reader import INLINE_BYTES, INLINE_VALUES, ValueCount
from server.api.openai.chat_messages import Message
from server.api.openai.embedding_schemas import EmbeddingRequest
from server.api.openai.schemas import Body, ChatRequest, CompletionRequest
from server.errors import ContextLengthExceeded, InvalidRequest
from server.text.text import Text
from tests.server.echo_model import DEADLINE_S, FACTS, NAME, EchoModel, echo_server, error_of

pytestmark = pytest.mark.slow

MAX_TOKENS, MAX_CHARS = 1000, 20_000


@pytest.fixture(scope="module")
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture(scope="module")
def http(model: EchoModel, text: Text) -> Iterator[httpx.Client]:
    with (
        echo_server(model, text, max_body_bytes=32 << 20) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
    ):
        yield client


def post(http: httpx.Client, path: str, content: str | bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return http.post(path, content=content, headers=headers)


# --- the same, whichever way

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70_000) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
prompts = (
    st.text(max_size=30)
    | st.lists(st.text(max_size=10), max_size=5)
    | st.lists(st.integers(0, 50_000), max_size=20)
    | st.lists(st.lists(st.integers(0, 50_000), max_size=5), max_size=4)
    | st.just([1] * (MAX_TOKENS + 1))
    | st.just("a" * (MAX_CHARS + 1))
    | json_values
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "assistant", "tool", "developer"]),
            "content": st.text(max_size=20)
            | st.lists(
                st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)}),
                max_size=3,
            ),
        },
        optional={
            "name": st.text(max_size=5),
            "reasoning_content": st.text(max_size=5),
            "tool_calls": json_values
            | json_values.map(
                lambda value: [{"function": {"name": "f", "arguments": {"": value}}}]
            ),
            "other": json_values,
            "cache_control": json_values,
        },
    ),
    max_size=4,
)
fields = st.fixed_dictionaries(
    {"model": st.just(NAME)},
    optional={
        "max_tokens": st.integers(-1, 50) | json_values,
        "temperature": st.floats(0, 2) | json_values,
        "stop": st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=3),
        "logit_bias": st.dictionaries(st.integers(0, 99).map(str), st.integers(-100, 100)),
        "response_format": st.just(
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
        ),
        "guided_json": st.just({"type": "object"}),
        "structured_outputs": st.just({"json": {"type": "integer"}}),
        "stream": st.booleans(),
        "stream_options": st.just({"include_usage": True}),
        "user": st.text(max_size=5),
        "seed": st.integers(-(1 << 63), (1 << 63) - 1),
        "suffix": json_values,
        "unknown": json_values,
        "truncate_prompt_tokens": st.integers(-1, 9),
    },
)


def outcome(schema: type[Body], content: bytes, *, in_cell: bool) -> Any:
    try:
        if in_cell:
            options = cell_options(schema, MAX_TOKENS, MAX_CHARS)
            body = asyncio.run(received(schema, read_in_cell(content, options)))
        else:
            body = parsed(schema, content)
            body.check_supported()
            body.check_lengths(MAX_TOKENS, MAX_CHARS)
    except InvalidRequest as error:
        return type(error), error.message, error.param
    return body.model_dump(exclude={*(body.model_extra or ())}), body.model_fields_set


@settings(deadline=None, max_examples=300)
@given(fields, prompts, messages)
def test_a_cell_reads_what_we_read(given_fields: Any, prompt: Any, given_messages: Any) -> None:
    for schema, long in (
        (CompletionRequest, prompt),
        (EmbeddingRequest, prompt),
        (ChatRequest, given_messages),
    ):
        content = json.dumps({**given_fields, schema.LONG: long}).encode()
        here = outcome(schema, content, in_cell=False)
        there = outcome(schema, content, in_cell=True)
        if here[0] is InvalidRequest or not isinstance(there[0], dict):
            assert there == here
            continue
        # What nobody knows is told by neither, but only here it lies in messages.
        for message in here[0].get("messages", ()):
            for name in {*message} - {*Message.model_fields}:
                del message[name]
        assert there[0] == here[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 5000, b"9" * 5000])
def test_a_cell_says_what_we_say_of_what_is_no_request(content: bytes) -> None:
    here = outcome(CompletionRequest, content, in_cell=False)
    assert here[0] is InvalidRequest
    assert outcome(CompletionRequest, content, in_cell=True) == here


@settings(deadline=None, max_examples=300)
@given(json_values, st.data())
def test_values_are_counted_however_they_come(value: Any, data: st.DataObject) -> None:
    content = json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode()
    whole = ValueCount()
    whole.feed(content)
    in_pieces = ValueCount()
    while content:
        size = data.draw(st.integers(0, len(content)))
        in_pieces.feed(content[:size])
        content = content[size:] if size else content
        if not size:
            in_pieces.feed(content[:1])
            content = content[1:]
    assert in_pieces.num_values == whole.num_values
    assert whole.num_values >= _num_values(value)
    assert whole.num_values <= 3 * _num_values(value)


def _num_values(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(_num_values, value))
    if isinstance(value, dict):
        return 1 + sum(map(_num_values, value.values()))
    return 1


# --- large ones

MILLION = 1_000_000


def prompt(value: str) -> str:
    return f'{{"model": "{NAME}", "prompt": {value}}}'


def beside(more: str) -> str:
    return f'{{"model": "{NAME}", "prompt": "a", {more}}}'


def chat(value: str) -> str:
    return f'{{"model": "{NAME}", "messages": {value}}}'


def many(one: str, number: int) -> str:
    """A list, or what is in an object."""
    return ",".join(one.replace("#", str(index)) for index in range(number))


def message(content: str) -> str:
    return f'{{"role": "user", "content": {content}}}'


def text_of(letters: str, number: int) -> str:
    return f'"{letters * number}"'


Huge = tuple[int, Callable[[], str | bytes]]
COMPLETIONS: dict[str, Huge] = {
    "token ids": (413, lambda: prompt("[" + "1," * (8 * MILLION) + "1]")),
    "lists of ids": (413, lambda: prompt(f"[{many('[1]', 300_000)}]")),
    "more ids than the context": (400, lambda: prompt("[" + "1," * 9000 + "1]")),
    "ids that the model has not": (400, lambda: prompt("[" + "99999," * 5000 + "1]")),
    "unknown keys": (413, lambda: beside(many('"k#": #', MILLION))),
    "fewer unknown keys": (400, lambda: beside(many('"k#": #', 40_000))),
    "one key again and again": (200, lambda: beside(many('"prompt": "a"', 40_000))),
    "text": (400, lambda: prompt(text_of("a, b ", 6 * MILLION))),
    "escaped text": (400, lambda: prompt(text_of("\\u00e9", 5 * MILLION))),
    "stops": (413, lambda: beside(f'"stop": [{many(text_of("x", 1), MILLION)}]')),
    "fewer stops": (400, lambda: beside(f'"stop": [{many(text_of("x", 1), 30_000)}]')),
    "biases": (413, lambda: beside(f'"logit_bias": {{{many(text_of("#", 1) + ":1", MILLION)}}}')),
    "fewer biases": (
        400,
        lambda: beside(f'"logit_bias": {{{many(text_of("#", 1) + ":1", 60_000)}}}'),
    ),
    "biases that are wrong": (400, lambda: beside(f'"logit_bias": {{{many(_WRONG, 60_000)}}}')),
    "nested": (400, lambda: prompt("[" * 50_000)),
    "nested deeper": (413, lambda: prompt("[" * (8 * MILLION))),
    "a long number": (400, lambda: prompt("9" * (8 * MILLION))),
    "a long name": (400, lambda: beside(f'"model": {text_of("x", 8 * MILLION)}')),
    "a long key": (400, lambda: beside(f"{text_of('k', 8 * MILLION)}: 1")),
    "a long grammar": (400, lambda: beside(f'"guided_regex": {text_of("a", 8 * MILLION)}')),
    "a deep schema": (400, lambda: beside('"guided_json": ' + '{"a":' * 900 + "1" + "}" * 900)),
    "half a pair": (400, lambda: prompt(text_of("\\ud800", 20_000))),
    "no UTF-8": (400, lambda: prompt(text_of("a", 100_000)).encode() + b"\xff"),
    "no JSON": (400, lambda: "a" * (8 * MILLION)),
    "nothing but quotes": (400, lambda: '"' * (8 * MILLION)),
    "nothing but backslashes": (400, lambda: "\\" * (8 * MILLION)),
}
_WRONG = '"x#": "y"'
_PART = '{"type": "text", "text": "a"}'
_ELSE = f'"a", "else": {text_of("b", 8 * MILLION)}'
CHATS: dict[str, Huge] = {
    "messages": (413, lambda: chat(f"[{many(message(text_of('a', 1)), 100_000)}]")),
    "fewer messages": (400, lambda: chat(f"[{many(message(text_of('a', 1)), 5000)}]")),
    "parts": (400, lambda: chat(f"[{message(f'[{many(_PART, 5000)}]')}]")),
    "a long message": (400, lambda: chat(f"[{message(text_of('a', 8 * MILLION))}]")),
    "a message with much else": (400, lambda: chat(f"[{message(_ELSE)}]")),
}


@pytest.mark.parametrize(
    ("path", "huge"),
    [
        pytest.param(path, huge, id=name)
        for path, table in (("completions", COMPLETIONS), ("chat/completions", CHATS))
        for name, huge in table.items()
    ],
)
def test_a_huge_body_of_any_kind_gets_an_answer(http: httpx.Client, path: str, huge: Huge) -> None:
    status, made = huge
    response = post(http, f"/v1/{path}", made())
    assert response.status_code == status, response.text[:500]
    if status != 200:
        error = error_of(response)
        assert error["type"] == "invalid_request_error"
        assert len(response.content) < 2000  # it does not give back what it got


def test_what_is_large_and_sound_is_answered(
    http: httpx.Client, model: EchoModel, text: Text
) -> None:
    model.reset()
    lists = [[500 + n % 100 for n in range(FACTS.max_model_len - 2)] for _ in range(100)]
    content = json.dumps({"model": NAME, "prompt": lists, "max_tokens": 1, "seed": 7})
    assert len(content) > INLINE_BYTES
    assert len(lists) * len(lists[0]) > INLINE_VALUES
    response = post(http, "/v1/completions", content)
    assert response.status_code == 200, response.text[:500]
    assert [ids for _, ids, _ in model.submitted] == lists
    assert {sampling.seed for _, _, sampling in model.submitted} == {7}
    assert len(response.json()["choices"]) == 100

    model.reset()
    padding = {"metadata": "x" * INLINE_BYTES}
    said = [{"role": "user", "content": f"Message {n}", "cache_control": [n]} for n in range(10)]
    small = http.post("/v1/chat/completions", json={"model": NAME, "messages": said})
    large = http.post("/v1/chat/completions", json={"model": NAME, "messages": said, **padding})
    assert (small.status_code, large.status_code) == (200, 200)
    assert model.submitted[0][1] == model.submitted[1][1]
    assert large.json()["choices"] == small.json()["choices"]


def test_others_are_answered_while_huge_bodies_arrive(http: httpx.Client) -> None:
    """How quickly, `benchmarks/http_edge.py` measures."""
    kinds = ("token ids", "unknown keys", "text", "no JSON")
    contents = [COMPLETIONS[name][1]() for name in kinds * 2]
    responses: list[int] = []

    def send(content: str | bytes) -> None:
        with httpx.Client(base_url=http.base_url, timeout=DEADLINE_S) as own:
            responses.append(post(own, "/v1/completions", content).status_code)

    threads = [threading.Thread(target=send, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    num_answers = 0
    while any(thread.is_alive() for thread in threads):
        assert http.get("/health").status_code == 200
        num_answers += 1
    for thread in threads:
        thread.join()
    assert sorted(responses) == [400] * 4 + [413] * 4
    assert num_answers > len(threads)  # as many at most if each were read in one go


def test_what_is_too_long_says_so_with_its_code(http: httpx.Client) -> None:
    for path, (_, made) in (
        ("completions", COMPLETIONS["text"]),
        ("completions", COMPLETIONS["more ids than the context"]),
        ("chat/completions", CHATS["a long message"]),
    ):
        error = error_of(post(http, f"/v1/{path}", made()))
        assert error["code"] == ContextLengthExceeded.code
