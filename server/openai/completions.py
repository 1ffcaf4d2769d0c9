"""`POST /v1/completions`: prompts as text or token ids; each is a choice of the answer."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.errors import InvalidRequest
from server.openai.admission import (
    Serving,
    check_request,
    check_token_ids,
    new_id,
    sampling_for,
    submit_all,
)
from server.openai.answer import EventStream, collect
from server.openai.schemas import Completion, CompletionChoice, CompletionRequest, Usage
from server.openai.sequence import TextSequence, merged

DEFAULT_MAX_TOKENS: Final = 16


def routes(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_request(serving, body)
        facts = serving.generator.facts
        prompts = [
            (
                ids,
                sampling_for(
                    body,
                    len(ids),
                    max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
                    facts=facts,
                    stop_token_ids=serving.text.stop_token_ids,
                    defaults=serving.sampling_defaults,
                    param="prompt",
                ),
            )
            for ids in await _prompt_ids(serving, body)
        ]
        template = Completion(
            id=new_id("cmpl"), created=int(time.time()), model=serving.model_name, choices=[]
        )
        sequences = await submit_all(serving, body, template.id, prompts)
        if body.stream:
            return EventStream(_events(template, body, sequences), sequences)
        return await _whole(template, body, request, sequences)

    return router


async def _prompt_ids(serving: Serving, body: CompletionRequest) -> list[list[int]]:
    facts, prompt = serving.generator.facts, body.prompt
    prompts: Sequence[str | int | list[int]] = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    all_ids: list[list[int]] = []
    own: list[int] = []  # of a prompt that is a plain list of ids
    for part in prompts:
        if isinstance(part, str):
            all_ids.append(
                await serving.text.encode_async(part, context_tokens=facts.max_model_len)
            )
        elif isinstance(part, int):
            own.append(part)
        else:
            all_ids.append(part)
    if own:
        all_ids.append(own)
    for ids in all_ids:
        check_token_ids(ids, facts)
    return all_ids


async def _whole(
    template: Completion,
    body: CompletionRequest,
    request: Request,
    sequences: Sequence[TextSequence],
) -> Response:
    answers = await collect(request, sequences)
    choices = [
        CompletionChoice(
            index=index,
            text=answer.text,
            finish_reason=answer.finish_reason,
            token_ids=answer.token_ids if body.return_token_ids else None,
            prompt_token_ids=list(sequence.prompt_ids) if body.return_token_ids else None,
        )
        for index, (sequence, answer) in enumerate(zip(sequences, answers, strict=True))
    ]
    usage = Usage.of(
        sum(len(sequence.prompt_ids) for sequence in sequences),
        sum(len(answer.token_ids) for answer in answers),
    )
    reply = template.model_copy(update={"choices": choices, "usage": usage})
    return JSONResponse(reply.model_dump())


async def _events(
    template: Completion, body: CompletionRequest, sequences: Sequence[TextSequence]
) -> AsyncGenerator[Completion, None]:
    num_completion, begun = 0, set[int]()
    async with aclosing(merged(sequences)) as deltas:
        async for index, delta in deltas:
            num_completion += len(delta.token_ids)
            if not (delta.text or delta.finish_reason or body.return_token_ids):
                continue
            choice = CompletionChoice(
                index=index, text=delta.text, finish_reason=delta.finish_reason
            )
            if body.return_token_ids:
                choice.token_ids = list(delta.token_ids)
                if index not in begun:
                    choice.prompt_token_ids = list(sequences[index].prompt_ids)
                    begun.add(index)
            yield template.model_copy(update={"choices": [choice]})
    if body.include_usage:
        num_prompt = sum(len(sequence.prompt_ids) for sequence in sequences)
        yield template.model_copy(update={"usage": Usage.of(num_prompt, num_completion)})
