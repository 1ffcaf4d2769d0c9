"""Valid requests over all parameters, at random, many at once: each ends as it should, and nothing
that is raised over one of them leaves the engine.

`ONECOPY_TEST_REQUESTS` is how many there are (400 by default, 3,000 in the long run),
`ONECOPY_TEST_SEED` which ones.
"""

import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quick import usual_or_long
from tests.workers.engine.engines import request
from tests.workers.grammar.byte_tokenizer import byte_tokenizer
from tests.workers.tiny_models import config_of, reference_model, tensors_of
from workers.engine.generate import GenerationEngine
from workers.kv.cache import KVCache
from workers.messages import (
    MAX_LOGPROBS,
    FromInstance,
    Generate,
    GrammarSpec,
    Output,
    StepOutput,
    decode_from_instance,
    decode_to_instance,
    encode,
)
from workers.model.decoder import Model, build_model
from workers.placement.resident import Resident

pytestmark = pytest.mark.slow

NUM_REQUESTS = int(os.environ.get("ONECOPY_TEST_REQUESTS", usual_or_long("400", "3000")))
SEED = int(os.environ.get("ONECOPY_TEST_SEED", "1"))
VOCAB_SIZE = 640
MAX_MODEL_LEN = 512
AT_ONCE = 40
EOS = (256, 257)
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_MODEL_LEN,
    "eos_token_id": list(EOS),
}
GRAMMARS = (
    GrammarSpec(kind="json_object"),
    GrammarSpec(kind="json_schema", source='{"type": "array", "items": {"type": "integer"}}'),
    GrammarSpec(kind="json_schema", source='{"enum": ["yes", "no", 12, null]}'),
    GrammarSpec(kind="regex", source=r"[a-z]{3,40}( [a-z]+)*\."),
    GrammarSpec(kind="regex", source=r"\d+"),
    GrammarSpec(kind="choice", source=json.dumps(["yes", "no", "perhaps"])),
    GrammarSpec(kind="lark", source='start: WORD ("," WORD)*\nWORD: /[a-z]{1,9}/'),
)


