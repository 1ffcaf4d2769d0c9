"""Whether answers that began before a moment are still on their way."""

import asyncio
from typing import Any

from server.models.in_flight import InFlight


def test_what_began_before_counts_until_it_has_ended() -> None:
    async def test() -> None:
        in_flight, go_on = InFlight(), asyncio.Event()

        async def app(*_: Any) -> None:
            await go_on.wait()

        async def begun() -> asyncio.Task[None]:
            task = asyncio.create_task(in_flight.run(app, {}, Any, Any))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            return task

        first = await begun()
        mark = in_flight.mark()
        second = await begun()
        later = in_flight.mark()
        assert (in_flight.num_before(mark), in_flight.num_before(later)) == (1, 2)
        go_on.set()
        await asyncio.gather(first, second)
        assert (in_flight.num_before(mark), in_flight.num_before(later)) == (0, 0)

    asyncio.run(test())
