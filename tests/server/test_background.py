"""Tasks that go on as long as the server does: none ends without anybody knowing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from server.background import Background, WorkEnded

TIMEOUT_S = 300.0


def within_timeout(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


@pytest.mark.parametrize("error", [ValueError("no"), OSError(24, "Too many open files")])
def test_work_that_fails_is_told_of_and_begins_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the machine has no more to give, in a line; else with all that is known."""

    async def test() -> None:
        background, done = Background(), asyncio.Event()
        begun = 0

        async def work() -> None:
            nonlocal begun
            begun += 1
            if begun < 3:
                raise error
            done.set()

        background.keep("the watch", work)
        await done.wait()
        assert begun == 3
        await background.close()

    with caplog.at_level(logging.WARNING):
        within_timeout(test)
    told = [record for record in caplog.records if "the watch " in record.getMessage()]
    assert len(told) == 2
    if isinstance(error, OSError):
        assert all("Too many open files" in record.getMessage() for record in told)
        assert not any(record.exc_info for record in told)
    else:
        assert all(record.exc_info for record in told)


@pytest.mark.parametrize("raises", [False, True])
def test_the_end_of_work_that_is_needed_is_the_end(raises: bool) -> None:
    async def test() -> None:
        background = Background()

        async def serve() -> None:
            if raises:
                raise OSError(24, "Too many open files")

        background.need("the HTTP server", serve)
        with pytest.raises(WorkEnded, match="Too many open" if raises else "HTTP server ended"):
            await background.run()
        await background.close()

    within_timeout(test)


def test_the_error_of_a_single_thing_goes_to_who_wanted_it() -> None:
    async def test() -> None:
        background = Background()
        failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

        async def place() -> None:
            raise ValueError("no")

        background.once("placing", place, failed.set_result)
        assert str(await failed) == "no"
        await background.close()

    within_timeout(test)


def test_close_ends_all_of_it() -> None:
    async def test() -> None:
        background = Background()
        cancelled: list[str] = []

        async def work(name: str) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(name)
                # What ends may leave something to do.
                background.once("the rest", asyncio.Event().wait)  # type: ignore[arg-type]
                raise

        background.keep("a", lambda: work("a"))
        background.once("b", lambda: work("b"))
        background.need("c", lambda: work("c"))
        await asyncio.sleep(0)
        await background.close()
        assert sorted(cancelled) == ["a", "b", "c"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    within_timeout(test)
