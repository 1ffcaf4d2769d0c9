"""Greedy generation by the engine: the one place of these tests that knows how it is driven."""

from collections.abc import Sequence

from workers.engine.generate import GenerationEngine
from workers.messages import Generate, SamplingParams
from workers.model.decoder import Model


def generated(
    model: Model,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    *,
    max_num_batched_tokens: int = 256,
) -> list[list[int]]:
    """The `num_new` tokens behind each prompt, all computed in company; ends are ignored."""
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
            assert not output.error, output.error
            new[int(output.request_id)] += output.token_ids
    return new
