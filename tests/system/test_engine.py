"""The engine as a server's clients see it: prefixes that instances share, one copy under load."""

import re
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.system.running_server import TIMEOUT_S, Server

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"),
    *("while", "seven", "wizards", "quietly", "bake", "bread"),
)
LONG = " ".join(WORDS[(7 * i + i // 5) % len(WORDS)] for i in range(700))


def tokens(server: Server, which: str) -> dict[str, float]:
    """Of each instance, the prompt tokens that it looked up ("queries") or found ("hits")."""
    text = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
    found = re.findall(rf'prefix_cache_{which}_total\{{instance="(\w+)"\}} (\S+)', text)
    return {name: float(count) for name, count in found}


def most_gained(before: dict[str, float], after: dict[str, float]) -> tuple[str, float]:
    """The instance whose count grew most, and by how much."""
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    name = max(gained, key=lambda one: gained[one])
    return name, gained[name]


@pytest.fixture
def running(demo: Server) -> Iterator["openai.Stream[openai.types.Completion]"]:
    """A stream that keeps one instance busy until the test is over."""
    stream = demo.client().completions.create(
        model=demo.model,
        prompt="Count:",
        max_tokens=6000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    yield stream
    stream.close()


def test_an_instance_finds_what_another_has_computed(
    demo: Server, running: "openai.Stream[openai.types.Completion]"
) -> None:
    """While one instance is busy the other answers, and then the other way round."""
    client = demo.client()

    def ask() -> str:
        answer = client.completions.create(
            model=demo.model, prompt=LONG, max_tokens=8, temperature=0
        )
        return answer.choices[0].text

    before = tokens(demo, "queries")
    first = ask()
    computed, _ = most_gained(before, tokens(demo, "queries"))
    before = tokens(demo, "hits")
    second_stream = client.completions.create(
        model=demo.model,
        prompt="Go on:",
        max_tokens=6000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with second_stream:
        next(iter(second_stream))  # now the instance that answered has as much to do as the other
        running.close()  # and the other one less
        assert ask() == first
        finder, num_found = most_gained(before, tokens(demo, "hits"))
    assert num_found > 500
    assert finder != computed


def test_a_prompt_that_was_computed_counts_as_cached_for_its_own_salt_only(demo: Server) -> None:
    def cached(**salt: str) -> tuple[int, int]:
        body = {"model": demo.model, "prompt": f"Once, {LONG[:1000]}", "max_tokens": 1, **salt}
        usage = httpx.post(f"{demo.url}/v1/completions", json=body, timeout=TIMEOUT_S).json()[
            "usage"
        ]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    num_prompt, before = cached()
    assert before == 0
    assert num_prompt - 16 <= cached()[1] < num_prompt
    assert cached(cache_salt="another tenant")[1] == 0
    assert cached(cache_salt="another tenant")[1] > 0


def test_a_deadline_ends_a_request_by_name(demo: Server) -> None:
    body = {"model": demo.model, "prompt": "Count:", "max_tokens": 5000, "ignore_eos": True}
    late = httpx.post(
        f"{demo.url}/v1/completions", json={**body, "deadline_s": 0.3}, timeout=TIMEOUT_S
    )
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_one_copy_holds_while_requests_run(
    demo: Server, running: "openai.Stream[openai.types.Completion]"
) -> None:
    verdict = demo.onecopy("verify")
    assert verdict.status == 0, verdict.stdout + verdict.stderr
    shown = demo.onecopy("ps", "--memory").stdout
    assert re.search(r"pool: \d+\.\d MB in \d+ leases", shown)
