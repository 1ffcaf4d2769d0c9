"""Guesses at the next tokens, against the plain definition."""

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.drafts import propose


def plain(token_ids: list[int], most: int) -> tuple[int, ...]:
    """Behind the latest earlier occurrence of the longest ending of 4, 3 or 2 tokens."""
    for length in (4, 3, 2):
        for start in range(len(token_ids) - length - 1, -1, -1):
            if token_ids[start : start + length] == token_ids[-length:]:
                return tuple(token_ids[start + length : start + length + most])
    return ()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, 256, 65536, 1 << 24, (1 << 31) - 1]), max_size=30),
    st.integers(1, 6),
)
def test_a_guess_is_what_followed_last_time(token_ids: list[int], most: int) -> None:
    assert propose(token_ids, most) == plain(token_ids, most)


def test_the_longest_ending_and_its_latest_occurrence_count() -> None:
    assert propose([1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4], 2) == (9, 3)
    assert propose([3, 4, 9, 3, 4, 8, 3, 4], 3) == (8, 3, 4)
    assert propose([5, 5, 5, 5, 5, 5], 4) == (5,)
    assert propose([1, 2, 3], 4) == ()
    assert propose([], 4) == ()


def test_what_lies_too_far_back_is_not_looked_for() -> None:
    assert propose([7, 8, 9, *range(100, 4194), 7, 8], 1) == ()
    assert propose([7, 8, 9, *range(100, 4191), 7, 8], 1) == (9,)
