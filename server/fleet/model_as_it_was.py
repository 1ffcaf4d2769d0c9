"""The model as it was when a request came, whatever is loaded in its place meanwhile.

Owns nothing but the moment: the router does what is asked.
"""

from collections.abc import Sequence

from server.fleet.requests import Stream
from server.fleet.router import Router
from server.generation import NO_OPTIONS, RequestOptions
from workers.messages import SamplingParams


class ModelAsItWas:
    """The router, for requests for the model as it is at one moment, whatever is loaded later. See
    `server.generation.Generator`."""

    def __init__(self, router: Router):
        self._router = router
        self._epoch = router.epoch
        self.facts = router.facts

    @property
    def num_ready(self) -> int:
        return self._router.num_ready

    @property
    def asleep(self) -> bool:
        return self._router.asleep

    async def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
    ) -> Stream:
        return await self._router.submit(request_id, token_ids, sampling, options, self._epoch)

    async def embed(
        self, request_id: str, inputs: Sequence[Sequence[int]], dimensions: int = 0
    ) -> list[bytes]:
        return await self._router.embed(request_id, inputs, dimensions, self._epoch)
