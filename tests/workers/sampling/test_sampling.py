"""The choice of a token: its distribution, and what it may depend on."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import InvalidLogits
from workers.messages import SamplingParams
from workers.sampling import SequenceSampler, Tokens
from workers.sampling import sample as sample_batch
from workers.sampling.random_number import uniform

VOCAB_SIZE = 50


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, **changes})


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], indices: Iterable[int]
) -> list[int | InvalidLogits]:
    """Tokens of sequences that have generated `indices[i]` tokens, of which nothing depends."""
    samplers = [
        SequenceSampler(one, Tokens([0] * (1 + index), 1), logits.shape[-1], ())
        for one, index in zip(params, indices, strict=True)
    ]
    return [
        one if isinstance(one, InvalidLogits) else one.token
        for one in sample_batch(logits, samplers)
    ]


def some_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def draws(logits: torch.Tensor, count: int, **changes: Any) -> torch.Tensor:
    """How often each token is drawn from one row in `count` draws with as many indices."""
    same = [params(**changes)] * count
    tokens = sample(logits.expand(count, -1), same, range(count))
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


def test_random_numbers_are_those_of_splitmix64() -> None:
    # The first outputs of the generator for seed 0, as published with the algorithm.
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniform(0, index) for index in range(3)] == [(x >> 11) * 2.0**-53 for x in outputs]


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 40))
def test_random_numbers_are_in_range_and_reproducible(seed: int, index: int) -> None:
    number = uniform(seed, index)
    assert 0 <= number < 1
    assert number == uniform(seed, index)


def test_neighbouring_seeds_and_indices_are_unrelated() -> None:
    numbers = torch.tensor(
        [[uniform(seed, index) for index in range(300)] for seed in range(300)],
        dtype=torch.float64,
    )
    assert len(set(numbers.flatten().tolist())) == numbers.numel()
    assert abs(float(numbers.mean()) - 0.5) < 0.005
    assert float(torch.corrcoef(numbers).triu(1).abs().max()) < 0.35
    assert float(torch.corrcoef(numbers.T).triu(1).abs().max()) < 0.35


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = some_logits(8)
    assert sample(logits, [params(temperature=0.0)] * 8, range(8)) == logits.argmax(-1).tolist()
    for almost in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}):
        assert sample(logits, [params(**almost)] * 8, range(8)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits, count = some_logits(1) / 3, 5000
    expected = (logits[0].double() / temperature).softmax(0) * count
    got = draws(logits, count, temperature=temperature)
    often = expected >= 5
    chi_squared = float(((got - expected) ** 2 / expected)[often].sum())
    degrees = int(often.sum()) - 1
    assert chi_squared < degrees + 4 * (2 * degrees) ** 0.5


def test_filters_keep_just_the_likeliest() -> None:
    logits = some_logits(1)
    order = logits[0].argsort(descending=True)
    got = draws(logits, 2000, top_k=5, temperature=3.0)
    assert set(got.nonzero()[:, 0].tolist()) == set(order[:5].tolist())
    cumulative = logits[0].double().softmax(0)[order].cumsum(0)
    kept = int((cumulative < 0.8).sum()) + 1
    got = draws(logits, 2000, top_p=0.8)
    assert set(got.nonzero()[:, 0].tolist()) == set(order[:kept].tolist())
    # top_p counts within what top_k has left.
    within = logits[0][order[:4]].double().softmax(0).cumsum(0)
    kept = int((within < 0.6).sum()) + 1
    got = draws(logits, 2000, top_p=0.6, top_k=4)
    assert set(got.nonzero()[:, 0].tolist()) == set(order[:kept].tolist())


def by_sorting_all(row: torch.Tensor, one: SamplingParams, index: int) -> int:
    """Temperature and filters as their definitions say, on the whole vocabulary in order."""
    order = sorted(range(row.numel()), key=lambda token: (-float(row[token]), token))
    weights = (row.double() / one.temperature).softmax(0)[order]
    kept = int((weights >= one.min_p * weights[0]).sum())
    kept = min(kept, one.top_k or kept)
    weights = weights[:kept]
    before = weights.cumsum(0) - weights
    kept = int((before < one.top_p * weights.sum()).sum())
    chosen = torch.tensor(sorted(order[:kept]))
    weights = (row.double() / one.temperature).softmax(0)[chosen]
    passed = weights.cumsum(0) <= uniform(one.seed, index) * weights.sum()
    return int(chosen[int(passed.sum())])


@pytest.mark.parametrize("spread", [0.5, 5.0])  # top_p among the first tokens, and beyond them
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 3},
        {"top_k": 700},
        {"top_k": 90, "top_p": 0.7},
        {"min_p": 0.02},
        {"min_p": 1e-6, "top_k": 4600, "top_p": 0.95, "temperature": 2.0},
    ],
)
def test_filters_on_a_large_vocabulary(spread: float, changes: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    row = spread * torch.randn(5000, generator=generator).to(torch.bfloat16)  # with many ties
    one = params(seed=3, **changes)
    got = sample(row.expand(40, -1), [one] * 40, range(40))
    assert got == [by_sorting_all(row.float(), one, index) for index in range(40)]


@given(st.integers(0, 1 << 40), st.data())
def test_a_row_alone_gives_the_same_token(seed: int, data: st.DataObject) -> None:
    every = data.draw(
        st.lists(
            st.builds(
                params,
                temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
                top_k=st.sampled_from([0, 1, 7, 1000]),
                top_p=st.sampled_from([0.1, 0.9, 1.0]),
                seed=st.integers(0, 1000),
            ),
            min_size=1,
            max_size=6,
        )
    )
    logits = some_logits(len(every), seed).to(torch.bfloat16)  # coarse, so that ties occur
    indices = [3 * row for row in range(len(every))]
    together = sample(logits, every, indices)
    for row, one in enumerate(every):
        assert sample(logits[row : row + 1], [one], [indices[row]]) == [together[row]]


def test_a_bad_row_is_an_error_for_that_row_only() -> None:
    logits = some_logits(5)
    whole = sample(logits, [params()] * 5, range(5))
    logits[0, 3] = float("nan")
    logits[2, 0] = float("inf")
    logits[3] = float("-inf")
    got = sample(
        logits, [params(), params(), params(temperature=0.0), params(), params()], range(5)
    )
    assert [isinstance(token, InvalidLogits) for token in got] == [True, False, True, True, False]
    assert (got[1], got[4]) == (whole[1], whole[4])


def test_a_token_without_weight_is_never_drawn() -> None:
    logits = torch.full((1, VOCAB_SIZE), float("-inf"))
    logits[0, 7] = logits[0, 9] = 1.0
    for changes in ({}, {"top_p": 0.99}, {"top_k": 10}):
        assert set(draws(logits, 300, **changes).nonzero()[:, 0].tolist()) == {7, 9}


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB_SIZE), [], []) == []
