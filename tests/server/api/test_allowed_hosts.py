"""A web page whose name was made to point here is refused; who means this server is not."""

from collections.abc import Iterator

import httpx
import pytest

from server.api.allowed_hosts import AllowedHosts
from server.text.text import Text
from tests.server.echo_model import DEADLINE_S, EchoModel, complete, echo_server, error_of

LOCAL = ("localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1:8000", "127.3.2.1")
LOCAL_6 = ("[::1]", "[::1]:8000")
NAMES = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example")
ADDRESSES = ("10.1.2.3:8000", "192.168.1.5", "[2001:db8::1]:8000")


@pytest.mark.parametrize(
    ("bound", "allowed", "yes", "no"),
    [
        ("127.0.0.1", (), (*LOCAL, *LOCAL_6), (*NAMES, *ADDRESSES, "", "0.0.0.0", "a:b:c")),
        ("localhost", (), (*LOCAL, *LOCAL_6), (*NAMES, *ADDRESSES)),
        ("::1", (), (*LOCAL, *LOCAL_6), (*NAMES, *ADDRESSES)),
        ("0.0.0.0", (), (*LOCAL, *LOCAL_6, *ADDRESSES), NAMES),
        ("::", (), (*LOCAL, *LOCAL_6, *ADDRESSES), NAMES),
        ("10.1.2.3", (), (*LOCAL, *ADDRESSES), NAMES),
        ("box.example", (), ("box.example:8000", *LOCAL, *ADDRESSES), NAMES),
        ("127.0.0.1", ("api.example",), ("api.example", "API.example.:1"), ("b.example", *NAMES)),
        ("0.0.0.0", ("*.example",), ("a.example", "evil.example", "x.y.example"), ("example",)),
        ("127.0.0.1", ("*",), (*LOCAL, *NAMES, *ADDRESSES), ()),
    ],
)
def test_names(
    bound: str, allowed: tuple[str, ...], yes: tuple[str, ...], no: tuple[str, ...]
) -> None:
    hosts = AllowedHosts(bound, allowed)
    assert [one for one in yes if not hosts.allows(one)] == []
    assert [one for one in no if hosts.allows(one)] == []


def test_the_machines_own_name_may_be_used_where_others_can_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box.example")
    for name in ("box.example", "box", "BOX:8000"):
        assert AllowedHosts("0.0.0.0").allows(name)
        assert not AllowedHosts("127.0.0.1").allows(name)


@pytest.fixture(scope="module")
def address(text: Text) -> Iterator[str]:
    async def metrics() -> bytes:
        return b"# metrics"

    options = {"allowed_hosts": AllowedHosts("127.0.0.1"), "metrics": metrics}
    with echo_server(EchoModel(), text, app_options=options) as address:
        yield address


def test_every_path_is_kept_from_other_names(address: str) -> None:
    with httpx.Client(base_url=address, timeout=DEADLINE_S) as http:
        assert complete(http).status_code == 200
        for path in ("/health", "/metrics", "/v1/models", "/version", "/openapi.json", "/nothing"):
            assert http.get(path).status_code == (404 if path == "/nothing" else 200)
            refused = http.get(path, headers={"Host": "evil.example"})
            assert refused.status_code == 421
            error = error_of(refused)
            assert error["code"] == "host_not_allowed"
            assert "evil.example" in error["message"]
            assert "--allowed-host" in error["message"]
        refused = http.post("/v1/completions", json={}, headers={"Host": "evil.example"})
        assert refused.status_code == 421
