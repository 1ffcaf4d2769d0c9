"""`POST /v1/embeddings`: texts or token ids in, a vector for each out."""

import base64
import sys
from array import array
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.openai.admission import Front, check_task, new_id
from server.api.openai.answer import while_connected
from server.api.openai.body_reader import BodyReader
from server.api.openai.embedding_schemas import EmbeddingList, EmbeddingRequest
from server.api.openai.sampling import check_token_ids
from server.api.openai.schemas import texts_or_ids
from server.errors import ContextLengthExceeded, InvalidRequest
from server.models.serving import Serving
from workers.messages import ModelFacts


def routes(front: Front, bodies: BodyReader) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class())

    @router.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        serving = front.named(body.model)
        check_task(serving, "embed")
        body.check_supported()
        facts = serving.generator.facts
        if (body.dimensions or 0) > facts.embedding_size:
            raise InvalidRequest(
                f"The model's vectors have {facts.embedding_size} dimensions, not "
                f"{body.dimensions}. Ask for fewer.",
                param="dimensions",
            )
        inputs = await _input_ids(serving, body, facts)
        vectors = await while_connected(
            request, serving.generator.embed(new_id("embd"), inputs, body.dimensions or 0)
        )
        # Not by way of the models of the schema, which would look at every number.
        encode = _in_base64 if body.encoding_format == "base64" else _as_numbers
        num_tokens = sum(map(len, inputs))
        reply = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(vector)}
                for index, vector in enumerate(vectors)
            ],
            "model": serving.model_name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return Response(msgspec.json.encode(reply), media_type="application/json")

    return router


async def _input_ids(
    serving: Serving, body: EmbeddingRequest, facts: ModelFacts
) -> list[list[int]]:
    """Of each input. Raises `InvalidRequest` where one is empty, too long, or not the model's."""
    limit = facts.max_model_len
    cut = body.truncate_prompt_tokens
    if cut is not None and cut > limit:
        raise InvalidRequest(
            f"'truncate_prompt_tokens' is {cut}, and the model takes at most {limit} tokens.",
            param="truncate_prompt_tokens",
        )
    truncate_to = limit if cut == -1 else cut
    given = texts_or_ids(body.input)
    if not given or "" in given:
        raise InvalidRequest("The input is empty.", param="input")
    texts = [one for one in given if isinstance(one, str)]
    inputs = [one for one in given if isinstance(one, list)]
    for ids in inputs:
        check_token_ids(ids, facts, param="input")
    inputs = [ids[:truncate_to] for ids in inputs]
    if texts:
        inputs = await serving.text.encode_inputs(
            texts, context_tokens=limit, truncate_to=truncate_to
        )
    for index, ids in enumerate(inputs):
        if not ids:
            raise InvalidRequest(f"The input of index {index} has no tokens.", param="input")
        if len(ids) > limit:
            raise ContextLengthExceeded(
                f"The input of index {index} has {len(ids)} tokens, and the model takes at most "
                f"{limit}. Shorten it, or set 'truncate_prompt_tokens' to -1.",
                param="input",
            )
    return inputs


def _as_numbers(vector: bytes) -> list[float]:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _in_base64(vector: bytes) -> Any:
    return base64.b64encode(vector).decode()
