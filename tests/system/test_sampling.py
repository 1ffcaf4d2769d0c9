"""What a request says of its answer, with the demo model and the official client."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.system.running_server import Server

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "address": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "tags": {"type": "array", "items": {"enum": ["home", "work"]}, "maxItems": 2},
            },
            "required": ["city", "tags"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
}


def ask(demo: Server, text: str, **fields: Any) -> Any:
    """The answer's choice, or its choices where several are asked for."""
    messages: list[Any] = [{"role": "user", "content": text}]
    answer = demo.client().chat.completions.create(model=demo.model, messages=messages, **fields)
    return answer.choices if "n" in fields else answer.choices[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_matches_its_schema(demo: Server, temperature: float) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    choice = ask(
        demo,
        "Describe a person as JSON.",
        response_format=schema,
        temperature=temperature,
        seed=4,
        max_tokens=300,
    )
    assert choice.finish_reason == "stop"
    person = json.loads(choice.message.content)
    assert person.keys() == PERSON["properties"].keys()
    assert 0 <= person["age"] <= 150
    assert person["address"].keys() == {"city", "tags"}
    assert set(person["address"]["tags"]) <= {"home", "work"}


def test_an_answer_matches_its_expression_choice_or_grammar(demo: Server) -> None:
    """Beside each other, and beside an answer that may be anything."""
    number = re.compile(r"\+[0-9]{2} [0-9]{3}-[0-9]{4}")
    grammar = 'start: WORD ("-" WORD)+ "!"\nWORD: /[a-z]{2,5}/'
    forms: list[dict[str, Any] | None] = [
        {"regex": number.pattern},
        {"choice": ["definitely", "never"]},
        {"grammar": grammar},
        None,
    ]
    with ThreadPoolExecutor(len(forms)) as threads:
        answers = list(
            threads.map(
                lambda form: ask(
                    demo,
                    "What is your phone number?",
                    temperature=0.8,
                    seed=1,
                    max_tokens=100,
                    extra_body={"structured_outputs": form} if form else {},
                ),
                forms,
            )
        )
    texts = [one.message.content for one in answers]
    assert number.fullmatch(texts[0])
    assert texts[1] in ("definitely", "never")
    assert (
        re.fullmatch(r"[a-z]{2,5}(-[a-z]{2,5})+!", texts[2]) or answers[2].finish_reason == "length"
    )
    assert [one.finish_reason for one in answers[:2]] == ["stop"] * 2


def test_a_streamed_answer_matches_too(demo: Server) -> None:
    stream = demo.client().completions.create(
        model=demo.model,
        prompt="Three numbers: ",
        temperature=0,
        stream=True,
        extra_body={"guided_regex": "[0-9]{3}(, [0-9]{3}){2}"},
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert re.fullmatch("[0-9]{3}(, [0-9]{3}){2}", text)


def test_what_no_text_can_match_is_refused_before_it_begins(demo: Server) -> None:
    for fields, message in (
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "type",
        ),
        ({"extra_body": {"guided_regex": "["}}, "unclosed"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=message):
                ask(demo, "Hello", stream=stream, **fields)
    with pytest.raises(openai.BadRequestError, match="no token to choose"):
        ask(demo, "Hello", extra_body={"guided_regex": "a", "allowed_token_ids": [5]})


def test_log_probabilities_add_up(demo: Server) -> None:
    client, prompt = demo.client(), "The capital of France is"
    common: dict[str, Any] = {"model": demo.model, "temperature": 0, "logprobs": 5}
    ids = {"return_token_ids": True}
    first = client.completions.create(prompt=prompt, max_tokens=4, extra_body=ids, **common)
    (choice,) = first.choices
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    for logprob, top in zip(
        choice.logprobs.token_logprobs or [], choice.logprobs.top_logprobs or [], strict=True
    ):
        assert logprob == max(top.values())  # greedy
        assert sum(map(math.exp, top.values())) <= 1 + 1e-3
    # What was said of the tokens as they were chosen is said of them as part of a prompt.
    whole = [*choice.prompt_token_ids, *choice.token_ids]
    second = client.completions.create(prompt=whole, max_tokens=0, echo=True, **common)
    echoed = second.choices[0].logprobs
    assert echoed is not None
    assert second.choices[0].text == prompt + choice.text
    assert (echoed.tokens or [])[-4:] == choice.logprobs.tokens
    again = (echoed.token_logprobs or [])[-4:]
    assert again == pytest.approx(choice.logprobs.token_logprobs, abs=0.1)  # made in bfloat16


def test_choices_are_those_of_their_seeds(demo: Server) -> None:
    common: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}
    together = [one.message.content for one in ask(demo, "Tell a joke.", n=3, seed=20, **common)]
    assert len(set(together)) == 3
    alone = [ask(demo, "Tell a joke.", seed=20 + one, **common).message.content for one in range(3)]
    assert alone[0] == together[0]  # further ones may round otherwise in company


def test_penalties_and_biases_change_what_is_said(demo: Server) -> None:
    client = demo.client()
    common: dict[str, Any] = {"model": demo.model, "prompt": "a a a a a a", "temperature": 0}
    plain, penalized = (
        client.completions.create(**common, max_tokens=24, extra_body=extra)
        for extra in ({}, {"frequency_penalty": 2.0, "repetition_penalty": 1.5})
    )

    def distinct(text: str) -> int:
        return len(set(text.split()))

    assert distinct(penalized.choices[0].text) > distinct(plain.choices[0].text)
    biased = client.completions.create(**common, max_tokens=5, logit_bias={"28": 100})
    assert biased.choices[0].text == "," * 5
    longer = client.completions.create(
        model=demo.model,
        prompt="Hi",
        temperature=0,
        max_tokens=30,
        logit_bias={"2": 100},  # its end token
        extra_body={"min_tokens": 7},
    )
    assert longer.usage is not None
    assert longer.usage.completion_tokens == 8
    assert longer.choices[0].finish_reason == "stop"
