"""How an answer travels: as one body or as server-sent events, and what happens if nobody waits.

Owns the life of a request's sequences from their start on. Invariant: they are closed once the
response is sent, has failed, or the client has gone, in whatever way the task ends. Knows nothing
of what the bodies hold.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.api.openai.admission import close_all
from server.api.openai.errors import error_reply
from server.api.openai.sequence import Answer, Delta, TextSequence, merged
from server.errors import ServerError

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


async def collect(request: Request, sequences: Sequence[TextSequence]) -> list[Answer]:
    """Waits for the ends of all sequences. Raises `ClientDisconnect` if the client goes first, and
    what a sequence raises; all are closed afterwards."""
    try:
        return await while_connected(request, _collect(sequences))
    finally:
        with anyio.CancelScope(shield=True):
            await close_all(sequences)


async def _collect(sequences: Sequence[TextSequence]) -> list[Answer]:
    deltas: list[list[Delta]] = [[] for _ in sequences]
    async with aclosing(merged(sequences)) as arriving:
        async for index, delta in arriving:
            deltas[index].append(delta)
    return [_joined(of_one) for of_one in deltas]


def _joined(deltas: Sequence[Delta]) -> Answer:
    reason = deltas[-1].finish_reason
    assert reason is not None  # noqa: S101 - what a sequence promises of its last delta
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    return Answer(
        text="".join(delta.text for delta in deltas),
        token_ids=token_ids,
        finish_reason=reason,
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(StreamingResponse):
    """Bodies as server-sent events, then `[DONE]`; or, if the source fails, its error, and an end.
    Those that are bytes are JSON already.

    `events` is closed, and then `sequences`, however the response ends: the client may go while an
    event is being sent, where no generator would notice.
    """

    def __init__(
        self, events: AsyncGenerator[BaseModel | bytes, None], sequences: Sequence[TextSequence]
    ) -> None:
        # No proxy may collect or store what is meant to come at once.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._frames = _framed(events)
        super().__init__(self._frames, media_type="text/event-stream", headers=headers)
        self._events = events
        self._sequences = sequences

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()

    async def _close(self) -> None:
        try:
            await self._frames.aclose()
            await self._events.aclose()
        finally:
            await close_all(self._sequences)


async def _framed(events: AsyncGenerator[BaseModel | bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for event in events:
            yield b"data: %b\n\n" % _json(event)
    except Exception as error:  # noqa: BLE001 - the status is sent, only an event can tell
        if isinstance(error, ServerError):
            _log.warning("a stream failed: %s", error.message)
        else:
            _log.exception("a stream failed")
        yield b"data: %b\n\n" % error_reply(error).model_dump_json().encode()
        return
    yield b"data: [DONE]\n\n"


def _json(event: BaseModel | bytes) -> bytes:
    return event if isinstance(event, bytes) else event.model_dump_json().encode()
