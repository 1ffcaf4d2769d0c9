"""What a request says of the choice of tokens, as the parameters that an instance takes.

Invariant: what passes fits into the model's context and vocabulary, whatever the model answers.
Knows neither how prompts become tokens nor what becomes of the answer.
"""

import secrets
from collections.abc import Sequence
from typing import Final, TypeVar

from server.api.openai.schemas import GenerationRequest
from server.errors import ContextLengthExceeded, InvalidRequest
from server.generation import SamplingDefaults
from workers.messages import GrammarSpec, ModelFacts, SamplingParams

_SEED_BITS: Final = 63
Number = TypeVar("Number", int, float)


def sampling_for(
    request: GenerationRequest,
    num_prompt_tokens: int,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None = None,
    grammar: GrammarSpec | None,
    prompt_logprobs: int | None,
    facts: ModelFacts,
    stop_token_ids: Sequence[int],
    defaults: SamplingDefaults,
    param: str,
) -> list[SamplingParams]:
    """The parameters of each choice for one prompt; `max_tokens` None means: what fits, up to
    `default_max_tokens`. The i-th has the seed of the first plus i. `stop_token_ids`: what ends an
    answer beside those that the request names.

    Raises `InvalidRequest` for a prompt without tokens (`param` names it) and for tokens that the
    model doesn't have, and `ContextLengthExceeded` with the figures.
    """
    left = check_fits(num_prompt_tokens, facts, param, max_tokens or 1, bool(max_tokens))
    _check_token_rules(request, facts)
    max_tokens = max_tokens or min(left, default_max_tokens or left)
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {request.min_tokens}, but there can be no more than {max_tokens}.",
            param="min_tokens",
        )
    stop_ids = {*(request.stop_token_ids or ()), *stop_token_ids}
    seed = secrets.randbits(_SEED_BITS) if request.seed is None else request.seed
    return [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(request.temperature, defaults.temperature),
            top_p=_or(request.top_p, defaults.top_p),
            top_k=max(_or(request.top_k, defaults.top_k), 0),
            min_p=_or(request.min_p, defaults.min_p),
            repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            allowed_token_ids=(
                None if request.allowed_token_ids is None else tuple(request.allowed_token_ids)
            ),
            seed=(seed + choice) & ((1 << _SEED_BITS) - 1),
            stop_token_ids=tuple(sorted(stop_ids)),
            min_tokens=request.min_tokens or 0,
            ignore_eos=bool(request.ignore_eos),
            logprobs=request.num_logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )
        for choice in range(request.num_choices)
    ]


def check_fits(
    num_prompt_tokens: int,
    facts: ModelFacts,
    param: str,
    num_wanted: int = 0,
    is_asked_for: bool = False,
) -> int:
    """How many tokens the context has left behind a prompt. Raises `InvalidRequest` for one without
    tokens, and `ContextLengthExceeded` where fewer are left than `num_wanted`."""
    if num_prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty: it has no tokens.", param=param)
    left = facts.max_model_len - num_prompt_tokens
    if left < num_wanted:
        asked = f" and max_tokens is {num_wanted}" if is_asked_for else ""
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt_tokens} tokens{asked}, and the model's context holds "
            f"{facts.max_model_len} in all. Shorten the prompt{' or the answer' * bool(asked)}.",
            param=param,
        )
    return left


def check_token_ids(token_ids: Sequence[int], facts: ModelFacts, param: str = "prompt") -> None:
    """Raises `InvalidRequest` for an id that the model doesn't have."""
    if token_ids and max(token_ids) >= facts.vocab_size:
        raise InvalidRequest(
            f"The token id {max(token_ids)} is too large: the model has {facts.vocab_size}.",
            param=param,
        )


def _check_token_rules(request: GenerationRequest, facts: ModelFacts) -> None:
    check_token_ids(list(map(int, request.logit_bias or ())), facts, "logit_bias")
    check_token_ids(request.allowed_token_ids or (), facts, "allowed_token_ids")


def _or(asked: Number | None, default: Number) -> Number:
    return default if asked is None else asked
