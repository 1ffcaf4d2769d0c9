"""A sequence's answers on their way to who waits for them, whichever instances they come from."""

import asyncio
from typing import Any

import pytest

from server.errors import InstanceFailed, InvalidRequest
from server.fleet.requests import Stream
from server.generation import Chunk
from workers.messages import Output, SamplingParams, TokenLogprobs


class Nobody:
    async def abort(self, request: Any) -> None:
        raise AssertionError("a stream that ends by itself is not aborted")


def entry(number: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-float(number), rank=number + 1)


def output(*token_ids: int, prompt: tuple[int, ...] = (), **changes: Any) -> Output:
    return Output(
        request_id="a",
        token_ids=token_ids,
        logprobs=tuple(map(entry, token_ids)),
        prompt_logprobs=tuple(map(entry, prompt)),
        **changes,
    )


def stream() -> Stream:
    params = SamplingParams(max_tokens=9, logprobs=0, prompt_logprobs=0)
    return Stream(Nobody(), "a", (10, 11, 12, 13), params)


async def chunks(one: Stream) -> list[Chunk]:
    return [chunk async for chunk in one]


def test_what_is_said_of_a_prompt_comes_once_and_whole() -> None:
    async def test() -> None:
        one = stream()
        assert not one.take(output(prompt=(11,)))
        one.message()  # its instance ended: another one begins anew
        assert not one.take(output(prompt=(11, 12)))
        # That one gave it up for a while, and began again.
        assert not one.take(output(prompt=(11, 12)))
        assert not one.take(output(5, prompt=(13,)))
        one.message()
        assert not one.take(output(prompt=(11, 12, 13)))
        assert one.take(output(6, 7, finish_reason="length"))
        first, last = await chunks(one)
        assert first.token_ids == (5,)
        assert first.logprobs == (entry(5),)
        assert first.prompt_logprobs == (entry(11), entry(12), entry(13))
        assert last.logprobs == (entry(6), entry(7))
        assert last.prompt_logprobs == ()

    asyncio.run(test())


def test_who_is_to_blame_is_told() -> None:
    async def test() -> None:
        for invalid, expected in ((True, InvalidRequest), (False, InstanceFailed)):
            one = stream()
            assert one.take(output(finish_reason="error", error="no way", invalid=invalid))
            with pytest.raises(expected, match="no way"):
                await chunks(one)

    asyncio.run(test())
