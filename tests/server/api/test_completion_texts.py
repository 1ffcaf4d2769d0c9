"""What a completion shows is what its prompt and its tokens are decoded to together."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.text.chat_template import ChatTemplate
from server.text.text import Text
from tests.server.echo_model import (
    DEADLINE_S,
    EOS,
    FACTS,
    EchoModel,
    chat,
    complete,
    echo_server,
    error_of,
    events,
)
from tests.server.text.sentencepiece_tokenizer import sentencepiece_tokenizer

BOS = 1
BREAK, TURN = "<|end|>", "<|turn|>"


@pytest.fixture(scope="module")
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Text]:
    folder = tmp_path_factory.mktemp("words")
    sentencepiece_tokenizer(BREAK, TURN).save(str(folder / "tokenizer.json"))
    loaded = Text.load(folder)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def http(model: EchoModel, words: Text) -> Iterator[httpx.Client]:
    with (
        echo_server(model, words) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def fresh(model: EchoModel) -> None:
    model.reset()


def joined(response: httpx.Response, stream: bool) -> tuple[str, dict[str, list[Any]], str]:
    """The text, its log probabilities, and how it ended."""
    assert response.status_code == 200, response.text
    if stream:
        pieces = [choice for event in events(response) for choice in event["choices"]]
    else:
        pieces = response.json()["choices"]
    logprobs: dict[str, list[Any]] = {}
    for piece in pieces:
        for name, values in (piece["logprobs"] or {}).items():
            logprobs.setdefault(name, []).extend(values)
    return "".join(piece["text"] for piece in pieces), logprobs, pieces[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    "prompt",
    [
        "the cat sat on the",
        "the",
        " the cat",
        "the cat ",
        "cat\n\n",
        "日本語、日本語、日本語、日本語",
        "mat 🎉",
        "é",
    ],
)
def test_text_goes_on_where_its_prompt_ended(
    http: httpx.Client, words: Text, prompt: str, echo: bool, stream: bool
) -> None:
    ids = asyncio.run(words.encode(prompt, context_tokens=256))
    assert ids[0] == BOS
    for given in (prompt, ids):
        response = complete(
            http,
            prompt=given,
            echo=echo,
            logprobs=1,
            stream=stream,
            max_tokens=2 * len(ids),
            ignore_eos=True,
        )
        text, logprobs, _ = joined(response, stream)
        both = words.decode([*ids, *ids, *ids])
        if isinstance(given, str) and words.decode(ids) != given:  # a blank in front is dropped
            both = both.replace(words.decode(ids), given, 1)
        shown_of_prompt = len(given) if isinstance(given, str) else len(words.decode(ids))
        assert text == (both if echo else both[shown_of_prompt:])
        whole = 0
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if token and "\ufffd" not in token and token not in ("<s>", "</s>"):
                whole += 1
                at = text[offset : offset + len(token)]
                assert at == token or (offset == 0 and text.startswith(token.lstrip(" ")))
        assert whole


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_a_character_may_begin_in_the_prompt_and_end_in_the_answer(
    http: httpx.Client, words: Text, num_bytes: int, echo: bool
) -> None:
    """The model repeats what it is given: the rest of a character, a word, and its begin."""
    byte_ids = asyncio.run(words.encode("🎉", context_tokens=99))[-4:]
    word = asyncio.run(words.encode("the", context_tokens=99))[1:]
    prompt = [*byte_ids[num_bytes:], *word, *byte_ids[:num_bytes]]
    response = complete(
        http, prompt=prompt, echo=echo, max_tokens=len(prompt), ignore_eos=True, logprobs=0
    )
    text, logprobs, _ = joined(response, False)
    both = words.decode([*prompt, *prompt])
    assert both.count("🎉") == 1
    assert text == (both if echo else both[both.index("🎉") :])
    places = dict(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))
    assert places[" the"] == text.rindex(" the")


# --- lengths


@pytest.mark.parametrize(("num_prompt", "num_answer"), [(10, 16), (241, 15), (250, 6), (255, 1)])
def test_the_length_that_nobody_asked_for_fits(
    http: httpx.Client, model: EchoModel, num_prompt: int, num_answer: int
) -> None:
    response = complete(http, prompt=[300] * num_prompt, ignore_eos=True)
    assert response.json()["usage"]["completion_tokens"] == num_answer
    assert complete(http, prompt=[300] * FACTS.max_model_len).status_code == 400
    refused = error_of(complete(http, prompt=[300] * num_prompt, max_tokens=300))
    assert refused["code"] == "context_length_exceeded"
    assert "max_tokens is 300" in refused["message"]


@pytest.mark.parametrize("num_prompt", [1, 2, 100, FACTS.max_model_len])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_up_to_the_whole_context(
    http: httpx.Client, words: Text, num_prompt: int, stream: bool
) -> None:
    ids = [300 + number % 40 for number in range(num_prompt)]
    response = complete(http, prompt=ids, echo=True, max_tokens=0, logprobs=2, stream=stream)
    text, logprobs, reason = joined(response, stream)
    assert text == words.decode(ids)
    assert reason == "length"
    assert logprobs["token_logprobs"] == [None, *(-token / 64 for token in ids[1:])]
    assert None not in logprobs["top_logprobs"][1:]
    if not stream:
        assert response.json()["usage"]["prompt_tokens"] == num_prompt
        assert response.json()["usage"]["completion_tokens"] == 0


def test_a_prompt_beyond_the_context_is_not_scored(http: httpx.Client) -> None:
    prompt = [300] * (FACTS.max_model_len + 1)
    response = complete(http, prompt=prompt, echo=True, max_tokens=0, logprobs=0)
    assert error_of(response)["code"] == "context_length_exceeded"


# --- special tokens


@pytest.mark.parametrize(
    ("asked", "num_of_prompt", "num_of_chat"),
    [({}, 2, 0), ({"add_special_tokens": True}, 2, 1), ({"add_special_tokens": False}, 1, 0)],
)
def test_special_tokens_are_added_as_asked_for(
    words: Text, model: EchoModel, asked: dict[str, bool], num_of_prompt: int, num_of_chat: int
) -> None:
    templated = Text(
        sentencepiece_tokenizer(), chat_template=ChatTemplate("{{ messages[0].content }}")
    )
    with (
        echo_server(model, templated) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
    ):
        assert complete(client, prompt="<s>hello", **asked).status_code == 200
        assert chat(client, **asked).status_code == 200
    templated.close()
    of_prompt, of_chat = (ids for _, ids, _ in model.submitted)
    assert of_prompt.count(BOS) == num_of_prompt
    assert of_chat.count(BOS) == num_of_chat


@pytest.mark.parametrize(
    ("stop", "shown", "reason"),
    [
        ([BREAK], " cat", "stop"),
        ([TURN], " cat sat mat", "length"),
        ([f"t{BREAK}"], " ca", "stop"),
        ([f"{BREAK} sat"], " cat", "stop"),
        ([f"{BREAK} mat"], " cat sat mat", "length"),
        ([f"cat{BREAK} sat m"], " ", "stop"),
        ([f"{BREAK}{TURN}"], " cat sat mat", "length"),
        (["sat", BREAK], " cat", "stop"),
        (["t s"], " ca", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_may_name_special_tokens(
    http: httpx.Client, words: Text, stop: list[str], shown: str, reason: str, stream: bool
) -> None:
    ids = asyncio.run(words.encode("cat", context_tokens=9))[1:]
    ids = [*ids, words.special_ids[BREAK]]
    ids += [
        token
        for word in ("sat", "mat")
        for token in asyncio.run(words.encode(word, context_tokens=9))[1:]
    ]
    response = complete(
        http, prompt=ids, stop=stop, max_tokens=len(ids), ignore_eos=True, stream=stream
    )
    text, _, ended = joined(response, stream)
    assert (text, ended) == (shown, reason)


def test_a_stop_string_that_is_a_special_token_is_one_for_the_instance(
    http: httpx.Client, model: EchoModel, words: Text
) -> None:
    named = words.special_ids[BREAK]
    assert complete(http, stop=["x", BREAK]).status_code == 200
    assert complete(http, stop=BREAK, ignore_eos=True, max_tokens=1).status_code == 200
    assert [one.stop_token_ids for _, _, one in model.submitted] == [(named,), (named,)]
    assert named != EOS
