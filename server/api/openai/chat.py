"""`POST /v1/chat/completions`: messages through the model's chat template; `n` choices."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.openai.admission import Front, Start, end_tokens, new_id, submit_all
from server.api.openai.answer import EventStream, collect
from server.api.openai.body_reader import BodyReader
from server.api.openai.logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from server.api.openai.rendering import num_entries, response
from server.api.openai.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    Usage,
)
from server.api.openai.sampling import sampling_for
from server.api.openai.schemas import ChatRequest
from server.api.openai.sequence import Answer, Delta, TextSequence, merged
from server.api.openai.structured import grammar_for
from server.errors import InvalidRequest
from server.text.chat_template import Chat
from server.text.token_texts import TokenTexts

_OFF_UNLESS_READ: Final = ("enable_thinking", "thinking")
"""Variables of which false asks for what a template does that does not read them."""


def routes(front: Front, bodies: BodyReader) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class())

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        serving = front.generating(body)
        facts = serving.generator.facts
        grammar = await grammar_for(front.grammars, body)
        ids = await serving.text.encode_chat(
            _chat(body),
            context_tokens=facts.max_model_len,
            add_special_tokens=bool(body.add_special_tokens),
        )
        starts = [
            Start(
                ids, sampling, serving.text.detokenizer(ids if body.continue_final_message else ())
            )
            for sampling in sampling_for(
                body,
                len(ids),
                # The newer name of the two goes first, as with vLLM: clients send both.
                max_tokens=body.max_completion_tokens or body.max_tokens,
                grammar=grammar,
                prompt_logprobs=body.prompt_logprobs,
                facts=facts,
                stop_token_ids=end_tokens(body, serving.text),
                defaults=serving.sampling_defaults,
                param="messages",
            )
        ]
        chat_id, created = new_id("chatcmpl"), int(time.time())
        sequences = await submit_all(serving, body, front.options(body, request), chat_id, starts)
        tokens = serving.text.tokens
        if body.stream:
            template = ChatChunk(id=chat_id, created=created, model=serving.model_name, choices=[])
            return EventStream(_events(template, body, sequences, tokens), sequences)
        answers = await collect(request, sequences)

        def reply() -> ChatCompletion:
            found = answers[0].prompt_logprobs
            count = body.prompt_logprobs
            return ChatCompletion(
                id=chat_id,
                created=created,
                model=serving.model_name,
                choices=[
                    ChatChoice(
                        index=index,
                        message=AssistantMessage(content=answer.text),
                        logprobs=_logprobs(body, answer, tokens),
                        finish_reason=answer.finish_reason,
                        token_ids=answer.token_ids if body.return_token_ids else None,
                    )
                    for index, answer in enumerate(answers)
                ],
                usage=Usage.of(
                    len(ids),
                    sum(len(answer.token_ids) for answer in answers),
                    sequences[0].num_cached,
                ),
                prompt_token_ids=ids if body.return_token_ids else None,
                prompt_logprobs=(
                    None if count is None else prompt_logprobs(ids, found, tokens, count)
                ),
            )

        return await response(reply, num_entries(answers))

    return router


def _chat(body: ChatRequest) -> Chat:
    """What the template is asked for."""
    variables = dict(body.chat_template_kwargs or {})
    needed = {
        name: "chat_template_kwargs"
        for name, value in variables.items()
        if value is not None and not (value is False and name in _OFF_UNLESS_READ)
    }
    needed |= {name: name for name in ("tools", "documents") if getattr(body, name)}
    if body.reasoning_effort is not None:
        if variables.setdefault("reasoning_effort", body.reasoning_effort) != body.reasoning_effort:
            raise InvalidRequest(
                "'reasoning_effort' and 'chat_template_kwargs' ask for two efforts. Keep one.",
                param="chat_template_kwargs",
            )
        needed["reasoning_effort"] = "reasoning_effort"
    if body.add_generation_prompt is False and not body.continue_final_message:
        needed["add_generation_prompt"] = "add_generation_prompt"
    return Chat(
        messages=[message.for_template() for message in body.messages],
        tools=body.tools,
        documents=body.documents,
        variables=variables,
        needed=needed,
        add_generation_prompt=body.add_generation_prompt is not False,
        continues_last=bool(body.continue_final_message),
    )


def _logprobs(body: ChatRequest, piece: Delta | Answer, tokens: TokenTexts) -> ChatLogprobs | None:
    if not body.logprobs:
        return None
    return chat_logprobs(piece.token_ids[: len(piece.logprobs)], piece.logprobs, tokens)


async def _events(
    template: ChatChunk,
    body: ChatRequest,
    sequences: Sequence[TextSequence],
    tokens: TokenTexts,
) -> AsyncGenerator[ChatChunk, None]:
    def chunk(choice: ChatChunkChoice) -> ChatChunk:
        return template.model_copy(update={"choices": [choice]})

    for index, sequence in enumerate(sequences):
        first = chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))
        if body.return_token_ids and index == 0:
            first.prompt_token_ids = list(sequence.prompt_ids)
        yield first
    num_completion = 0
    async with aclosing(merged(sequences)) as deltas:
        async for index, delta in deltas:
            num_completion += len(delta.token_ids)
            tells = delta.text or delta.finish_reason or body.return_token_ids
            if not (tells or delta.logprobs):
                continue
            yield chunk(
                ChatChunkChoice(
                    index=index,
                    delta=ChatDelta(content=delta.text or None),
                    logprobs=_logprobs(body, delta, tokens),
                    finish_reason=delta.finish_reason,
                    token_ids=list(delta.token_ids) if body.return_token_ids else None,
                )
            )
    if body.include_usage:
        first_one = sequences[0]
        usage = Usage.of(len(first_one.prompt_ids), num_completion, first_one.num_cached)
        yield template.model_copy(update={"usage": usage})
