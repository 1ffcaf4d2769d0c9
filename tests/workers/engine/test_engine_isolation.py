"""Whatever is raised over one request ends that one, wherever in a step it comes from.

What the wire would never let through is put into requests here by hand, so that the real code
fails at each of its stages.
"""

import logging
from typing import Any

import msgspec
import pytest

from tests.workers.engine.engines import PROMPTS, engine_of, expected, request, run, tokens
from workers.engine.isolation import in_sound_groups
from workers.messages import (
    MAX_FRAME_BYTES,
    Embedded,
    Output,
    StepOutput,
    TokenLogprobs,
    decode_from_instance,
)
from workers.process.outbox import frames


class _Unspeakable(str):
    """A text that can't be put into a digest."""

    def __repr__(self) -> str:
        raise RuntimeError("unspeakable")


DRAWN = {"temperature": 1.0, "seed": 3}
STAGES: dict[str, dict[str, Any]] = {
    "it is admitted": {"logit_bias": {5: "much"}},
    "it waits": {"priority": "high"},
    "it gets room": {"cache_salt": _Unspeakable("a")},
    "it is guessed at": {"max_tokens": "many", "num_speculative_tokens": 3},
    "its logits are changed": {"frequency_penalty": "much"},
    "its token is drawn": {**DRAWN, "top_k": "few"},
    "its token is told": {"logprobs": "all"},
    "its prompt is told": {"prompt_logprobs": "all"},
    "its end is looked for": {"max_tokens": "many"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_one_request_raises_ends_no_other(
    stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes = dict(STAGES[stage])
    speculative = changes.pop("num_speculative_tokens", 0)
    engine = engine_of(num_speculative_tokens=speculative, max_num_batched_tokens=9)
    others = [request(str(index), one) for index, one in enumerate(PROMPTS)]
    with caplog.at_level(logging.ERROR):
        outputs = run(engine, *others[:2], request("bad", PROMPTS[3], **changes), *others[2:])
    last = outputs["bad"][-1]
    assert (last.finish_reason, last.invalid) == ("error", False)
    assert "its log has more" in last.error
    assert any(record.exc_info for record in caplog.records)
    assert [tokens(outputs[one.request_id]) for one in others] == expected("llama")
    # And the engine is as good as new.
    again = run(engine, request("again", PROMPTS[3]))["again"]
    assert tokens(again) == expected("llama")[3]


def test_tokens_before_the_error_are_told() -> None:
    """The 65th new token of an answer, and then something that fails."""
    good = request("a", PROMPTS[1], max_tokens=100, presence_penalty=0.5, **DRAWN)
    engine = engine_of()
    engine.add(good)
    got: list[Output] = []
    while engine.has_work:
        got += engine.step()
        if len(got) == 70:
            sequence = engine._scheduler.get("a")
            assert sequence is not None
            sequence.sampler.params = msgspec.structs.replace(sequence.sampling, max_tokens="many")
    assert len(tokens(got)) == 70
    assert got[-1].finish_reason == "error"


@pytest.mark.parametrize("bad", [set(), {0}, {6}, {2, 3}, set(range(7))])
def test_the_culprits_are_found_and_only_they(bad: set[int]) -> None:
    def compute(items: Any) -> list[int]:
        if bad & set(items):
            raise ValueError(sorted(bad & set(items)))
        return [item * item for item in items]

    groups = in_sound_groups(range(7), compute)
    assert [item for items, _ in groups for item in items] == list(range(7))
    failed = {items[0] for items, found in groups if isinstance(found, Exception)}
    assert failed == bad
    sound = [found for _, found in groups if not isinstance(found, Exception)]
    assert sorted(item for part in sound for item in part) == [
        item * item for item in range(7) if item not in bad
    ]
    assert in_sound_groups([], compute) == []


# --- what is told


def told(step: StepOutput, most_bytes: int = MAX_FRAME_BYTES) -> tuple[list[StepOutput], list[str]]:
    given_up: list[str] = []
    sent = list(frames(step, given_up.append, most_bytes))
    assert all(len(frame) <= most_bytes for frame in sent)
    decoded = [decode_from_instance(frame) for frame in sent]
    assert all(isinstance(one, StepOutput) for one in decoded)
    return decoded, given_up  # type: ignore[return-value]


def step_of(*outputs: Output | Embedded) -> StepOutput:
    return StepOutput(outputs=outputs, num_running=1, num_waiting=2, kv_bytes=3)


def test_an_output_that_can_not_be_told_keeps_no_other_back() -> None:
    good = Output(request_id="a", token_ids=(1, 2))
    half = Output(request_id="b", token_ids=(1,), error="half a pair: \ud800")
    assert told(step_of(good)) == ([step_of(good)], [])
    (first, second, third), given_up = told(step_of(good, half, good))
    assert (first, third, given_up) == (step_of(good), step_of(good), ["b"])
    (failed,) = second.outputs
    assert isinstance(failed, Output)
    assert (failed.request_id, failed.finish_reason) == ("b", "error")
    assert "UnicodeEncodeError" in failed.error


def test_what_is_too_long_for_one_frame_comes_in_several() -> None:
    one = TokenLogprobs(logprob=-1.0, rank=1, top_ids=(7,) * 20, top_logprobs=(-2.0,) * 20)
    whole = Output(request_id="a", token_ids=(5,), prompt_logprobs=(one,) * 100)
    other = Output(request_id="b", token_ids=(6,))
    steps, given_up = told(step_of(whole, other), most_bytes=8192)
    outputs = [output for step in steps for output in step.outputs]
    assert all(isinstance(output, Output) for output in outputs)
    assert given_up == []
    assert outputs[-1] == other
    own = outputs[:-1]
    assert sum((output.prompt_logprobs for output in own), ()) == whole.prompt_logprobs
    assert [output.token_ids for output in own] == [()] * (len(own) - 1) + [(5,)]

    vectors = Embedded(request_id="c", vectors=bytes(9000))
    (step,), given_up = told(step_of(vectors), most_bytes=8192)
    assert given_up == ["c"]
    assert "longer than a message" in step.outputs[0].error