@pytest.fixture(scope="module")
def model() -> Model:
    reference = reference_model("llama", **SMALL)
    return build_model(config_of("llama", **SMALL), Resident(tensors_of(reference)), torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer(path)
    return path


class RandomRequests:
    """One after the other, each told by the seed and its number."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._beginnings = [[(7 * i + j) % 250 for j in range(48)] for i in range(3)]

    def make(self, number: int) -> Generate:
        self._rng = random.Random(f"{self._seed} {number}")
        rng, maybe = self._rng, self._maybe
        prompt = self._tokens(rng.choice([1, 2, rng.randint(1, 30), rng.randint(1, 200)]))
        if rng.random() < 0.3:
            prompt = rng.choice(self._beginnings) + prompt[:20]
        longest = rng.choice([1, 5, 20, 20, 60, 140, 420])
        max_tokens = min(rng.randint(1, longest), MAX_MODEL_LEN - len(prompt))
        generated = self._tokens(rng.randint(1, max_tokens)) if rng.random() < 0.1 else []
        fields: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": rng.choice([0.0, 0.0, 1e-6, 0.3, 1.0, 1.0, 2.5, 100.0]),
            "top_p": maybe(1.0, rng.choice([1e-9, 0.1, 0.9, 0.999])),
            "top_k": maybe(0, rng.choice([1, 2, 40, VOCAB_SIZE, 1 << 31])),
            "min_p": maybe(0.0, rng.choice([0.01, 0.5, 1.0])),
            "repetition_penalty": maybe(1.0, rng.choice([0.01, 0.5, 1.3, 100.0])),
            "presence_penalty": maybe(0.0, rng.uniform(-2, 2)),
            "frequency_penalty": maybe(0.0, rng.uniform(-2, 2)),
            "logit_bias": maybe({}, self._biases()),
            "allowed_token_ids": maybe(None, tuple(self._tokens(rng.choice([1, 3, 300]))), 0.1),
            "seed": rng.choice([0, 1, (1 << 63) - 1, rng.getrandbits(63)]),
            "stop_token_ids": maybe((), tuple(self._tokens(rng.randint(1, 16)))),
            "min_tokens": maybe(0, rng.randint(0, max_tokens)),
            "ignore_eos": rng.random() < 0.6,
            "logprobs": maybe(None, rng.choice([0, 1, MAX_LOGPROBS])),
            "prompt_logprobs": maybe(None, rng.choice([0, 1, MAX_LOGPROBS]), 0.15),
            "grammar": maybe(None, rng.choice(GRAMMARS), 0.15),
            "priority": rng.choice([0, 0, 0, -3, 5, -(1 << 31), (1 << 31) - 1]),
            "deadline_s": maybe(None, rng.choice([1e-3, 0.05, 1e6]), 0.1),
            "cache_salt": maybe("", rng.choice(["a", "tenant é", "x" * 256])),
        }
        if fields["grammar"] is not None:
            generated = []  # they would have to match it
        return request(f"r{number}", [*prompt, *generated], len(generated), **fields)

    def _maybe(self, usual: Any, other: Any, share: float = 0.25) -> Any:
        return other if self._rng.random() < share else usual

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(VOCAB_SIZE) for _ in range(count)]

    def _biases(self) -> dict[int, float]:
        strengths = [-100.0, -1.0, 0.0, 5.0, 100.0]
        count = self._rng.choice([1, 10, 300])
        return {token: self._rng.choice(strengths) for token in self._tokens(count)}


def test_whatever_is_asked_for_every_request_ends_as_it_should(
    model: Model, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, requests = random.Random(SEED), RandomRequests(SEED)
    layout = model.geometry.kv_layout
    engine = GenerationEngine(
        model,
        MAX_MODEL_LEN,
        max_num_seqs=24,
        max_num_batched_tokens=96,
        # Not enough for all that may run: some give way.
        kv=KVCache(layout, private_limit_bytes=200 * layout.block_bytes),
        num_speculative_tokens=3,
        tokenizer=tokenizer,
    )
    asked: dict[str, Generate] = {}
    running: dict[str, int] = {}  # request -> tokens that it has been given
    most_different = 0
    generated: dict[str, set[int]] = {}
    number = 0
    with caplog.at_level(logging.ERROR):
        while number < NUM_REQUESTS or engine.has_work:
            while number < NUM_REQUESTS and len(running) < AT_ONCE:
                one = requests.make(number)
                number += 1
                assert decode_to_instance(encode(one)) == one  # the wire lets it through
                asked[one.request_id] = one
                running[one.request_id] = one.num_generated
                generated[one.request_id] = set()
                engine.add(one)
                if rng.random() < 0.02:
                    engine.abort(one.request_id)
                    del running[one.request_id]
            for output in engine.step():
                name = output.request_id
                assert name in running, f"an output after the end of {asked[name]}"
                running[name] += len(output.token_ids)
                generated[name].update(output.token_ids)
                if output.finish_reason is not None:
                    check_end(asked[name], output, running.pop(name))
                    most_different = max(most_different, len(generated.pop(name)))
                assert told(engine, output) == output
            if rng.random() < 0.01 and running:
                name = rng.choice(list(running))
                engine.abort(name)
                del running[name]
            if rng.random() < 0.05:
                engine.check()
    engine.check()
    assert (running, engine.kv_bytes) == ({}, 0)
    assert not caplog.records
    assert most_different > 256 or NUM_REQUESTS < 500


def check_end(one: Generate, last: Output, num_generated: int) -> None:
    what = f"{last.error!r} for {one}"
    sampling = one.sampling
    assert num_generated <= sampling.max_tokens, what
    if last.finish_reason == "error":
        expected = (
            (last.invalid and (sampling.grammar or sampling.allowed_token_ids))
            or (last.problem == "deadline" and one.deadline_s is not None)
            or last.problem == "no_room"
        )
        assert expected, what
    elif last.finish_reason == "length":
        full = len(one.token_ids) - one.num_generated + num_generated >= MAX_MODEL_LEN
        assert full or num_generated == sampling.max_tokens, what
    else:
        assert last.finish_reason == "stop", what
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else EOS)}
        assert sampling.grammar or not last.token_ids or last.token_ids[-1] in ends, what


def told(engine: GenerationEngine, output: Output) -> Output:
    """What the server is told of it."""
    message: FromInstance = decode_from_instance(encode(engine.report((output,))))
    assert isinstance(message, StepOutput)
    (got,) = message.outputs
    assert isinstance(got, Output)
    return got
