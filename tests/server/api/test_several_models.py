"""A server with two models: each request goes to the one that it names."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.text.text import Text
from tests.server.echo_model import DEADLINE_S, NAME, EchoModel, complete, echo_server, error_of

OTHER = "org/echo-2"


@pytest.fixture
def models() -> dict[str, EchoModel]:
    return {NAME: EchoModel(), OTHER: EchoModel()}


@pytest.fixture
def http(models: dict[str, EchoModel], tokenizer_dir: Path) -> Iterator[httpx.Client]:
    text = Text.load(tokenizer_dir)
    with (
        echo_server(models[NAME], text, others={OTHER: models[OTHER]}) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as client,
    ):
        yield client
    text.close()


def test_a_request_goes_to_the_model_that_it_names(
    http: httpx.Client, models: dict[str, EchoModel]
) -> None:
    for name in (OTHER, NAME, OTHER):
        answer = complete(http, model=name, max_tokens=3)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
    assert [len(models[name].submitted) for name in (NAME, OTHER)] == [1, 2]


def test_all_are_listed_and_an_unknown_one_is_refused_with_their_names(http: httpx.Client) -> None:
    assert [one["id"] for one in http.get("/v1/models").json()["data"]] == [NAME, OTHER]
    assert http.get(f"/v1/models/{OTHER}").json()["id"] == OTHER
    answer = complete(http, model="gpt-7")
    assert answer.status_code == 404
    assert f"{NAME!r}, {OTHER!r}" in error_of(answer)["message"]


def test_one_that_is_not_ready_does_not_keep_the_other_from_answering(
    http: httpx.Client, models: dict[str, EchoModel]
) -> None:
    models[OTHER].num_ready = 0
    assert complete(http, max_tokens=3).status_code == 200
    assert complete(http, model=OTHER, max_tokens=3).status_code == 503
    assert http.get("/health").json() == {"status": "ok", "num_ready": 1}
    models[NAME].num_ready = 0
    assert http.get("/health").status_code == 503
