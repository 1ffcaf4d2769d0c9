"""Sampling parameters, several choices, log probabilities and the form of answers over HTTP."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.text.text import Text
from tests.server.echo_model import (
    DEADLINE_S,
    ENDS,
    NAME,
    EchoModel,
    chat,
    complete,
    echo_server,
    error_of,
    events,
)
from workers.messages import GrammarSpec, SamplingParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture(scope="module")
def http(model: EchoModel, text: Text) -> Iterator[httpx.Client]:
    with (
        echo_server(model, text) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def fresh(model: EchoModel) -> Iterator[None]:
    model.reset()
    yield
    assert model.num_open == 0, "a token stream was not closed"


def choices_of(response: httpx.Response, stream: bool) -> list[dict[str, Any]]:
    """All choices; of a stream, all pieces of them, in order."""
    assert response.status_code == 200, response.text
    if not stream:
        choices: list[dict[str, Any]] = response.json()["choices"]
        return choices
    return [choice for event in events(response) for choice in event["choices"]]


def test_all_parameters_arrive(http: httpx.Client, model: EchoModel) -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "allowed_token_ids": [5, 6],
        "seed": 9,
        "min_tokens": 2,
        "max_tokens": 3,
        "prompt_logprobs": 4,
    }
    for post, logprobs in (
        (complete, {"logprobs": 3}),
        (chat, {"logprobs": True, "top_logprobs": 3}),
    ):
        model.reset()
        assert (
            post(http, **asked, **logprobs, logit_bias={"5": -100, "49151": 1.5}).status_code == 200
        )
        ((_, _, sampling),) = model.submitted
        assert sampling == SamplingParams(
            **{**asked, "allowed_token_ids": (5, 6)},
            logit_bias={5: -100.0, 49151: 1.5},
            stop_token_ids=ENDS,
            logprobs=3,
        )
    model.reset()
    assert chat(http, logprobs=True).status_code == 200
    assert model.submitted[0][2].logprobs == 0
    assert chat(http, logprobs=False, top_logprobs=0).status_code == 200
    assert model.submitted[1][2].logprobs is None


# --- several choices


@pytest.mark.parametrize("stream", [False, True])
def test_choices_have_seeds_in_a_row(http: httpx.Client, model: EchoModel, stream: bool) -> None:
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    response = complete(
        http, prompt=["One", "Two three"], n=3, seed=(1 << 63) - 2, stream=stream, **usage
    )
    texts = dict.fromkeys(range(6), "")
    for choice in choices_of(response, stream):
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == ["One"] * 3 + ["Two three"] * 3
    seeds = [sampling.seed for _, _, sampling in model.submitted]
    assert seeds == [(1 << 63) - 2, (1 << 63) - 1, 0] * 2
    told = (events(response)[-1] if stream else response.json())["usage"]
    # A prompt counts once; each choice has an end token of its own.
    assert told == {
        "prompt_tokens": 3,
        "completion_tokens": 15,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 0},
    }

    model.reset()
    response = chat(http, n=2, max_tokens=3, ignore_eos=True, stream=stream)
    answers = {0: "", 1: ""}
    ends = []
    for choice in choices_of(response, stream):
        answers[choice["index"]] += choice["delta" if stream else "message"].get("content") or ""
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert answers[0] == answers[1] != ""
    assert ends == ["length"] * 2
    seeds = [sampling.seed for _, _, sampling in model.submitted]
    assert seeds[1] == seeds[0] + 1


def test_each_choice_has_its_own_end(http: httpx.Client) -> None:
    response = complete(http, prompt=["a b c d", "One"], max_tokens=3, n=2)
    assert [c["finish_reason"] for c in response.json()["choices"]] == ["length"] * 2 + ["stop"] * 2


# --- log probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_completions(http: httpx.Client, text: Text, stream: bool) -> None:
    ids = asyncio.run(text.encode("One 🎉 two", context_tokens=256))
    pieces = choices_of(complete(http, prompt="One 🎉 two", logprobs=2, stream=stream), stream)
    found: dict[str, list[Any]] = {}
    for piece in pieces:
        for name, values in (piece["logprobs"] or {}).items():
            found.setdefault(name, []).extend(values)
    # The end token is no part of the text, and has no entry.
    assert found["token_logprobs"] == [-token / 64 for token in ids]
    assert found["tokens"][0] == "One"
    assert found["tokens"][-1] == " two"
    assert "\ufffd" in "".join(found["tokens"])  # of the character's several tokens, each alone
    # The parts of a character begin where it does.
    assert found["text_offset"] == [0, 3, 3, 3, 5]
    names = [text.tokens(1000)[0], text.tokens(1001)[0]]
    for shown, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top == {names[0]: -1000 / 64, names[1]: -1001 / 64, shown: logprob}
    assert "".join(piece["text"] for piece in pieces) == "One 🎉 two"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_chats(http: httpx.Client, model: EchoModel, stream: bool) -> None:
    response = chat(
        http, logprobs=True, top_logprobs=2, max_tokens=7, ignore_eos=True, stream=stream
    )
    pieces = choices_of(response, stream)
    entries = [entry for piece in pieces for entry in (piece["logprobs"] or {}).get("content", [])]
    assert [entry["logprob"] for entry in entries] == [
        -token / 64 for token in model.submitted[0][1][:7]
    ]
    assert entries[0]["token"] == "<|im_start|>"
    for entry in entries:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-1000 / 64, -1001 / 64]
    response = chat(http, max_tokens=7, stream=stream)
    assert all(piece["logprobs"] is None for piece in choices_of(response, stream))


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_log_probabilities(
    http: httpx.Client, text: Text, stream: bool
) -> None:
    prompt = "One two three"
    ids = asyncio.run(text.encode(prompt, context_tokens=256))
    for given in (prompt, ids):
        for max_tokens, answer in ((0, []), (2, ids[:2])):
            response = complete(
                http, prompt=given, echo=True, logprobs=1, max_tokens=max_tokens, stream=stream
            )
            pieces = choices_of(response, stream)
            assert "".join(piece["text"] for piece in pieces) == prompt + text.decode(answer)
            assert pieces[-1]["finish_reason"] == "length"
            logprobs = [one for piece in pieces for one in piece["logprobs"]["token_logprobs"]]
            assert logprobs == [None, *(-token / 64 for token in [*ids[1:], *answer])]
            offsets = [one for piece in pieces for one in piece["logprobs"]["text_offset"]]
            assert offsets == [0, 3, 7, 13, 16][: len(offsets)]
    body = complete(http, prompt=prompt, echo=True, max_tokens=0).json()
    assert body["choices"][0]["text"] == prompt
    assert body["usage"]["completion_tokens"] == 0


def test_log_probabilities_of_prompts(http: httpx.Client, text: Text) -> None:
    ids = asyncio.run(text.encode("One two", context_tokens=256))
    body = complete(http, prompt="One two", prompt_logprobs=1, n=2).json()
    first, second = (choice["prompt_logprobs"] for choice in body["choices"])
    assert first == second
    assert first[0] is None
    assert first[1] == {
        "1000": {"logprob": -1000 / 64, "rank": 1, "decoded_token": text.tokens(1000)[0]},
        str(ids[1]): {"logprob": -ids[1] / 64, "rank": ids[1] + 1, "decoded_token": " two"},
    }
    body = chat(http, prompt_logprobs=0, max_tokens=1).json()
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert all(len(entry) == 1 for entry in body["prompt_logprobs"][1:])
    assert "prompt_logprobs" not in chat(http, max_tokens=1).json()


def test_no_stop_string_ends_the_least_length(http: httpx.Client) -> None:
    prompt = "One two One two One two"
    body = complete(http, prompt=prompt, stop="two", min_tokens=3, max_tokens=90).json()
    assert body["choices"][0]["text"] == "One two One "


# --- the form of answers


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA},
                }
            },
            "json_schema",
            SCHEMA,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["é", "b"]}}, "choice", ["é", "b"]),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", ["a"]),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
def test_what_an_answer_must_match_arrives(
    http: httpx.Client, model: EchoModel, fields: dict[str, Any], kind: Any, source: Any
) -> None:
    for post in (complete, chat):
        model.reset()
        assert post(http, **fields).status_code == 200
        grammar = model.submitted[0][2].grammar
        if kind is None:
            assert grammar is None
            continue
        assert isinstance(grammar, GrammarSpec)
        assert grammar.kind == kind
        told = grammar.source
        assert (json.loads(told) if isinstance(source, dict | list) else told) == source


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not JSON"),
        ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs", "type: x"),
        ({"structured_outputs": {}}, "structured_outputs", "names no form"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exclude"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs", "'backend' isn't known"),
        ({"guided_choice": []}, "guided_choice", "between 1 and"),
        ({"guided_grammar": "start: other"}, "guided_grammar", "other"),
        ({"guided_regex": "a" * 65_537}, "guided_regex", "65537 bytes"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "exclude",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs 'json_schema'"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"response_format": "json"}, "response_format", "dictionary"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"n": 2, "best_of": 3}, "best_of", "isn't supported"),
        ({"min_p": 1.1}, "min_p", "less than"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"presence_penalty": 2.1}, "presence_penalty", "less than"),
        ({"frequency_penalty": "1"}, "frequency_penalty", "valid number"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "match pattern"),
        ({"logit_bias": {"49152": 1}}, "logit_bias", "too large"),
        ({"logit_bias": {str(one): 1 for one in range(1025)}}, "logit_bias", "at most 1024"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ({"allowed_token_ids": [49152]}, "allowed_token_ids", "too large"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens", "no more than 3"),
        ({"min_tokens": -1}, "min_tokens", "greater than"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ],
)
def test_what_is_wrong_is_named(
    http: httpx.Client, model: EchoModel, fields: dict[str, Any], param: str, message: str
) -> None:
    for post in (complete, chat):
        response = post(http, **fields)
        assert response.status_code == 400
        error = error_of(response)
        assert error["param"].startswith(param)
        assert message in error["message"]
        assert error["type"] == "invalid_request_error"
    assert model.submitted == []


@pytest.mark.parametrize(
    ("post", "fields", "param"),
    [
        (complete, {"logprobs": True}, "logprobs"),
        (complete, {"logprobs": 21}, "logprobs"),
        (complete, {"max_tokens": 0}, "max_tokens"),
        (complete, {"prompt": ["a"] * 65, "n": 2}, "n"),
        (chat, {"logprobs": 2}, "logprobs"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"echo": True}, "echo"),
    ],
)
def test_what_is_wrong_for_one_endpoint_is_named(
    http: httpx.Client, model: EchoModel, post: Any, fields: dict[str, Any], param: str
) -> None:
    response = post(http, **fields)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert model.submitted == []


def test_half_a_surrogate_is_no_grammar(http: httpx.Client, model: EchoModel) -> None:
    for field, value in (
        ("guided_regex", '"a\\ud800"'),
        ("guided_choice", '["\\ud800"]'),
        ("guided_json", '{"const": "\\ud800"}'),
        ("structured_outputs", '{"grammar": "\\ud800"}'),
    ):
        content = f'{{"model": "{NAME}", "prompt": "a", "{field}": {value}}}'
        headers = {"Content-Type": "application/json"}
        response = http.post("/v1/completions", content=content, headers=headers)
        assert (response.status_code, error_of(response)["param"]) == (400, field)
    assert model.submitted == []


def test_the_official_client_reads_what_comes(http: httpx.Client) -> None:
    base_url = str(http.base_url.join("/v1"))
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "One"}],
            logprobs=True,
            top_logprobs=1,
            n=2,
            max_tokens=2,
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[1].logprobs is not None
        assert answer.choices[1].logprobs.content is not None
        assert answer.choices[1].logprobs.content[0].top_logprobs[0].logprob == -1000 / 64
        completion = client.completions.create(model=NAME, prompt="One two", logprobs=1, n=2)
        assert completion.choices[1].logprobs is not None
        assert completion.choices[1].logprobs.tokens == ["One", " two"]
