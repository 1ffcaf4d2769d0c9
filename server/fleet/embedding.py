"""The texts of one request, spread over the instances.

Owns the cut into parts and their order. Invariants: texts of like length go together, so that an
instance pads little; no more than a few parts of a request are on an instance at a time, so that
others' come between; if one part fails, the others are aborted. Does not know text or HTTP.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from server.fleet.requests import Embedding
from workers.messages import MAX_EMBED_INPUTS

PART_TOKENS: Final = 1024
"""Of a part, unless one text has more: some passes of an instance."""
_PARTS_PER_INSTANCE: Final = 2
"""One is computed, the next waits there."""


class Placer(Protocol):
    """The router, as far as it is needed here."""

    @property
    def num_ready(self) -> int:
        """Instances that answer requests now."""

    async def place_embedding(
        self, request_id: str, inputs: Sequence[Sequence[int]], dimensions: int, epoch: int
    ) -> Embedding:
        """Start a part of a request that was admitted."""


def cut(lengths: Sequence[int]) -> list[list[int]]:
    """Indices into `lengths`, in parts of at most `PART_TOKENS` and `MAX_EMBED_INPUTS`, the longest
    texts first: what is left at the end, where one instance may work alone, is short."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    parts: list[list[int]] = []
    room = 0
    for index in order:
        if not parts or lengths[index] > room or len(parts[-1]) == MAX_EMBED_INPUTS:
            parts.append([])
            room = PART_TOKENS
        parts[-1].append(index)
        room -= lengths[index]
    return parts


async def embed(
    placer: Placer,
    request_id: str,
    inputs: Sequence[Sequence[int]],
    dimensions: int,
    epoch: int,
) -> list[bytes]:
    """The vectors of `inputs`, in their order, by the model of that `epoch`. Raises ServerError; if
    cancelled, all is aborted."""
    vectors: list[bytes] = [b""] * len(inputs)
    parts = list(enumerate(cut([len(one) for one in inputs])))
    parts.reverse()

    async def work() -> None:
        while parts:
            number, indices = parts.pop()
            part = await placer.place_embedding(
                f"{request_id}-{number}", [inputs[index] for index in indices], dimensions, epoch
            )
            try:
                for index, vector in zip(indices, await part.vectors(), strict=True):
                    vectors[index] = vector
            finally:
                await part.aclose()

    num_workers = min(len(parts), max(1, placer.num_ready) * _PARTS_PER_INSTANCE)
    workers = [asyncio.create_task(work()) for _ in range(num_workers)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return vectors
