"""Engines on tiny models, requests for them, and what they answer.

Owns what the tests of the engine share. Invariant: `run` checks the engine after every step, and
that nothing is held when all has ended.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from tests.workers.tiny_models import config_of, generate, prompt, reference_model, tensors_of
from workers.engine.generate import GenerationEngine
from workers.kv.cache import KVCache
from workers.messages import Generate, Output, SamplingParams
from workers.model.decoder import Model, build_model
from workers.placement.resident import Resident

NUM_NEW = 16
PROMPTS = [prompt(length, seed=length) for length in (1, 5, 8, 13, 40)]
_OF_REQUEST = frozenset({"priority", "deadline_s", "cache_salt"})

reference = cache(reference_model)


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> Model:
    """The family's tiny model, bound to tensors in private memory."""
    return build_model(config_of(family), Resident(tensors_of(reference(family, dtype))), dtype)


@cache
def expected(family: str, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """What transformers generates greedily behind each of `PROMPTS`."""
    return [generate(reference(family, dtype), one, NUM_NEW) for one in PROMPTS]


def request(
    name: str, token_ids: Sequence[int], num_generated: int = 0, **changes: Any
) -> Generate:
    """A greedy request for `NUM_NEW` tokens, but for `changes` of it or of its sampling."""
    of_request = {key: changes.pop(key) for key in _OF_REQUEST & changes.keys()}
    sampling = {"max_tokens": NUM_NEW, "temperature": 0.0, "ignore_eos": True, **changes}
    return Generate(
        request_id=name,
        token_ids=tuple(token_ids),
        sampling=SamplingParams(**sampling),
        num_generated=num_generated,
        **of_request,
    )


def engine_of(family: str = "llama", **changes: Any) -> GenerationEngine:
    """An engine on the family's model, for up to 128 tokens."""
    return GenerationEngine(model_of(family), **{"max_model_len": 128, **changes})


def room_for(num_blocks: int, family: str = "llama") -> KVCache:
    """So many blocks of this process alone."""
    layout = model_of(family).geometry.kv_layout
    return KVCache(layout, private_limit_bytes=num_blocks * layout.block_bytes)


def step(engine: GenerationEngine, outputs: dict[str, list[Output]]) -> None:
    """One step, checked, and what it says added to `outputs`."""
    for output in engine.step():
        outputs.setdefault(output.request_id, []).append(output)
    engine.check()


def run(
    engine: GenerationEngine, *requests: Generate, most_steps: int = 2000
) -> dict[str, list[Output]]:
    """All outputs of each request, until the engine has nothing left to do."""
    outputs: dict[str, list[Output]] = {}
    for one in requests:
        engine.add(one)
    for _ in range(most_steps):
        if not engine.has_work:
            assert engine.kv_bytes == 0
            return outputs
        step(engine, outputs)
    raise AssertionError(f"after {most_steps} steps some still run")


def tokens(outputs: Sequence[Output]) -> list[int]:
    """All that was generated."""
    return [token for output in outputs for token in output.token_ids]


def only(engine: GenerationEngine, one: Generate) -> tuple[list[int], str | None, str]:
    """Tokens, finish reason and error of one request that runs alone."""
    outputs = run(engine, one)[one.request_id]
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    return tokens(outputs), outputs[-1].finish_reason, outputs[-1].error
