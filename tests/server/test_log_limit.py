"""A log is bounded, and says what it leaves out."""

import logging

import pytest

from server.log_limit import LogLimit


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def record(message: str, *arguments: object, name: str = "onecopy.server") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 1, message, arguments, None)


def test_one_kind_of_message_is_bounded_and_counted(clock: _Clock) -> None:
    limit = LogLimit(most=3, window_s=10, clock=clock)
    passed = [limit.filter(record("no %d", number)) for number in range(100)]
    assert passed == [True] * 3 + [False] * 97
    assert limit.filter(record("another"))
    clock.now = 10.0
    next_one = record("no %d", 100)
    assert limit.filter(next_one)
    assert next_one.getMessage() == "no 100 (97 more like it were left out)"
    after = record("no %d", 101)
    assert limit.filter(after)
    assert after.getMessage() == "no 101"


def test_lines_of_requests_are_not_bounded(clock: _Clock) -> None:
    limit = LogLimit(most=3, window_s=10, clock=clock)
    assert all(limit.filter(record("GET", name="uvicorn.access")) for _ in range(100))


def test_what_is_counted_is_bounded_too(clock: _Clock) -> None:
    limit = LogLimit(most=1, window_s=10, clock=clock)
    for number in range(10_000):
        assert limit.filter(record(f"message {number}"))
    assert len(limit._windows) <= 512
