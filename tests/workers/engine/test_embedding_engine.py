"""The engine of models that embed: what it batches, answers, forgets; whom a failure ends."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.model.tiny_embedders import (
    MAX_POSITIONS,
    VOCAB_SIZE,
    config_of,
    reference_model,
    texts,
)
from workers.engine.embed import EmbeddingEngine
from workers.engine.embed_batching import FREE_PADDING, choose
from workers.errors import DeviceLost
from workers.messages import Embed, Embedded
from workers.model.encoder import EmbeddingModel, build_embedding_model

SIZE = 32


@cache
def model(family: str = "bert") -> EmbeddingModel:
    metadata = {"config": json.dumps(config_of(family))}
    return build_embedding_model(metadata, reference_model(family).state_dict(), torch.float32)


def embed(name: str, *inputs: list[int], **changes: Any) -> Embed:
    return Embed(request_id=name, inputs=tuple(map(tuple, inputs)), **changes)


def all_answers(engine: EmbeddingEngine) -> dict[str, Embedded]:
    answers: dict[str, Embedded] = {}
    while engine.has_work:
        for answer in engine.step():
            assert answer.request_id not in answers
            answers[answer.request_id] = answer
    return answers


def vectors(answer: Embedded, size: int = SIZE) -> torch.Tensor:
    assert not answer.error
    return torch.frombuffer(bytearray(answer.vectors), dtype=torch.float32).view(-1, size)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 600))
def test_a_batch_has_the_oldest_fits_and_is_hardly_filled_up(
    lengths: list[int], budget: int
) -> None:
    batch = choose(lengths, budget)
    assert len(set(batch)) == len(batch)
    assert bool(batch) == bool(lengths)
    if not batch:
        return
    assert 0 in batch
    longest, total = max(lengths[one] for one in batch), sum(lengths[one] for one in batch)
    assert len(batch) * longest <= max(budget, lengths[0])
    assert len(batch) * longest - total <= max(FREE_PADDING, total // 4)


def test_texts_of_a_length_are_computed_together() -> None:
    assert sorted(choose([10] * 100, 512)) == list(range(51))
    # Nearest to the oldest first; 250 would fill up the others.
    assert set(choose([8, 250, 9, 8, 250, 3], 512)) == {0, 2, 3, 5}
    assert choose([600, 8, 8], 512) == [0]


@pytest.mark.parametrize("max_num_batched_tokens", [1, 64, 4096])
def test_vectors_do_not_depend_on_what_is_computed_with_them(max_num_batched_tokens: int) -> None:
    inputs = texts(5, 31, 5, 12, 64, 1, 30, 13)
    engine = EmbeddingEngine(model(), MAX_POSITIONS, max_num_batched_tokens)
    engine.add(embed("a", *inputs[:3]))
    engine.add(embed("b", inputs[3]))
    engine.add(embed("c", *inputs[4:]))
    assert (engine.num_running, engine.num_waiting) == (0, 3)
    answers = all_answers(engine)
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    ours = torch.cat([vectors(answers[name]) for name in "abc"])
    alone = EmbeddingEngine(model(), MAX_POSITIONS)
    for index, one in enumerate(inputs):
        alone.add(embed(str(index), one))
        [answer] = alone.step()
        torch.testing.assert_close(ours[index], vectors(answer)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(len(inputs)), atol=1e-5, rtol=1e-5)


def test_fewer_dimensions_are_the_first_ones_normalized() -> None:
    [one] = texts(9)
    engine = EmbeddingEngine(model(), MAX_POSITIONS)
    engine.add(embed("whole", one))
    engine.add(embed("short", one, dimensions=5))
    answers = all_answers(engine)
    whole, short = vectors(answers["whole"])[0], vectors(answers["short"], 5)[0]
    torch.testing.assert_close(short, whole[:5] / whole[:5].norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (embed("a", [5] * 41), "41 tokens; at most 40"),
        (embed("a", [5], [VOCAB_SIZE]), "outside the model's vocabulary"),
        (embed("a", [5], dimensions=SIZE + 1), "have 32 numbers"),
    ],
)
def test_what_can_not_be_served_is_answered_so(request_: Embed, problem: str) -> None:
    engine = EmbeddingEngine(model(), max_model_len=40)
    engine.add(request_)
    engine.add(embed("b", [5] * 40))
    answers = all_answers(engine)
    assert problem in answers["a"].error
    assert answers["a"].invalid
    assert vectors(answers["b"]).shape == (1, SIZE)


def test_a_name_that_is_in_use_ends_both() -> None:
    engine = EmbeddingEngine(model(), MAX_POSITIONS)
    engine.add(embed("a", [5]))
    engine.add(embed("a", [6]))
    [answer] = engine.step()
    assert "in use" in answer.error
    assert not engine.has_work


def test_an_aborted_request_is_forgotten_and_others_go_on() -> None:
    engine = EmbeddingEngine(model(), MAX_POSITIONS, max_num_batched_tokens=30)
    engine.add(embed("long", *texts(30, 30, 30)))
    engine.add(embed("other", *texts(30)))
    assert engine.step() == ()
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    engine.abort("long")
    engine.abort("unknown")
    [answer] = engine.step()
    assert answer.request_id == "other"
    assert not engine.has_work
    engine.add(embed("refused", [VOCAB_SIZE]))
    engine.abort("refused")
    assert not engine.has_work


def test_a_deadline_ends_what_is_not_complete() -> None:
    now = 100.0
    engine = EmbeddingEngine(model(), MAX_POSITIONS, 30, clock=lambda: now)
    engine.add(embed("late", *texts(30, 30), deadline_s=2.0))
    engine.add(embed("patient", *texts(30)))
    assert engine.step() == ()
    now = 102.0
    late, patient = engine.step()
    assert (late.request_id, late.error) == ("late", "the request's deadline has passed")
    assert (patient.request_id, patient.error) == ("patient", "")


def test_a_pass_that_fails_ends_the_texts_in_it_alone() -> None:
    engine = EmbeddingEngine(model(), MAX_POSITIONS, max_num_batched_tokens=30)
    engine.add(embed("a", *texts(20, 20)))
    engine.add(embed("b", *texts(29)))

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("no memory left")

    hook = model().module.register_forward_pre_hook(out_of_memory)
    try:
        [failed] = engine.step()
    finally:
        hook.remove()
    assert (failed.request_id, failed.invalid) == ("a", False)
    assert "no memory left" in failed.error
    [answer] = engine.step()
    assert vectors(answer).shape == (1, SIZE)
    assert not engine.has_work


def test_a_failed_pass_on_a_device_that_is_lost_ends_the_engine() -> None:
    engine = EmbeddingEngine(model(), MAX_POSITIONS, device_fault=lambda: "illegal address")
    engine.add(embed("a", *texts(20)))

    def fail(*_: object) -> None:
        raise RuntimeError("an error that another kernel has left behind")

    hook = model().module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(DeviceLost, match="illegal address"):
            engine.step()
    finally:
        hook.remove()


def test_a_vector_that_is_not_finite_ends_its_own_request() -> None:
    metadata = {"config": json.dumps(config_of("bert"))}
    tensors = {name: one.clone() for name, one in reference_model("bert").state_dict().items()}
    tensors["embeddings.word_embeddings.weight"][7] = torch.inf
    broken = build_embedding_model(metadata, tensors, torch.float32)
    engine = EmbeddingEngine(broken, MAX_POSITIONS)
    engine.add(embed("bad", [5], [7]))
    engine.add(embed("good", [5]))
    answers = all_answers(engine)
    assert "not finite" in answers["bad"].error
    assert vectors(answers["good"]).isfinite().all()


@pytest.mark.parametrize(("length", "budget"), [(MAX_POSITIONS + 1, 8), (0, 8), (8, 0)])
def test_limits_beyond_the_model_are_refused(length: int, budget: int) -> None:
    with pytest.raises(ValueError):
        EmbeddingEngine(model(), length, budget)


def test_a_step_runs_as_many_threads_as_it_may_now() -> None:
    allowed, seen = iter([2, 1]), list[int]()
    engine = EmbeddingEngine(model(), MAX_POSITIONS, 30, threads_now=lambda: next(allowed))
    engine.add(embed("a", *texts(30, 30)))
    hook = model().module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        all_answers(engine)
    finally:
        hook.remove()
    assert seen == [2, 1]


def test_a_step_gives_no_more_vectors_than_a_message_can_hold() -> None:
    engine = EmbeddingEngine(model(), MAX_POSITIONS, max_answer_bytes=2 * SIZE * 4)
    for name, count in (("a", 1), ("b", 1), ("c", 3), ("d", 1)):
        engine.add(embed(name, *texts(*[5] * count)))
    given = [[answer.request_id for answer in engine.step()]]
    engine.abort("d")
    while engine.has_work:
        given.append([answer.request_id for answer in engine.step()])
    assert given == [["a", "b"], ["c"]]
