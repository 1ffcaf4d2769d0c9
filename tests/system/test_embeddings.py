"""MiniLM over REST, on two instances: what a user of the API relies on."""

import base64
import json
import os
import signal
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.system.running_server import TIMEOUT_S, Server

SENTENCES = [
    "A man is eating food.",
    "What is the capital of France?",
    "The stock market fell sharply today, and nobody could say why it had.",
    "Grüße aus 東京! 🎉",
    "word " * 200,
]
SIZE = 384


@pytest.fixture(scope="module")
def server(make_server: Callable[..., Server], minilm: Path) -> Iterator[Server]:
    started = make_server(str(minilm), "--instances", "2", "--served-model-name", "org/minilm")
    yield started
    started.remember()
    started.stop()


@pytest.fixture(scope="module")
def reference(minilm: Path) -> list[tuple[list[int], list[float]]]:
    """Ids and vector of each sentence, by transformers alone."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32, attn_implementation="eager")
    found = []
    for sentence in SENTENCES:
        inputs = tokenizer(sentence, return_tensors="pt")
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].mean(dim=0)
        found.append((inputs.input_ids[0].tolist(), (mean / mean.norm()).tolist()))
    return found


def embed(server: Server, given: Any, **fields: Any) -> Any:
    """By the official client, which asks for base64 unless told otherwise."""
    return server.client().embeddings.create(model="org/minilm", input=given, **fields)


def post(server: Server, **fields: Any) -> httpx.Response:
    body = {"model": "org/minilm", "input": "One.", **fields}
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=TIMEOUT_S)


def near(expected: list[float]) -> Any:
    return pytest.approx(expected, abs=1e-5)


def test_vectors_are_those_of_transformers(
    server: Server, reference: list[tuple[list[int], list[float]]]
) -> None:
    answer = embed(server, SENTENCES)
    assert answer.object == "list"
    assert answer.model == "org/minilm"
    assert [one.index for one in answer.data] == list(range(len(SENTENCES)))
    num_tokens = sum(len(ids) for ids, _ in reference)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
    for one, (_, vector) in zip(answer.data, reference, strict=True):
        assert one.object == "embedding"
        assert one.embedding == near(vector)


def test_every_form_of_input_and_output_gives_the_same(
    server: Server, reference: list[tuple[list[int], list[float]]]
) -> None:
    ids, vector = reference[1]
    for given in (SENTENCES[1], [SENTENCES[1]], ids, [ids]):
        for encoding_format in ("float", "base64"):
            answer = post(server, input=given, encoding_format=encoding_format).json()
            [item] = answer["data"]
            found = item["embedding"]
            if encoding_format == "base64":
                found = array("f", base64.b64decode(found)).tolist()
            assert found == near(vector)
    several = embed(server, [ids, reference[0][0]], encoding_format="float")
    assert several.data[1].embedding == near(reference[0][1])


def test_fewer_dimensions_are_the_first_ones_normalized(
    server: Server, reference: list[tuple[list[int], list[float]]]
) -> None:
    short = reference[0][1][:16]
    norm = sum(number * number for number in short) ** 0.5
    found = embed(server, SENTENCES[0], dimensions=16).data[0].embedding
    assert found == near([number / norm for number in short])


def test_many_texts_of_many_requests_do_not_change_each_other(
    server: Server, reference: list[tuple[list[int], list[float]]]
) -> None:
    """Each in another order, at once; more parts than instances take at a time."""
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        given = [SENTENCES[(index + number) % 4] for index in range(100)]
        answers[number] = embed(server, given)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(answers) == [0, 1, 2, 3]
    for number, answer in answers.items():
        for index, one in enumerate(answer.data):
            assert one.embedding == near(reference[(index + number) % 4][1])


def test_a_long_text_is_refused_with_the_limit_unless_it_may_be_cut(server: Server) -> None:
    long = "word " * 300
    refused = post(server, input=["ok", long])
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"] == (
        "The input of index 1 has 302 tokens, and the model takes at most 256. Shorten it, or set "
        "'truncate_prompt_tokens' to -1."
    )
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    cut = post(server, input=["ok", long], truncate_prompt_tokens=-1).json()
    assert cut["usage"]["prompt_tokens"] == 3 + 256
    [kept] = embed(server, "word " * 254).data
    assert cut["data"][1]["embedding"] == near(kept.embedding)


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": [[]]}, "input", "no tokens"),
        ({"input": ["ok", ""]}, "input", "empty"),
        ({"input": [30522]}, "input", "30522"),
        ({"input": [-1]}, "input", "0"),
        ({"input": {"text": "ok"}}, "input", "valid"),
        ({"input": ["ok"] * 2049}, "input", "2048"),
        ({"dimensions": SIZE + 1}, "dimensions", "384"),
        ({"dimensions": 0}, "dimensions", "1"),
        ({"encoding_format": "int8"}, "encoding_format", "base64"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "256"),
        ({"truncate_prompt_tokens": 2}, "truncate_prompt_tokens", "special"),
        ({"normalize": False}, "normalize", "supported"),
    ],
)
def test_what_is_wrong_is_named(
    server: Server, fields: dict[str, Any], param: str, named: str
) -> None:
    answer = post(server, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert named in error["message"]


def test_each_model_refuses_what_it_is_not_for(server: Server, demo: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="makes embeddings, and generates no text"):
        client.chat.completions.create(
            model="org/minilm", messages=[{"role": "user", "content": "Hello"}]
        )
    with pytest.raises(openai.BadRequestError, match="makes embeddings, and generates no text"):
        client.completions.create(model="org/minilm", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="generates text, and makes no embeddings"):
        demo.client().embeddings.create(model=demo.model, input="Hello")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="Hello")
    [listed] = httpx.get(f"{server.url}/v1/models", timeout=TIMEOUT_S).json()["data"]
    assert (listed["id"], listed["max_model_len"], listed["task"]) == ("org/minilm", 256, "embed")


def test_the_curl_line_that_is_printed_embeds(server: Server) -> None:
    assert "/v1/embeddings" in server.try_line


def test_one_copy_holds_and_a_killed_instance_loses_no_request(
    server: Server, reference: list[tuple[list[int], list[float]]]
) -> None:
    answers: list[Any] = []
    given = [*SENTENCES[:4], "another text, which is here many times over"] * 100
    asking = threading.Thread(target=lambda: answers.append(embed(server, given)))
    asking.start()
    busy = server.wait_instances(
        lambda found: len(found) == 2 and all(one["num_requests"] for one in found), "work on both"
    )
    os.kill(busy[0]["pid"], signal.SIGKILL)
    asking.join(TIMEOUT_S)
    [answer] = answers
    for index, one in enumerate(answer.data):
        if index % 5 < 4:
            assert one.embedding == near(reference[index % 5][1])
    instances = server.wait_instances(
        lambda found: (
            [one["state"] for one in found] == ["ready"] * 2
            and busy[0]["name"] not in {one["name"] for one in found}
        ),
        "a replacement",
    )
    assert instances[-1]["loaded"] is False
    outcome = server.onecopy("verify", "--json")
    assert outcome.stdout, outcome.stderr
    verdict = json.loads(outcome.stdout)
    assert outcome.status == 0, verdict["problems"]
    assert verdict["holds"]
    assert verdict["weights_pss_bytes"] <= verdict["weights_bytes"] + (1 << 20)
    assert verdict["unshared_bytes"] - verdict["total_bytes"] == verdict["weights_bytes"]


@pytest.mark.parametrize("command", ["reload", "sleep"])
def test_a_request_of_many_parts_is_answered_whole(server: Server, command: str) -> None:
    """Parts that are on no instance yet are part of it as well."""
    inputs = [f"{number} " + "word " * 120 for number in range(160)]
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(embed, server, inputs)
        server.wait_instances(lambda all: any(one["num_requests"] for one in all), "some part")
        assert not asking.done()
        done = server.onecopy(command)
        assert done.status == 0, done.stderr
        vectors = [one.embedding for one in asking.result(TIMEOUT_S).data]
    if command == "sleep":
        assert server.onecopy("wake").status == 0
    assert len(vectors) == len(inputs)
    assert vectors[7] == near(embed(server, inputs[7]).data[0].embedding)
