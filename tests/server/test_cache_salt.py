"""Which requests share a prefix cache."""

import httpx
import pytest

from server.cache_salt import CacheSalts
from server.text.text import Text
from tests.server.echo_model import DEADLINE_S, EchoModel, chat, complete, echo_server


def test_none_leaves_it_to_the_request() -> None:
    salts = CacheSalts("none")
    assert salts.salt("", None) == salts.salt("", "Bearer a") == ""
    assert salts.salt("own", "Bearer a") == "own"


def test_key_parts_keys_and_own_salts_within_them() -> None:
    salts, others = CacheSalts("key"), CacheSalts("key")
    given = [
        (own, header) for own in ("", "own") for header in (None, "Bearer a", "Bearer b", "Basic x")
    ]
    found = {one: salts.salt(*one) for one in given}
    assert len(set(found.values())) == len(given)
    assert all(others.salt(*one) == salt for one, salt in found.items())  # after a restart, too
    assert salts.salt("", "bearer  a ") == found["", "Bearer a"]
    # Nobody can put together another's salt.
    assert salts.salt(found["", "Bearer a"], None) != found["", "Bearer a"]
    assert all("Bearer" not in salt and len(salt) == 64 for salt in found.values())


def test_random_parts_starts_of_the_server() -> None:
    salts, others = CacheSalts("random"), CacheSalts("random")
    assert salts.salt("", "Bearer a") == salts.salt("", None) != others.salt("", None)
    assert salts.salt("own", None) != salts.salt("", None)


@pytest.mark.parametrize("post", [complete, chat])
def test_a_request_gets_the_salt_of_its_key(text: Text, post: object) -> None:
    model, salts = EchoModel(), CacheSalts("key")
    with (
        echo_server(model, text, salts=salts) as address,
        httpx.Client(base_url=address, timeout=DEADLINE_S) as http,
    ):
        for header, own in ((None, ""), ("Bearer a", ""), ("Bearer a", "own")):
            http.headers = httpx.Headers({} if header is None else {"Authorization": header})
            response = post(http, **({"cache_salt": own} if own else {}))  # type: ignore[operator]
            assert response.status_code == 200
            assert model.options[-1].cache_salt == salts.salt(own, header)
