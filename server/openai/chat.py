"""`POST /v1/chat/completions`: messages through the model's chat template; one choice."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.openai.admission import Serving, check_request, new_id, sampling_for, submit_all
from server.openai.answer import EventStream, collect
from server.openai.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatRequest,
    Usage,
)
from server.openai.sequence import TextSequence


def routes(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        check_request(serving, body)
        facts = serving.generator.facts
        ids = await serving.text.encode_chat_async(
            _messages(body), context_tokens=facts.max_model_len
        )
        sampling = sampling_for(
            body,
            len(ids),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            facts=facts,
            stop_token_ids=serving.text.stop_token_ids,
            defaults=serving.sampling_defaults,
            param="messages",
        )
        chat_id, created = new_id("chatcmpl"), int(time.time())
        [sequence] = await submit_all(serving, body, chat_id, [(ids, sampling)])
        if body.stream:
            template = ChatChunk(id=chat_id, created=created, model=serving.model_name, choices=[])
            return EventStream(_events(template, body, sequence), [sequence])
        [answer] = await collect(request, [sequence])
        reply = ChatCompletion(
            id=chat_id,
            created=created,
            model=serving.model_name,
            choices=[
                ChatChoice(
                    index=0,
                    message=AssistantMessage(content=answer.text),
                    finish_reason=answer.finish_reason,
                    token_ids=answer.token_ids if body.return_token_ids else None,
                )
            ],
            usage=Usage.of(len(ids), len(answer.token_ids)),
            prompt_token_ids=ids if body.return_token_ids else None,
        )
        return JSONResponse(reply.model_dump())

    return router


def _messages(body: ChatRequest) -> list[dict[str, str]]:
    """As templates expect them: content is a string, and "developer" is the newer name of a role
    that most templates know as "system"."""
    messages = []
    for index, message in enumerate(body.messages):
        message.check_supported(index)
        role = "system" if message.role == "developer" else message.role
        plain = {"role": role, "content": message.text}
        if message.name is not None:
            plain["name"] = message.name
        messages.append(plain)
    return messages


async def _events(
    template: ChatChunk, body: ChatRequest, sequence: TextSequence
) -> AsyncGenerator[ChatChunk, None]:
    def chunk(choice: ChatChunkChoice) -> ChatChunk:
        return template.model_copy(update={"choices": [choice]})

    first = chunk(ChatChunkChoice(index=0, delta=ChatDelta(role="assistant", content="")))
    if body.return_token_ids:
        first.prompt_token_ids = list(sequence.prompt_ids)
    yield first
    num_completion = 0
    async with aclosing(sequence.deltas()) as deltas:
        async for delta in deltas:
            num_completion += len(delta.token_ids)
            if not (delta.text or delta.finish_reason or body.return_token_ids):
                continue
            yield chunk(
                ChatChunkChoice(
                    index=0,
                    delta=ChatDelta(content=delta.text or None),
                    finish_reason=delta.finish_reason,
                    token_ids=list(delta.token_ids) if body.return_token_ids else None,
                )
            )
    if body.include_usage:
        usage = Usage.of(len(sequence.prompt_ids), num_completion)
        yield template.model_copy(update={"usage": usage})
