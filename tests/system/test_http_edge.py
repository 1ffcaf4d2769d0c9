"""What clients do to a real server: grammars, bodies, connections and floods, and who notices."""

import contextlib
import json
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.grammar_corpus import CASES
from tests.system.running_server import TIMEOUT_S, Server, wait_until
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

NUM_DESCRIPTORS = 400
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)


@pytest.fixture
def http(demo: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.url, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for tests of connections, to which it does not matter."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_tokenizer(write_checkpoint(folder, "llama"))


@pytest.fixture(scope="module")
def strict(make_server: Callable[..., Server], tiny: Path) -> Iterator[Server]:
    """A server that has one name more, and shares prefixes by key."""
    options = ("--allowed-host", "api.example", "--prefix-cache-salt", "key")
    server = make_server(str(tiny), "--instances", "1", *options)
    yield server
    server.remember()
    server.stop()


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_grammars_that_are_too_much_end_nothing(demo: Server, http: httpx.Client) -> None:
    before = demo.status()
    parameter = {"json_schema": "guided_json", "lark": "guided_grammar"}
    names = (
        "objects in objects, 1000 by reference",
        "rules in rules, 3000",
        "a multiple of 9999991",
        "patterns of properties",
    )
    answers: dict[str, httpx.Response] = {}

    def ask(name: str) -> None:
        kind, made, _ = CASES[name]
        body = {"model": demo.model, "prompt": "a", parameter[kind]: made()}
        answers[name] = httpx.post(f"{demo.url}/v1/completions", json=body, timeout=TIMEOUT_S)

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    # Meanwhile others are answered, those with grammars too.
    yes = {"structured_outputs": {"choice": ["yes"]}, "temperature": 0}
    for fields in ({}, yes, {"guided_regex": "[a-c]{3}"}):
        body = {"model": demo.model, "prompt": "Say yes.", "max_tokens": 8, **fields}
        assert http.post("/v1/completions", json=body).status_code == 200
    for thread in threads:
        thread.join()
    for name in names:
        assert answers[name].status_code == 400
        assert answers[name].json()["error"]["code"] == "grammar_too_complex"
    after = demo.status()
    assert after["pid"] == before["pid"]
    assert after["num_replaced"] == before["num_replaced"]
    assert after["instances"][0]["pid"] == before["instances"][0]["pid"]


def test_a_grammar_that_is_slow_to_follow_holds_up_nobody(demo: Server, http: httpx.Client) -> None:
    kind, made, _ = CASES["ambiguous"]
    assert kind == "lark"
    fields = {"model": demo.model, "prompt": "a", "max_tokens": 60, "ignore_eos": True}
    done = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        body = {**fields, "guided_grammar": made(), "temperature": 2.0}
        answer = httpx.post(f"{demo.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        statuses.append(answer.status_code)
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    num_answers = 0
    while not done.is_set():
        body = {**fields, "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
        num_answers += 1
    thread.join()
    assert statuses[0] in (200, 400)  # it took too long, or came to its end before
    assert num_answers > 3


def test_large_bodies_leave_no_memory_behind(demo: Server, http: httpx.Client) -> None:
    pid = demo.status()["pid"]
    headers = {"Content-Type": "application/json"}
    ids = b'{"model": "%s", "prompt": [%s1]}' % (demo.model.encode(), b"1," * 8_000_000)
    keys = ",".join(f'"k{number}": 1' for number in range(1_000_000))
    unknown = f'{{"model": "{demo.model}", "prompt": "a", {keys}}}'.encode()
    assert http.post("/v1/completions", content=ids, headers=headers).status_code == 413
    before = rss_bytes(pid)
    for content, status in ((ids, 413), (unknown, 400)) * 4:
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == status, answer.text[:500]
        assert http.get("/health").status_code == 200
    assert rss_bytes(pid) - before < 64 << 20


def test_strangers_do_not_reach_the_sockets_that_carry_tokens(
    demo: Server, http: httpx.Client
) -> None:
    status = demo.status()
    pids = [status["pid"], *(one["pid"] for one in status["instances"])]
    before = [rss_bytes(pid) for pid in pids]
    paths = list(demo.runtime_dir.glob("engine-*.sock"))
    assert len(paths) == len(status["instances"])
    part = b"\x03" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)  # and more follows
    for path in paths * 50:
        with socket.socket(socket.AF_UNIX) as stranger, contextlib.suppress(OSError):
            stranger.settimeout(TIMEOUT_S)
            stranger.connect(str(path))
            assert stranger.recv(64) == b""  # closed, unheard
            stranger.sendall(_GREETING + part * 64)
    assert all(rss_bytes(pid) - known < 32 << 20 for pid, known in zip(pids, before, strict=True))
    body = {"model": demo.model, "prompt": "a", "max_tokens": 2}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_few_descriptors_and_many_who_hold_connections(
    make_server: Callable[..., Server], tiny: Path
) -> None:
    """More connections than there can be descriptors; others, the admin and new instances are
    served all the same, and the log stays as it is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    server = make_server(str(tiny), "--instances", "1", num_descriptors=NUM_DESCRIPTORS)
    url = httpx.URL(server.url)
    with ExitStack() as stack:
        for _ in range(NUM_DESCRIPTORS + 100):
            stack.enter_context(socket.create_connection((url.host, url.port), TIMEOUT_S))
        size = server.log.stat().st_size
        for _ in range(20):
            assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 200
        body = {"model": server.model, "prompt": "a", "max_tokens": 2, "guided_regex": "[ab]{9}"}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        large = {**body, "metadata": "x" * 200_000}
        answer = httpx.post(f"{server.url}/v1/completions", json=large, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        outcome = server.onecopy("scale", "2")
        assert outcome.status == 0, outcome.stderr
        ready = [{"state": "ready"}] * 2
        server.wait_instances(
            lambda found: [{"state": one["state"]} for one in found] == ready, "two instances"
        )
        descriptors = Path(f"/proc/{server.status()['pid']}/fd")
        assert len(list(descriptors.iterdir())) < NUM_DESCRIPTORS
        lines = server.log.read_text()[size:].splitlines()
        assert len([line for line in lines if "uvicorn.access" not in line]) < 20
    server.stop()


def test_descriptors_that_run_out_all_the_same_fill_no_log(strict: Server) -> None:
    """Whatever takes them. When there are some again, all is as before."""
    pid, url = strict.status()["pid"], httpx.URL(strict.url)
    known = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    size = strict.log.stat().st_size
    with ExitStack() as stack, httpx.Client(base_url=strict.url, timeout=TIMEOUT_S) as http:
        assert http.get("/health").status_code == 200
        few = len(list(Path(f"/proc/{pid}/fd").iterdir())) + 4
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, known[1]))
        for _ in range(100):
            stack.enter_context(socket.create_connection((url.host, url.port), TIMEOUT_S))
        wait_until(lambda: b"no connection can be" in strict.log.read_bytes(), "the limit to bite")
        for _ in range(10):  # each waits for the server's rest, and would fill the log by megabytes
            with contextlib.suppress(httpx.HTTPError):  # it may have been closed for another
                http.get("/health")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, known)
        assert httpx.get(f"{strict.url}/health", timeout=TIMEOUT_S).status_code == 200
    assert strict.log.stat().st_size - size < 50_000


def test_another_name_is_refused_and_can_be_allowed(strict: Server) -> None:
    for host, status in (("evil.example", 421), ("api.example", 200), ("localhost:1", 200)):
        for path in ("/health", "/metrics", "/v1/models"):
            answer = httpx.get(strict.url + path, headers={"Host": host}, timeout=TIMEOUT_S)
            assert answer.status_code == status


def test_a_key_does_not_find_what_another_has_computed(strict: Server) -> None:
    prompt = list(range(100, 300))

    def num_cached(key: str) -> int:
        answer = httpx.post(
            f"{strict.url}/v1/completions",
            json={"model": strict.model, "prompt": prompt, "max_tokens": 1},
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_S,
        )
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert num_cached("mine") == 0
    wait_until(lambda: num_cached("mine") > 100, "the prompt to be found again")
    assert num_cached("yours") == 0
    assert json.loads(strict.onecopy("ps", "--json").stdout)["num_replaced"] == 0
