"""Whether a request can be answered at all, which is decided before it starts, and its start.

Invariant: of a request's sequences all are started or none. Knows neither how prompts become tokens
nor what becomes of the answer.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from fastapi import Request

from server.api.openai.cells import Cells
from server.api.openai.grammar_checks import GrammarChecks
from server.api.openai.schemas import GenerationRequest
from server.api.openai.sequence import TextSequence
from server.cache_salt import CacheSalts
from server.errors import InvalidRequest, NotReady, UnknownModel
from server.generation import RequestOptions
from server.models.serving import Serving
from server.text.incremental import Detokenizer
from server.text.text import Text
from workers.messages import SamplingParams, Task

_OTHER_TASK: Final[Mapping[Task, str]] = {
    "generate": "The model {!r} generates text, and makes no embeddings. Serve a model that does.",
    "embed": "The model {!r} makes embeddings, and generates no text. Use /v1/embeddings.",
}
"""By what the model is for."""


Current = Callable[[], Mapping[str, Serving]]
"""What is served now, by name."""


@dataclass(frozen=True)
class Front:
    """What the endpoints have in common, whichever models they are for."""

    current: Current
    cells: Cells
    grammars: GrammarChecks
    salts: CacheSalts

    def named(self, name: str) -> Serving:
        """As it is now: a request keeps to what it got here. Raises `UnknownModel`."""
        served = self.current()
        if name not in served:
            raise UnknownModel.among(served, name)
        return served[name]

    def max_model_len(self) -> int:
        """Of the model that takes the most: which one a request names is known once it is read.
        Raises `NotReady` where none is ready."""
        known: list[int] = []
        problem = NotReady("no model is served yet")
        for one in self.current().values():
            try:
                known.append(one.generator.facts.max_model_len)
            except NotReady as error:
                problem = error
        if not known:
            raise problem
        return max(known)

    def max_chars(self, context_tokens: int) -> int:
        """As `Text.max_chars`, of the model of which it is most."""
        return max(one.text.max_chars(context_tokens) for one in self.current().values())

    def generating(self, body: GenerationRequest) -> Serving:
        """The model that is to generate the answer. Raises `UnknownModel`, `InvalidRequest` or
        `NotReady`."""
        serving = self.named(body.model)
        body.check_supported()
        check_task(serving, "generate")
        return serving

    def options(self, body: GenerationRequest, request: Request) -> RequestOptions:
        """What the request says of itself."""
        authorization = request.headers.get("authorization")
        salt = self.salts.salt(body.cache_salt or "", authorization)
        return RequestOptions(body.priority or 0, body.deadline_s, salt)


@dataclass(frozen=True)
class Start:
    """One sequence that is to begin: what it goes on from, how, and what makes text of it."""

    token_ids: Sequence[int]
    sampling: SamplingParams
    detokenizer: Detokenizer


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"


def check_task(serving: Serving, task: Task) -> None:
    """Raises `InvalidRequest` where the model is for something else, or `NotReady`."""
    own = serving.generator.facts.task
    if own != task:
        raise InvalidRequest(_OTHER_TASK[own].format(serving.model_name), param="model")


def end_tokens(body: GenerationRequest, text: Text) -> list[int]:
    """What ends an answer beside `stop_token_ids`: the model's ends, and stop strings that are
    special tokens, which no text shows."""
    named = [text.special_ids[stop] for stop in body.stops if stop in text.special_ids]
    return [*named, *(() if body.ignore_eos else text.stop_token_ids)]


def _named_in(stops: Sequence[str], text: Text) -> dict[int, str]:
    """The special tokens that stop strings name, which no text shows."""
    if not stops:
        return {}
    return {
        token_id: name
        for token_id, name in text.special_texts.items()
        if any(name in stop for stop in stops)
    }


async def submit_all(
    serving: Serving,
    body: GenerationRequest,
    options: RequestOptions,
    request_id: str,
    starts: Sequence[Start],
) -> list[TextSequence]:
    """Starts them: all, or, with the error of the first that failed, none."""
    hidden = _named_in(body.stops, serving.text)
    started: list[TextSequence] = []
    try:
        for index, start in enumerate(starts):
            own_id = request_id if len(starts) == 1 else f"{request_id}-{index}"
            ids, sampling = start.token_ids, start.sampling
            stream = await serving.generator.submit(own_id, ids, sampling, options)
            started.append(
                TextSequence(
                    stream,
                    start.detokenizer,
                    body.stops,
                    ids,
                    min_tokens=sampling.min_tokens,
                    hidden=hidden,
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
