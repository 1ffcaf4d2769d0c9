"""Penalties, biases, masks and log probabilities, against other people's definitions of them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.errors import InvalidLogits, NoTokenLeft
from workers.messages import SamplingParams
from workers.sampling import (
    Sampled,
    SequenceSampler,
    Tokens,
    invalid_params,
    prompt_logprobs,
    sample,
)
from workers.sampling.filters import allowed
from workers.sampling.pieces import piece_maxima
from workers.sampling.rules import apply_rules

VOCAB_SIZE = 300  # more than two pieces, and the last one is short
EOS = 7
some = settings(max_examples=40, deadline=None)


def sampler(
    prompt: Sequence[int] = (1, 2, 2), generated: Sequence[int] = (), **changes: Any
) -> SequenceSampler:
    params = SamplingParams(**{"max_tokens": 99, "temperature": 0.0, **changes})
    tokens = Tokens([*prompt, *generated], len(prompt))
    return SequenceSampler(params, tokens, VOCAB_SIZE, (EOS,))


def some_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def ruled(row: torch.Tensor, one: SequenceSampler) -> torch.Tensor:
    changed = row.clone()
    assert apply_rules([changed], [one]) == [None]
    return changed


def only(logits: torch.Tensor, one: SequenceSampler) -> Sampled:
    (sampled,) = sample(logits, [one])
    assert isinstance(sampled, Sampled)
    return sampled


tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=90)


@some
@given(tokens, tokens, st.floats(0.3, 3.0))
def test_the_repetition_penalty_is_that_of_transformers(
    prompt: list[int], generated: list[int], penalty: float
) -> None:
    (row,) = some_logits(1)
    ids = torch.tensor([[0, *prompt, *generated]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None])[0]
    one = sampler([0, *prompt], (), repetition_penalty=penalty)
    for token in generated:
        one.accept(token)
    torch.testing.assert_close(ruled(row, one), expected)
    # Made anew elsewhere, it is the same to the bit.
    anew = sampler([0, *prompt], generated, repetition_penalty=penalty)
    assert torch.equal(ruled(row, anew), ruled(row, one))


@some
@given(tokens, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_penalties_are_those_of_openai(
    generated: list[int], presence: float, frequency: float
) -> None:
    (row,) = some_logits(1)
    one = sampler(
        [5] * 9, generated, presence_penalty=presence, frequency_penalty=frequency
    )  # the prompt does not count
    counts = torch.bincount(torch.tensor(generated, dtype=torch.int64), minlength=VOCAB_SIZE)
    expected = row - counts * frequency - (counts > 0) * presence
    torch.testing.assert_close(ruled(row, one), expected)


def test_biases_and_masks() -> None:
    (row,) = some_logits(1)
    changed = ruled(row, sampler(logit_bias={3: 2.5, 299: -100.0}))
    expected = row.clone()
    expected[3] += 2.5
    expected[299] -= 100
    assert torch.equal(changed, expected)
    changed = ruled(row, sampler(allowed_token_ids=(3, 299)))
    assert changed.isfinite().nonzero()[:, 0].tolist() == [3, 299]
    assert torch.equal(changed[[3, 299]], row[[3, 299]])
    assert only(row[None], sampler(logit_bias={9: 100.0})).token == 9
    # What is forbidden stays so, however much speaks for it.
    both = sampler(logit_bias={9: 100.0}, allowed_token_ids=(4,), temperature=1.0)
    assert only(row[None], both).token == 4


def test_no_end_comes_before_the_least_length() -> None:
    logits = some_logits(1)
    logits[0, EOS], logits[0, 8] = 1000.0, 999.0
    one = sampler(min_tokens=2, stop_token_ids=(8,))
    for _ in range(2):
        token = only(logits, one).token
        assert token not in (EOS, 8)
        one.accept(token)
    assert only(logits, one).token == EOS
    ignoring = sampler(min_tokens=2, stop_token_ids=(8,), ignore_eos=True)
    assert only(logits, ignoring).token == EOS  # which then ends nothing


def test_nothing_left_to_choose_is_the_requests_own_fault() -> None:
    logits = some_logits(3)
    logits[:, EOS] = float("-inf")
    refused = sampler(allowed_token_ids=(EOS,), temperature=1.0)
    got = sample(logits, [sampler(), refused, sampler(temperature=1.0)])
    assert [isinstance(one, Sampled) for one in got] == [True, False, True]
    assert isinstance(got[1], NoTokenLeft)


def test_tokens_beyond_the_vocabulary_are_named() -> None:
    for name, value in (("logit_bias", {3: 1.0, 300: 1.0}), ("allowed_token_ids", (3, 300))):
        params = SamplingParams(max_tokens=1, **{name: value})
        assert (
            invalid_params(params, VOCAB_SIZE) == f"{name} names the token 300; the model has 300"
        )
        assert invalid_params(params, VOCAB_SIZE + 1) is None


# --- filters

probabilities = st.integers(0, 1 << 30).map(lambda seed: some_logits(1, seed, 5000)[0].softmax(0))


@some
@given(
    probabilities,
    st.sampled_from([0, 1, 3, 40, 128, 1000, 4999]),
    st.sampled_from([0.01, 0.3, 0.9, 0.99, 0.99999, 1.0]),
    st.sampled_from([0.0, 1e-5, 0.05, 1.0]),
)
def test_what_the_filters_keep_is_what_those_of_transformers_keep(
    weights: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> None:
    logits = weights.log()[None]
    none = torch.empty(1, 0, dtype=torch.int64)
    if min_p:
        logits = MinPLogitsWarper(min_p)(none, logits)
    if top_k:
        logits = TopKLogitsWarper(top_k)(none, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(none, logits)
    expected = set(logits[0].isfinite().nonzero()[:, 0].tolist())
    params = SamplingParams(max_tokens=1, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = allowed(weights, piece_maxima(weights[None])[0], params)
    assert kept.tolist() == sorted(kept.tolist())
    # At the very edge the two add up in another order.
    assert len(expected.symmetric_difference(kept.tolist())) <= 1


def test_equal_weights_stay_by_token_id() -> None:
    weights = torch.full((5000,), 1 / 5000)
    maxima = piece_maxima(weights[None])[0]
    for changes, count in (({"top_k": 700}, 700), ({"top_p": 0.5}, 2500), ({"min_p": 1.0}, 5000)):
        kept = allowed(weights, maxima, SamplingParams(max_tokens=1, **changes))
        assert abs(len(kept) - count) <= 1
        assert kept.tolist() == list(range(len(kept)))


# --- log probabilities


@some
@given(
    st.integers(0, 1 << 30), st.integers(0, 20), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_log_probabilities_are_those_of_the_models_own_logits(
    seed: int, count: int, dtype: torch.dtype
) -> None:
    logits = some_logits(3, seed).to(dtype)
    expected = logits.float().log_softmax(-1)
    changing = sampler(logprobs=count, temperature=1.7, top_p=0.9, logit_bias={4: 5.0}, seed=seed)
    for row, sampled in enumerate(
        sample(logits, [sampler(logprobs=count), changing, sampler(logprobs=count, min_tokens=9)])
    ):
        assert isinstance(sampled, Sampled)
        found = sampled.logprobs
        assert found is not None
        assert found.logprob == pytest.approx(float(expected[row, sampled.token]), abs=1e-4)
        assert found.rank == int((expected[row] > expected[row, sampled.token]).sum()) + 1
        order = sorted(range(VOCAB_SIZE), key=lambda one, row=row: (-float(logits[row, one]), one))
        assert list(found.top_ids) == order[:count]
        best = expected[row, list(found.top_ids)].tolist()
        assert list(found.top_logprobs) == pytest.approx(best, abs=1e-4)
    assert only(logits[:1], sampler()).logprobs is None


def test_log_probabilities_of_a_prompt() -> None:
    logits = some_logits(40)
    logits[3, 11] = float("-inf")
    ids = [5, 6, 7, 11, *range(36)]
    found = prompt_logprobs(logits, ids, 2)
    expected = logits.log_softmax(-1)
    assert [one.logprob for one in found[:3]] == pytest.approx(
        [float(expected[row, ids[row]]) for row in range(3)], abs=1e-4
    )
    assert (found[3].logprob, found[3].rank) == (-9999.0, VOCAB_SIZE)
    assert found[0].top_ids == tuple(logits[0].topk(2).indices.tolist())
    logits[30, 0] = float("nan")
    with pytest.raises(InvalidLogits):
        prompt_logprobs(logits, ids, 2)


# --- company

some_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 4.0]),
        "top_k": st.sampled_from([0, 0, 5]),
        "top_p": st.sampled_from([1.0, 1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "logit_bias": st.sampled_from([{}, {3: 4.0}]),
        "allowed_token_ids": st.sampled_from([None, None, tuple(range(0, 300, 7))]),
        "min_tokens": st.sampled_from([0, 3]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "seed": st.integers(0, 1000),
    }
)


@some
@given(st.lists(some_params, min_size=1, max_size=5), st.integers(0, 1 << 30), st.data())
def test_a_sequence_is_the_same_in_any_company(
    every: list[dict[str, Any]], seed: int, data: st.DataObject
) -> None:
    """Several steps, of which each has some of the sequences, in some order."""
    logits = some_logits(len(every), seed).to(torch.bfloat16)  # coarse, so that ties occur
    samplers = [sampler(**changes) for changes in every]
    together: list[list[Any]] = [[] for _ in every]
    for _ in range(6):
        rows = data.draw(st.permutations(range(len(every))))[: data.draw(st.integers(1, 5))]
        for row, got in zip(
            rows, sample(logits[rows], [samplers[row] for row in rows]), strict=True
        ):
            assert isinstance(got, Sampled)
            samplers[row].accept(got.token)
            together[row].append(got)
    for row, changes in enumerate(every):
        alone = sampler(**changes)
        for got in together[row]:
            assert only(logits[row : row + 1], alone) == got
            alone.accept(got.token)
