"""The REST API over a real HTTP server, as the `openai` client and bare HTTP see it."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.errors import Overloaded
from server.generation import NO_OPTIONS, RequestOptions
from server.text.text import Text
from tests.leaks import wait_until
from tests.server.echo_model import (
    DEADLINE_S,
    ENDS,
    EOS,
    FACTS,
    NAME,
    EchoModel,
    chat,
    complete,
    echo_server,
    error_of,
    events,
)
from workers.messages import SamplingParams


@pytest.fixture(scope="module")
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture(scope="module")
def address(model: EchoModel, text: Text) -> Iterator[str]:
    with echo_server(model, text) as address:
        yield address


@pytest.fixture(autouse=True)
def fresh(model: EchoModel) -> Iterator[None]:
    model.reset()
    yield
    # Whoever reads the last of an answer can be quicker than the server that closes behind it.
    wait_until(lambda: model.num_open == 0, "a token stream is closed", DEADLINE_S)


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S
    ) as made:
        yield made


# --- completions


def test_a_completion(client: openai.OpenAI, text: Text) -> None:
    prompt = "Grüße, 東京! 🎉 ok"
    ids = asyncio.run(text.encode(prompt, context_tokens=256))
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=99, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == NAME
    assert answer.choices[0].text == prompt
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(ids) + 1  # EOS was generated too
    assert answer.usage.total_tokens == 2 * len(ids) + 1


@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 100])
def test_a_streamed_completion_is_the_same_text(
    client: openai.OpenAI, model: EchoModel, tokens_per_chunk: int
) -> None:
    model.tokens_per_chunk = tokens_per_chunk
    prompt = "Grüße, 東京! 🎉🎉 ok"
    chunks = list(
        client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=99,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, last = chunks
    assert "".join(c.choices[0].text for c in parts) == prompt
    assert all("\ufffd" not in c.choices[0].text for c in parts)
    assert [c.choices[0].finish_reason for c in parts if c.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 2 * last.usage.prompt_tokens + 1
    assert len({c.id for c in chunks}) == 1


def test_the_default_length_is_sixteen_tokens(http: httpx.Client) -> None:
    body = complete(http, prompt=[[500 + i for i in range(40)]]).json()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"
    assert "token_ids" not in body["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_all_forms_and_a_choice_for_each(
    http: httpx.Client, text: Text, stream: bool
) -> None:
    one, two = (
        asyncio.run(text.encode(p, context_tokens=256))
        for p in ("First one.", "And a second, longer.")
    )
    for prompt, expected in (
        ("First one.", [one]),
        (["First one.", "And a second, longer."], [one, two]),
        (one, [one]),
        ([one, two], [one, two]),
    ):
        response = complete(http, prompt=prompt, max_tokens=50, stream=stream)
        texts = dict.fromkeys(range(len(expected)), "")
        choices = (
            [c for e in events(response) for c in e["choices"]]
            if stream
            else response.json()["choices"]
        )
        for choice in choices:
            texts[choice["index"]] += choice["text"]
        assert list(texts.values()) == [text.decode(ids) for ids in expected]
        ends = sorted(c["index"] for c in choices if c["finish_reason"] == "stop")
        assert ends == list(range(len(expected)))


def test_several_prompts_run_at_once(http: httpx.Client, model: EchoModel) -> None:
    model.wait_for = threading.Barrier(3)  # each sequence begins when all have been started
    response = complete(http, prompt=["a", "b", "c"])
    assert [c["text"] for c in response.json()["choices"]] == ["a", "b", "c"]
    base = response.json()["id"]
    assert [r[0] for r in model.submitted] == [f"{base}-{i}" for i in range(3)]


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_come_back_if_asked_for(http: httpx.Client, text: Text, stream: bool) -> None:
    ids = asyncio.run(text.encode("🎉 One", context_tokens=256))
    response = complete(http, prompt="🎉 One", return_token_ids=True, stream=stream)
    if stream:
        choices = [event["choices"][0] for event in events(response)]
        assert "prompt_token_ids" not in choices[1]
    else:
        choices = response.json()["choices"]
    assert choices[0]["prompt_token_ids"] == ids
    assert [i for c in choices for i in c["token_ids"]] == [*ids, EOS]


def test_what_a_request_says_of_itself_reaches_the_engine(
    http: httpx.Client, model: EchoModel
) -> None:
    complete(http, prompt=[5000], max_tokens=1, priority=-3, deadline_s=2.5, cache_salt="mine")
    complete(http, prompt=[5000], max_tokens=1)
    assert model.options == [RequestOptions(-3, 2.5, "mine"), NO_OPTIONS]
    for wrong in ({"priority": 1 << 31}, {"deadline_s": 0}, {"cache_salt": ""}):
        refused = http.post("/v1/completions", json={"model": NAME, "prompt": "a", **wrong})
        assert refused.status_code == 400
        assert next(iter(wrong)) in refused.json()["error"]["message"]


def test_ignored_eos_goes_on_to_the_limit(http: httpx.Client, model: EchoModel) -> None:
    body = complete(http, prompt=[5000, EOS], max_tokens=9, ignore_eos=True).json()
    assert body["usage"]["completion_tokens"] == 9
    assert body["choices"][0]["finish_reason"] == "length"
    assert model.submitted[0][2].stop_token_ids == ()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("three", "One two "),
        ([" thr", "four"], "One two"),
        (["nothing", "like it"], "One two three four."),
        (["four.x", "."], "One two three four"),
        ("One", ""),
    ],
)
def test_stop_strings_end_the_text_before_them(
    http: httpx.Client, model: EchoModel, stop: str | list[str], expected: str, stream: bool
) -> None:
    prompt = "One two three four."
    response = complete(http, prompt=prompt, stop=stop, stream=stream, max_tokens=90)
    choices = (
        [c for e in events(response) for c in e["choices"]]
        if stream
        else response.json()["choices"]
    )
    assert "".join(c["text"] for c in choices) == expected
    assert choices[-1]["finish_reason"] == "stop"
    if expected != prompt:
        assert model.aborted.get(timeout=DEADLINE_S) == model.submitted[0][0]


def test_a_stop_string_in_the_middle_of_a_chunk_ends_the_count_there(
    http: httpx.Client, model: EchoModel
) -> None:
    model.tokens_per_chunk = 100
    body = complete(http, prompt="One two three four.", stop=" two", return_token_ids=True).json()
    assert body["choices"][0]["text"] == "One"
    assert body["usage"]["completion_tokens"] == len(body["choices"][0]["token_ids"]) == 2


def test_a_stop_token_is_not_part_of_the_text(http: httpx.Client, text: Text) -> None:
    ids = asyncio.run(text.encode("One two three", context_tokens=256))
    body = complete(http, prompt=ids, stop_token_ids=[ids[2]]).json()
    assert body["choices"][0]["text"] == "One two"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 3


def test_sampling_parameters_arrive(http: httpx.Client, model: EchoModel) -> None:
    complete(http, temperature=0.5, top_p=0.9, top_k=7, seed=-1, max_tokens=3)
    complete(http, top_k=-1)
    complete(http, temperature=None, stop=None, seed=None, stream=False, user="someone")
    given, plain, other = (sampling for _, _, sampling in model.submitted)
    assert given == SamplingParams(
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=(1 << 63) - 1,
        stop_token_ids=ENDS,
    )
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    assert plain.seed != other.seed


# --- chat


def test_a_chat(client: openai.OpenAI, model: EchoModel, text: Text) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "One"}]},
            {"role": "assistant", "content": "Two"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Three"}, {"type": "text", "text": "four"}],
            },
        ],
        max_completion_tokens=3,
        max_tokens=99,
        temperature=0,
    )
    written = text._tokenizer.decode(model.submitted[0][1], skip_special_tokens=False)
    assert written == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne<|im_end|>\n"
        "<|im_start|>assistant\nTwo<|im_end|>\n<|im_start|>user\nThree\nfour<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "system\n"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_a_chat_without_a_limit_may_fill_the_context(http: httpx.Client, model: EchoModel) -> None:
    assert chat(http).status_code == 200
    _, ids, sampling = model.submitted[0]
    assert sampling.max_tokens == FACTS.max_model_len - len(ids)


def test_a_streamed_chat(client: openai.OpenAI, model: EchoModel) -> None:
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Grüße 🎉"}],
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=5,
            extra_body={"ignore_eos": True},
        )
    )
    first, *parts, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == 5
    assert last.usage.prompt_tokens == len(model.submitted[0][1])
    whole = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Grüße 🎉"}],
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert "".join(c.choices[0].delta.content or "" for c in parts) == (
        whole.choices[0].message.content
    )


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_a_chat(http: httpx.Client, model: EchoModel, stream: bool) -> None:
    response = chat(http, return_token_ids=True, max_tokens=4, ignore_eos=True, stream=stream)
    prompt_ids = model.submitted[0][1]
    if stream:
        first, *parts = events(response)
        assert first["prompt_token_ids"] == prompt_ids
        assert all("prompt_token_ids" not in part for part in parts)
        ids = [i for part in parts for i in part["choices"][0]["token_ids"]]
    else:
        assert response.json()["prompt_token_ids"] == prompt_ids
        ids = response.json()["choices"][0]["token_ids"]
    assert ids == prompt_ids[:4]


# --- refused requests


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "end"),
        ("tool_choice", "required"),
        ("skip_special_tokens", False),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    http: httpx.Client, model: EchoModel, name: str, value: Any
) -> None:
    for post in (complete, chat):
        response = post(http, **{name: value})
        assert response.status_code == 400
        error = error_of(response)
        assert error["param"] == name
        assert error["type"] == "invalid_request_error"
        assert "isn't supported" in error["message"]
    assert model.submitted == []


def test_what_asks_for_nothing_is_taken(http: httpx.Client) -> None:
    neutral = {
        "n": 1,
        "logprobs": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": None,
        "response_format": {"type": "text"},
        "echo": False,
        "service_tier": "auto",
        "something_new": [],
    }
    assert complete(http, **neutral).status_code == 200
    assert chat(http, **neutral).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": 7}, "model"),
        ({"model": None}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["ok", ""]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
    ],
)
def test_an_invalid_field_is_named(
    http: httpx.Client, model: EchoModel, fields: dict[str, Any], param: str
) -> None:
    # Python's JSON has NaN and Infinity, which httpx refuses to write.
    content = json.dumps({"model": NAME, "prompt": "One two.", **fields})
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert model.submitted == []


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "messages[1].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content",
        ),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_invalid_messages_are_named(http: httpx.Client, messages: Any, param: str) -> None:
    response = chat(http, messages=messages)
    assert response.status_code == 400
    assert error_of(response)["param"].startswith(param)


def test_a_missing_field_is_named(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": NAME})
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
    response = http.post("/v1/chat/completions", json={"messages": []})
    assert (response.status_code, error_of(response)["param"]) == (400, "model")


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[" * 50_000, b'{"model": "x", "prompt": "\xff"}', b"null", b'"text"', b"[1]"],
)
def test_a_body_that_is_no_request_is_told_so(http: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_half_a_surrogate_is_no_text(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    for path, field, value in (
        ("completions", "prompt", '"a\\ud800b"'),
        ("chat/completions", "messages", '[{"role": "user", "content": "a\\ud800b"}]'),
        ("completions", "suffix", '"\\ud800"'),
    ):
        content = f'{{"model": "org/echo-1", "prompt": "", "{field}": {value}}}'
        response = http.post(f"/v1/{path}", content=content, headers=headers)
        assert (response.status_code, error_of(response)["param"]) == (400, field)
    content = '{"model": "\\ud800", "prompt": "a"}'
    response = http.post("/v1/completions", content=content, headers=headers)
    assert (response.status_code, error_of(response)["param"]) == (400, "model")


def test_only_json_is_taken(http: httpx.Client) -> None:
    content = b'{"model": "org/echo-1", "prompt": "a"}'
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": content_type}
        response = http.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 415
        assert "Content-Type: application/json" in error_of(response)["message"]
    headers = {"Content-Type": "application/json; charset=utf-8", "Origin": "http://elsewhere"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read(http: httpx.Client, chunked: bool) -> None:
    content = json.dumps({"model": NAME, "prompt": "a" * (2 << 20)}).encode()
    body = iter([content[: 1 << 19], content[1 << 19 :]]) if chunked else content
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 413
    assert error_of(response)["type"] == "invalid_request_error"


def test_other_paths_and_methods(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ):
        response = http.request(method, path)
        assert response.status_code == status
        assert path in error_of(response)["message"]


def test_an_unknown_model_is_told_the_known_one(http: httpx.Client) -> None:
    for response in (
        complete(http, model="gpt-7"),
        chat(http, model="gpt-7"),
        http.get("/v1/models/gpt-7"),
    ):
        assert response.status_code == 404
        error = error_of(response)
        assert error["code"] == "model_not_found"
        assert NAME in error["message"]


def test_what_does_not_fit_the_context_is_told_both_figures(http: httpx.Client) -> None:
    response = complete(http, prompt=[500] * 200, max_tokens=57)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert all(figure in error["message"] for figure in ("200", "57", "256"))
    assert complete(http, prompt=[500] * 200, max_tokens=56).status_code == 200
    long_chat = [{"role": "user", "content": "one two " * 200}]
    response = chat(http, messages=long_chat)
    assert error_of(response)["code"] == "context_length_exceeded"
    response = complete(http, prompt="a" * 500_000)
    assert error_of(response)["code"] == "context_length_exceeded"


# --- what happens on the generating side


def test_overload_is_told_before_the_first_byte(http: httpx.Client, model: EchoModel) -> None:
    for stream in (False, True):
        model.refusals = [Overloaded("Too many requests wait.", retry_after_s=7)]
        response = complete(http, stream=stream)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "7"
        assert error_of(response)["code"] == "overloaded"


def test_while_nothing_is_ready(http: httpx.Client, model: EchoModel) -> None:
    model.num_ready = 0
    for response in (complete(http), chat(http, stream=True)):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert error_of(response)["code"] == "not_ready"
    assert http.get("/health").status_code == 503
    assert http.get("/v1/models").json()["data"][0]["id"] == NAME


def test_if_one_of_several_prompts_is_refused_none_goes_on(
    http: httpx.Client, model: EchoModel
) -> None:
    model.refusals = [None, Overloaded("Full.")]
    response = complete(http, prompt=["a", "b", "c"])
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert model.aborted.get(timeout=DEADLINE_S) == model.submitted[0][0]


def test_a_failure_on_the_way_is_an_error_or_an_event(http: httpx.Client, model: EchoModel) -> None:
    model.fail_after = 2
    response = complete(http, max_tokens=9)
    assert response.status_code == 500
    assert error_of(response)["code"] == "instance_failed"
    response = complete(http, max_tokens=9, stream=True)
    assert response.status_code == 200
    *parts, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert "".join(json.loads(p[6:])["choices"][0]["text"] for p in parts) == "One two"
    assert json.loads(last[6:])["error"]["code"] == "instance_failed"
    assert [model.aborted.get(timeout=DEADLINE_S) for _ in range(2)]


def test_the_client_raises_on_a_failure_in_a_stream(
    client: openai.OpenAI, model: EchoModel
) -> None:
    model.fail_after = 2
    messages: list[Any] = [{"role": "user", "content": "One"}]
    stream = client.chat.completions.create(model=NAME, messages=messages, stream=True)
    with pytest.raises(openai.APIError, match="An instance was lost"):
        list(stream)


def test_one_failure_of_several_sequences_ends_all(http: httpx.Client, model: EchoModel) -> None:
    model.fail_after = 2
    response = complete(http, prompt=["a b c d", "a b c d"], stream=True)
    assert response.text.count('{"error"') == 1
    assert "[DONE]" not in response.text
    assert complete(http, prompt=["a b c d", "a b c d"]).status_code == 500
    assert {model.aborted.get(timeout=DEADLINE_S) for _ in range(4)}


def test_a_bug_is_not_shown_to_clients(
    http: httpx.Client, model: EchoModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.refusals = [RuntimeError("secret detail")]
    response = complete(http)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    caplog.clear()
    assert error_of(response)["type"] == "server_error"
    model.fail_after, model.failure = 1, RuntimeError("secret detail")
    response = complete(http, stream=True)
    assert '"error"' in response.text
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_a_stream_ends_its_sequence(
    http: httpx.Client, model: EchoModel, path: str
) -> None:
    model.hold_after = 2
    body = {
        "model": NAME,
        "stream": True,
        **(
            {"prompt": ["One two three", "four five six"]}
            if path == "/v1/completions"
            else {"messages": [{"role": "user", "content": "One two three"}]}
        ),
    }
    with http.stream("POST", path, json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
    ended = {model.aborted.get(timeout=DEADLINE_S) for _ in model.submitted}
    assert ended == {request_id for request_id, _, _ in model.submitted}


def test_a_client_that_leaves_while_it_waits_ends_its_sequence(
    address: str, model: EchoModel
) -> None:
    model.hold_after = 2
    body = json.dumps({"model": NAME, "prompt": ["One two three", "four five six"]}).encode()
    host, port = address.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    begun = threading.Barrier(3)
    model.wait_for = begun
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        begun.wait(DEADLINE_S)  # both sequences run
    ended = {model.aborted.get(timeout=DEADLINE_S) for _ in range(2)}
    assert ended == {request_id for request_id, _, _ in model.submitted}


def test_a_client_that_reads_nothing_more_ends_its_sequence_by_leaving(
    address: str, model: EchoModel
) -> None:
    body = {"model": NAME, "prompt": [500], "max_tokens": 250, "stream": True, "ignore_eos": True}
    for _ in range(3):
        with (
            httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200
    # Each is finished or aborted; `fresh` sees that all were closed.
    with httpx.Client(base_url=address, timeout=DEADLINE_S) as client:
        model.hold_after = 1
        with client.stream("POST", "/v1/completions", json=body):
            pass
    last = model.submitted[-1][0]
    while model.aborted.get(timeout=DEADLINE_S) != last:
        pass


# --- the rest


def test_models(client: openai.OpenAI) -> None:
    [served] = client.models.list().data
    assert (served.id, served.object, served.created) == (NAME, "model", 1_700_000_000)
    assert client.models.retrieve(NAME).id == NAME


def test_health_version_and_description(http: httpx.Client) -> None:
    health = http.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "num_ready": 1})
    assert http.get("/version").json()["version"]
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health"} <= set(paths)
