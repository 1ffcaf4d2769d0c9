"""Whether a request can be answered at all, which is decided before it starts, and its start.

Invariant: of a request's sequences all are started or none. Knows neither how prompts become tokens
nor what becomes of the answer.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import uuid4

from fastapi import Request

from server.api.cells import Cells
from server.api.grammar_checks import GrammarChecks
from server.api.openai.schemas import GenerationRequest
from server.api.openai.sequence import TextSequence
from server.cache_salt import CacheSalts
from server.errors import InvalidRequest, UnknownModel
from server.generation import NO_ADVICE, Generator, RequestOptions, SamplingDefaults
from server.text.text import Text
from workers.messages import SamplingParams, Task

_OTHER_TASK: Final[Mapping[Task, str]] = {
    "generate": "The model {!r} generates text, and makes no embeddings. Serve a model that does.",
    "embed": "The model {!r} makes embeddings, and generates no text. Use /v1/embeddings.",
}
"""By what the model is for."""


@dataclass(frozen=True)
class Serving:
    """All that the HTTP side needs: the one model that is served, and how. A request keeps to the
    one that it began with, also where another is served meanwhile."""

    generator: Generator
    text: Text
    model_name: str
    created: int  # when the server began to serve it, in seconds since 1970
    cells: Cells
    grammars: GrammarChecks
    sampling_defaults: SamplingDefaults = NO_ADVICE
    salts: CacheSalts = field(default_factory=CacheSalts)

    def options(self, body: GenerationRequest, request: Request) -> RequestOptions:
        """What the request says of itself."""
        authorization = request.headers.get("authorization")
        salt = self.salts.salt(body.cache_salt or "", authorization)
        return RequestOptions(body.priority or 0, body.deadline_s, salt)


Current = Callable[[], Serving]
"""What is served now."""


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"


def check_request(serving: Serving, request: GenerationRequest) -> None:
    """Raises `UnknownModel`, `InvalidRequest` or `NotReady`."""
    check_model(serving, request.model)
    request.check_supported()
    check_task(serving, "generate")


def check_task(serving: Serving, task: Task) -> None:
    """Raises `InvalidRequest` where the model is for something else, or `NotReady`."""
    own = serving.generator.facts.task
    if own != task:
        raise InvalidRequest(_OTHER_TASK[own].format(serving.model_name), param="model")


def check_model(serving: Serving, name: str) -> None:
    """Raises `UnknownModel`."""
    if name != serving.model_name:
        raise UnknownModel(
            f"The model {name[:200]!r} isn't served here. Served is {serving.model_name!r}.",
            param="model",
        )


async def submit_all(
    serving: Serving,
    body: GenerationRequest,
    options: RequestOptions,
    request_id: str,
    prompts: Sequence[tuple[Sequence[int], SamplingParams]],
) -> list[TextSequence]:
    """Starts a sequence for each prompt: all, or, with the error of the first that failed, none."""
    started: list[TextSequence] = []
    try:
        for index, (ids, sampling) in enumerate(prompts):
            own_id = request_id if len(prompts) == 1 else f"{request_id}-{index}"
            stream = await serving.generator.submit(own_id, ids, sampling, options)
            started.append(
                TextSequence(
                    stream,
                    serving.text.detokenizer(),
                    body.stops,
                    ids,
                    min_tokens=sampling.min_tokens,
                )
            )
            await asyncio.sleep(0)  # many long prompts must not hold up everybody else
    except BaseException:
        await close_all(started)
        raise
    return started


async def close_all(sequences: Sequence[TextSequence]) -> None:
    for sequence in sequences:
        await sequence.aclose()
