"""Valid requests over all parameters of the API, at random, several at once: each is answered, and
no instance ends.

`ONECOPY_TEST_REQUESTS` is how many there are in the test of the engine, of the same name;
here a sixth of them.
"""

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.quick import usual_or_long
from tests.system.running_server import TIMEOUT_S, Server
from tests.workers.tiny_models import VOCAB_SIZE, write_checkpoint, write_tokenizer

NUM_REQUESTS = int(os.environ.get("ONECOPY_TEST_REQUESTS", usual_or_long("240", "3000"))) // 6
SEED = int(os.environ.get("ONECOPY_TEST_SEED", "1"))
AT_ONCE = 12
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
FORMS: tuple[dict[str, Any], ...] = (
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}},
    {"guided_regex": "[a-z]{3,40}"},
    {"guided_choice": ["yes", "no", "perhaps"]},
    {"structured_outputs": {"grammar": 'start: "a" | "b" start'}},
)


def test_whatever_is_asked_for_no_instance_ends(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "llama", max_position_embeddings=2048)
    (write_tokenizer(folder) / "chat_template.jinja").write_text(TEMPLATE)
    server = make_server(str(folder), "--instances", "2", "--num-speculative-tokens", "2")
    before = [one["pid"] for one in server.remember()["instances"]]
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        model = server.model

        def ask(number: int) -> str | None:
            path, body = random_request(random.Random(f"{SEED} {number}"), model)
            return problem(client.post(path, json=body), body)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            problems = [one for one in pool.map(ask, range(NUM_REQUESTS)) if one is not None]
    assert problems == []
    status = server.remember()
    assert [one["pid"] for one in status["instances"]] == before
    assert status["num_replaced"] == 0
    server.stop()


def random_request(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """Its path and body."""

    def maybe(share: float, **fields: Any) -> dict[str, Any]:
        return fields if rng.random() < share else {}

    tokens = [rng.randrange(4, VOCAB_SIZE) for _ in range(rng.randint(1, 90))]
    longest = rng.choice([1, 10, 40, 160, 400])
    max_tokens = rng.randint(1, longest)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        **maybe(0.7, temperature=rng.choice([0, 1e-6, 0.7, 1, 100])),
        **maybe(0.3, top_p=rng.choice([1e-6, 0.5, 0.99])),
        **maybe(0.3, top_k=rng.choice([-1, 0, 1, 50, 1 << 30])),
        **maybe(0.2, min_p=rng.choice([0.05, 1])),
        **maybe(0.3, presence_penalty=rng.uniform(-2, 2)),
        **maybe(0.3, frequency_penalty=rng.uniform(-2, 2)),
        **maybe(0.3, repetition_penalty=rng.choice([0.1, 1.2, 100])),
        **maybe(0.2, logit_bias={str(one): rng.uniform(-100, 100) for one in tokens[:20]}),
        **maybe(0.1, allowed_token_ids=tokens),
        **maybe(0.5, seed=rng.randint(-(1 << 63), (1 << 63) - 1)),
        **maybe(0.2, n=rng.randint(2, 5)),
        **maybe(0.3, stop=rng.choice(["e", ["a b", "zz"], ["x"] * 16])),
        **maybe(0.2, stop_token_ids=tokens[:16]),
        **maybe(0.2, min_tokens=rng.randint(0, max_tokens)),
        **maybe(0.6, ignore_eos=rng.random() < 0.8),
        **maybe(0.3, priority=rng.choice([-(1 << 31), -1, 3])),
        **maybe(0.1, deadline_s=rng.choice([0.001, 0.2, 86_400])),
        **maybe(0.2, cache_salt=rng.choice(["a", "é" * 99])),
        **maybe(0.2, return_token_ids=True),
        **maybe(0.1, **rng.choice(FORMS)),
        **rng.choice([{"stream": True}, {}, maybe(0.4, prompt_logprobs=rng.choice([0, 3, 20]))]),
    }
    if rng.random() < 0.3:
        messages = [{"role": "user", "content": "Tell me " * rng.randint(1, 9)}]
        chat = maybe(0.3, logprobs=True, top_logprobs=rng.choice([0, 1, 20]))
        return "/v1/chat/completions", {**body, **chat, "messages": messages}
    return "/v1/completions", {
        **body,
        **maybe(0.3, logprobs=rng.choice([0, 1, 20])),
        **maybe(0.2, echo=True),
        "prompt": rng.choice([tokens, "Once upon a time", [tokens, tokens[:3]], ["a", "b c"]]),
    }


def problem(answer: httpx.Response, body: dict[str, Any]) -> str | None:
    """What should not be so, if anything."""
    error: dict[str, Any] | None = None
    if answer.headers["content-type"].startswith("text/event-stream"):
        frames = [one.removeprefix("data: ") for one in answer.text.split("\n\n") if one]
        if frames[-1] != "[DONE]":
            error = json.loads(frames[-1])["error"]
    elif answer.status_code != 200:
        error = answer.json()["error"]
    if error is None:
        return None
    if error["code"] == "deadline_exceeded" and "deadline_s" in body:
        return None
    # Rules that leave no token are the request's own fault.
    if error["type"] == "invalid_request_error" and "no token to choose" in error["message"]:
        return None
    return f"{error} for {body}"
