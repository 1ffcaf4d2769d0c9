"""Every error that leaves the server as an OpenAI error body.

Owns the way from an exception to status, headers and body; which error has which status is
`server.errors`'. Invariant: an exception that nobody
expected is told to the log, and to the client only that it happened. Knows no endpoint.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.openai.replies import ErrorBody, ErrorReply
from server.errors import ServerError

_log = logging.getLogger(__name__)

DEFAULT_RETRY_AFTER_S: Final = 1
CLIENT_CLOSED_REQUEST: Final = 499
"""Nobody receives it; it is for the access log."""


def error_reply(error: Exception) -> ErrorReply:
    """The body for an error; anything but a `ServerError` gives away nothing of itself."""
    if isinstance(error, ServerError):
        return _reply(error.message, error.kind, error.param, error.code)
    return _reply("The server failed to answer this request.", "server_error", None, None)


def misdirected(host: str) -> Response:
    """The answer to a request for a name that is not ours."""
    message = (
        f"This server is not called {host[:200]!r}. Use its address, or start it with "
        "--allowed-host NAME."
    )
    reply = _reply(message, "invalid_request_error", None, "host_not_allowed")
    return _response(HTTPStatus.MISDIRECTED_REQUEST, reply)


def plain_error(message: str, kind: str) -> bytes:
    """The body for what is refused before there is a request."""
    return _reply(message, kind, None, None).model_dump_json().encode()


def _reply(message: str, kind: str, param: str | None, code: str | None) -> ErrorReply:
    # A message may quote the request, which may hold half a surrogate pair: JSON can't.
    message = message.encode(errors="replace").decode()
    return ErrorReply(error=ErrorBody(message=message, type=kind, param=param, code=code))


def _response(
    status: int, reply: ErrorReply, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(reply.model_dump(), status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Makes the app answer all errors in this way."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_middleware(CatchUnexpected)


async def _server_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)  # noqa: S101 - it is registered for that
    headers = {}
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(error.retry_after_s or DEFAULT_RETRY_AFTER_S)
    return _response(error.status, error_reply(error), headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for that
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"There is nothing at {request.method} {request.url.path}."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} doesn't take {request.method}."
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return _response(error.status_code, _reply(message, kind, None, None), error.headers)


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


class CatchUnexpected:
    """ASGI middleware: an exception that nobody handled becomes a line in the log and a 500.

    A handler for `Exception` would not do: starlette raises it again after the answer, and the HTTP
    server then ends a connection on which the client may be sending its next request.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise  # half an answer can only be broken off
            _log.exception("%s %s failed", scope["method"], scope["path"])
            await _response(HTTPStatus.INTERNAL_SERVER_ERROR, error_reply(error))(
                scope, receive, send
            )
