"""Whether a request can be answered at all, and with what parameters: decided before it starts.

Invariant: what passes fits into the model's context, whatever the model answers. Knows neither how
prompts become tokens nor what becomes of the answer.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import uuid4

from server.errors import ContextLengthExceeded, InvalidRequest, UnknownModel
from server.generation import NO_ADVICE, Generator, SamplingDefaults
from server.openai.schemas import GenerationRequest
from server.openai.sequence import TextSequence
from server.text import Text
from workers.messages import ModelFacts, SamplingParams, Task

_SEED_BITS: Final = 63
_OTHER_TASK: Final[Mapping[Task, str]] = {
    "generate": "The model {!r} generates text, and makes no embeddings. Serve a model that does.",
    "embed": "The model {!r} makes embeddings, and generates no text. Use /v1/embeddings.",
}
"""By what the model is for."""
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Serving:
    """All that the HTTP side needs: the one model that is served, and how."""

    generator: Generator
    text: Text
    model_name: str
    created: int  # when the server began to serve it, in seconds since 1970
    sampling_defaults: SamplingDefaults = NO_ADVICE


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


def sampling_for(
    request: GenerationRequest,
    num_prompt_tokens: int,
    *,
    max_tokens: int | None,
    facts: ModelFacts,
    stop_token_ids: Sequence[int],
    defaults: SamplingDefaults,
    param: str,
) -> SamplingParams:
    """The parameters of one sequence; `max_tokens` None means: what fits.

    Raises `InvalidRequest` for a prompt without tokens (`param` names it), and
    `ContextLengthExceeded` with the figures.
    """
    if num_prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty: it has no tokens.", param=param)
    left = facts.max_model_len - num_prompt_tokens
    if left < 1 or (max_tokens or 1) > left:
        asked = f" and max_tokens is {max_tokens}" if max_tokens else ""
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt_tokens} tokens{asked}, and the model's context holds "
            f"{facts.max_model_len} in all. Shorten the prompt{' or the answer' * bool(asked)}.",
            param=param,
        )
    ignore_eos = bool(request.ignore_eos)
    stop_ids = {*(request.stop_token_ids or ()), *(() if ignore_eos else stop_token_ids)}
    seed = secrets.randbits(_SEED_BITS) if request.seed is None else request.seed
    return SamplingParams(
        max_tokens=max_tokens or left,
        temperature=_or(request.temperature, defaults.temperature),
        top_p=_or(request.top_p, defaults.top_p),
        top_k=max(_or(request.top_k, defaults.top_k), 0),
        seed=seed & ((1 << _SEED_BITS) - 1),
        stop_token_ids=tuple(sorted(stop_ids)),
        ignore_eos=ignore_eos,
    )


def _or(asked: Number | None, default: Number) -> Number:
    return default if asked is None else asked


def check_token_ids(token_ids: Sequence[int], facts: ModelFacts, param: str = "prompt") -> None:
    """Raises `InvalidRequest` for an id that the model doesn't have."""
    if token_ids and max(token_ids) >= facts.vocab_size:
        raise InvalidRequest(
            f"The token id {max(token_ids)} is too large: the model has {facts.vocab_size}.",
            param=param,
        )


async def submit_all(
    serving: Serving,
    request: GenerationRequest,
    request_id: str,
    prompts: Sequence[tuple[Sequence[int], SamplingParams]],
) -> list[TextSequence]:
    """Starts a sequence for each prompt: all, or, with the error of the first that failed, none."""
    started: list[TextSequence] = []
    try:
        for index, (ids, sampling) in enumerate(prompts):
            own_id = request_id if len(prompts) == 1 else f"{request_id}-{index}"
            stream = await serving.generator.submit(own_id, ids, sampling)
            started.append(TextSequence(stream, serving.text.detokenizer(), request.stops, ids))
    except BaseException:
        await close_all(started)
        raise
    return started


async def close_all(sequences: Sequence[TextSequence]) -> None:
    for sequence in sequences:
        await sequence.aclose()
