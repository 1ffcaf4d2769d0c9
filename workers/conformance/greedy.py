"""Greedy generation by the engine, without a server and an allocator.

Owns the one place, of the check and of the tests, that knows how the engine is driven. Invariant:
a prompt's tokens depend on it alone. Does not know where weights come from.
"""

from collections.abc import Sequence
from typing import Any

import torch

from workers.engine.generate import GenerationEngine
from workers.errors import WorkerError
from workers.messages import Generate, SamplingParams
from workers.model.decoder import Model


class GenerationFailed(WorkerError):
    """A sequence ended with an error."""


def read_whole(checkpoint: Any) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, into private memory. Raises CheckpointError."""
    read = {}
    for source in checkpoint.tensors():
        out = torch.empty(source.shape, dtype=source.dtype)
        if out.numel():
            checkpoint.copy_into(source.name, out, lambda _num_bytes: None)
        read[source.name] = out
    return read


def generated(
    model: Model,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    *,
    max_num_batched_tokens: int = 256,
) -> list[list[int]]:
    """The `num_new` tokens behind each prompt, all computed in company; ends are ignored. Raises
    GenerationFailed."""
    longest = max(map(len, prompts)) + num_new
    engine = GenerationEngine(
        model, max_model_len=longest, max_num_batched_tokens=max_num_batched_tokens
    )
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add(Generate(request_id=str(index), token_ids=tuple(prompt), sampling=sampling))
    new: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise GenerationFailed(output.error)
            new[int(output.request_id)] += output.token_ids
    return new
