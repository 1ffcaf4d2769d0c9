"""How a request's body arrives: counted while it comes, and read where it can do no harm.

Owns the bounds on bodies. Invariants: no body is kept further than its bytes and the number of its
values are within bounds; what all bodies that are on their way take is bounded; and none holds up
the event loop, since one that is not small lies outside of our memory and is read in a cell. Knows
nothing of what bodies mean (`server.api.openai.bodies`).
"""

import inspect
import os
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from server.api.openai.admission import Front
from server.api.openai.bodies import cell_options, parsed, received
from server.api.openai.cells import Lane, TooMuch
from server.api.openai.schemas import Body
from server.errors import BodyTooLarge, Overloaded, UnsupportedMediaType
from workers import Grant

AnyBody = TypeVar("AnyBody", bound=Body)

INLINE_BYTES: Final = 1 << 16
INLINE_VALUES: Final = 4096
"""Up to that many, in so many bytes, are read where the event loop runs: some milliseconds."""
_OTHER_VALUES: Final = 1 << 16
"""The most that all parameters can hold beside prompts: a JSON schema has the most of them."""
_ON_THE_WAY_BYTES: Final = 256 << 20
"""Of all bodies that are not small."""
_GRANT: Final = Grant(cpu_s=10.0, memory_bytes=1 << 30, stack_bytes=8 << 20, nice=10)
_WALL_S: Final = 120.0
_AT_ONCE: Final = 2
_WAITING: Final = 64
_RETRY_AFTER_S: Final = 2
_ESCAPED: Final = re.compile(rb"\\.", re.DOTALL)
_NO_STRUCTURE: Final = bytes(sorted(set(range(256)) - set(b'",[{')))


class ValueCount:
    """How many values a JSON text holds, at most, as its bytes come: the commas, brackets and
    braces outside of its strings. Linear in the bytes, by a few passes in C."""

    def __init__(self) -> None:
        self.num_values = 1
        self._in_string = False
        self._in_escape = False

    def feed(self, piece: bytes) -> None:
        if self._in_escape and piece:
            self._in_escape, piece = False, piece[1:]
        if b"\\" in piece:
            piece = _ESCAPED.sub(b"", piece)
            if piece.endswith(b"\\"):
                self._in_escape, piece = True, piece[:-1]
        parts = piece.translate(None, _NO_STRUCTURE).split(b'"')
        self.num_values += sum(map(len, parts[1 if self._in_string else 0 :: 2]))
        if len(parts) % 2 == 0:
            self._in_string = not self._in_string


@dataclass
class _OnTheWay:
    """What all bodies that are not small take."""

    num_bytes: int = 0


@dataclass
class _Arriving:
    """One body. What is not small goes to a file in memory, which can be handed to a cell."""

    on_the_way: _OnTheWay
    count: ValueCount = field(default_factory=ValueCount)
    num_bytes: int = 0
    file: int | None = None
    _pieces: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            os.close(self.file)
            self.on_the_way.num_bytes -= self.num_bytes

    def feed(self, piece: bytes) -> None:
        """Raises `Overloaded`."""
        self.count.feed(piece)
        self._pieces.append(piece)
        self.num_bytes += len(piece)
        is_large = self.num_bytes > INLINE_BYTES or self.count.num_values > INLINE_VALUES
        try:
            if self.file is not None:
                self._spool(self.file, len(piece))
            elif is_large:
                self.file = os.memfd_create("onecopy-body")
                self._spool(self.file, self.num_bytes)
        except OSError as error:  # no descriptor, no memory
            raise Overloaded(
                f"The request's body can't be taken now: {error.strerror}. Try again.",
                retry_after_s=_RETRY_AFTER_S,
            ) from error

    def _spool(self, file: int, num_new: int) -> None:
        self.on_the_way.num_bytes += num_new
        if self.on_the_way.num_bytes > _ON_THE_WAY_BYTES:
            raise Overloaded(
                "The bodies of requests that are on their way take more than "
                f"{_ON_THE_WAY_BYTES >> 20} MiB, which is all that this server takes: try again.",
                retry_after_s=_RETRY_AFTER_S,
            )
        left = memoryview(b"".join(self._pieces))
        self._pieces.clear()
        while left:
            left = left[os.write(file, left) :]

    def content(self) -> bytes:
        """Of one that is small."""
        return b"".join(self._pieces)


class BodyReader:
    """Reads the bodies of a server's requests."""

    def __init__(self, front: Front, max_bytes: int) -> None:
        self._front = front
        self._max_bytes = max_bytes
        self._on_the_way = _OnTheWay()
        self._lane = Lane("large bodies of requests", _AT_ONCE, _WAITING)

    async def read(self, request: Request, schema: type[AnyBody]) -> AnyBody:
        """Raises `InvalidRequest`, `BodyTooLarge`, `UnsupportedMediaType`, `NotReady`,
        `Overloaded`, or `ClientDisconnect`."""
        _check_type(request)
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._max_bytes:
            raise self._too_large()
        max_tokens = self._front.max_model_len()
        most_values = schema.most_values(max_tokens) + _OTHER_VALUES
        with _Arriving(self._on_the_way) as arriving:
            async for piece in request.stream():
                arriving.feed(piece)
                if arriving.num_bytes > self._max_bytes:
                    raise self._too_large()
                if arriving.count.num_values > most_values:
                    raise BodyTooLarge(
                        f"The request's body holds more than {most_values} values, which is more "
                        "than this model can be asked for at once. Send less."
                    )
            if arriving.file is None:
                return parsed(schema, arriving.content())
            options = cell_options(schema, max_tokens, self._front.max_chars(max_tokens))
            try:
                answer = await self._front.cells.run(
                    "body", arriving.file, options, _GRANT, _WALL_S, self._lane
                )
            except TooMuch as excess:
                raise BodyTooLarge(
                    f"Reading the request's body takes more {excess.bound} than it is granted. "
                    "Send less."
                ) from None
        return await received(schema, answer)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            "The request's body is larger than this server takes. The limit is "
            f"{self._max_bytes} bytes. Send less."
        )

    def route_class(self) -> type[APIRoute]:
        """For endpoints whose parameter `body` is a schema: it is read here, not by FastAPI."""
        reader = self

        class BodyRoute(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()
                schema = inspect.signature(self.endpoint).parameters["body"].annotation

                async def read_first(request: Request) -> Response:
                    body = await reader.read(request, schema)
                    return await handle(_ReadRequest(request, body))

                return read_first

        return BodyRoute


class _ReadRequest(Request):
    """One whose body was read and checked: to FastAPI it is what it would have made of it."""

    def __init__(self, request: Request, body: Body) -> None:
        super().__init__(request.scope, request.receive)
        self._checked = body

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> Body:
        return self._checked


def _check_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.+\+)?json", content_type):
        # A web page may send other types to any address without asking first; JSON it may not.
        raise UnsupportedMediaType(
            "Send the request as JSON, with the header 'Content-Type: application/json'."
        )
