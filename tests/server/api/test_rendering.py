"""A large answer is the JSON that a small one is, and others are answered while it is written."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.openai.logprobs import CompletionLogprobs, PromptLogprob
from server.api.openai.rendering import json_of, response
from server.api.openai.replies import Completion, CompletionChoice, Usage
from server.text.text import Text
from tests.server.echo_model import DEADLINE_S, NAME, EchoModel, echo_server, events


@pytest.fixture(scope="module")
def http(text: Text) -> Iterator[httpx.Client]:
    with (
        echo_server(EchoModel(), text) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
    ):
        yield client


choices = st.lists(
    st.builds(
        CompletionChoice,
        index=st.integers(0, 9),
        text=st.text(max_size=9),
        finish_reason=st.sampled_from(["stop", None]),
        token_ids=st.none() | st.lists(st.integers(0, 9), max_size=200),
        logprobs=st.none()
        | st.builds(
            CompletionLogprobs,
            tokens=st.lists(st.text(max_size=3), max_size=70),
            top_logprobs=st.lists(
                st.none() | st.dictionaries(st.text(max_size=2), st.floats(-9, 0), max_size=2),
                max_size=70,
            ),
        ),
        prompt_logprobs=st.none()
        | st.lists(
            st.none()
            | st.dictionaries(
                st.integers(0, 9).map(str),
                st.builds(
                    PromptLogprob,
                    logprob=st.floats(-9, 0),
                    rank=st.none() | st.integers(1, 9),
                    decoded_token=st.text(max_size=3),
                ),
                max_size=2,
            ),
            max_size=70,
        ),
    ),
    max_size=3,
)


@given(choices, st.booleans())
def test_pieces_make_the_same_json(made: list[CompletionChoice], with_usage: bool) -> None:
    usage = Usage.of(3, 4, 0) if with_usage else None
    reply = Completion(id="é", created=1, model="m", choices=made, usage=usage)
    assert json.loads(json_of(reply)) == json.loads(reply.model_dump_json())


def test_the_event_loop_goes_on_while_a_large_answer_is_written() -> None:
    entry = {str(n): PromptLogprob(logprob=-1.0, rank=n, decoded_token="a") for n in range(20)}

    def made() -> Completion:
        choice = CompletionChoice(index=0, text="", prompt_logprobs=[entry] * 5000)
        return Completion(id="a", created=1, model="m", choices=[choice])

    async def work() -> int:
        num_turns = 0
        writing = asyncio.create_task(response(made, 5000))
        while not writing.done():
            await asyncio.sleep(0)
            num_turns += 1
        assert len(writing.result().body) > 1_000_000
        return num_turns

    assert asyncio.run(work()) > 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_answer_is_whole(http: httpx.Client, stream: bool) -> None:
    prompt = [[500 + number for number in range(250)]] * 20
    fields: dict[str, Any] = {"max_tokens": 2, "echo": True, "logprobs": 20, "stream": stream}
    answer = http.post("/v1/completions", json={"model": NAME, "prompt": prompt, **fields})
    found = (
        [choice for event in events(answer) for choice in event["choices"]]
        if stream
        else answer.json()["choices"]
    )
    assert sum(len(one["logprobs"]["tokens"]) for one in found) == 20 * 252
