"""The engine as a server's clients see it: prefixes that instances share, one copy under load."""

import re
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.system.running_server import Server

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards quietly bake bread".split()
LONG = " ".join(WORDS[(7 * i + i // 5) % len(WORDS)] for i in range(700))


def hits(server: Server) -> dict[str, float]:
    """Of each instance, the prompt tokens that it found computed."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'prefix_cache_hits_total\{instance="(\w+)"\} (\S+)', text)
    return {name: float(count) for name, count in found}


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

    first = ask()
    before = hits(demo)
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
        after = hits(demo)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert max(gained.values()) > 500
    finder = max(gained, key=lambda name: gained[name])
    assert before.get(finder, 0.0) == 0.0, "the instance that computed it has found it"


def test_one_copy_holds_while_requests_run(
    demo: Server, running: "openai.Stream[openai.types.Completion]"
) -> None:
    verdict = demo.onecopy("verify")
    assert verdict.status == 0, verdict.stdout + verdict.stderr
    shown = demo.onecopy("ps", "--memory").stdout
    assert re.search(r"pool: \d+\.\d MB in \d+ leases", shown)
