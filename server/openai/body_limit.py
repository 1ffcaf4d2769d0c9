"""The bound on request bodies, kept before anything reads them.

Invariant: no more than `max_bytes` of a body (and one piece of the transport's) is ever in memory,
and a body that declares more is refused without being read. Knows nothing of what bodies hold.
"""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.openai.errors import too_large


class BodyLimit:
    """ASGI middleware. FastAPI's own parameter for this answers in plain text, and versions that
    don't know it yet accept it in silence."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._max_bytes:
            await too_large(self._max_bytes)(scope, receive, send)
            return
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                # Met where the body is parsed, which lets this kind of exception pass.
                raise HTTPException(413)
            return message

        await self._app(scope, bounded, send)
