"""Replies as JSON, without holding up the event loop however large they are.

Owns the decision what is made aside. Invariant: no call into C is about more than `_AT_ONCE`
entries of a list, so that the interpreter's lock changes hands meanwhile. Knows no endpoint.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import pydantic_core
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from server.api.openai.replies import Reply
from server.api.openai.sequence import Answer, Delta

T = TypeVar("T")

_INLINE: Final = 64
"""Entries of log probabilities; each has up to 21 tokens."""
_IDS_PER_ENTRY: Final = 16
_AT_ONCE: Final = 64


async def aside(work: Callable[[], T], num_entries: int) -> T:
    """The result of `work`, which is about so many entries; in a thread if these are many."""
    return work() if num_entries <= _INLINE else await asyncio.to_thread(work)


async def response(made: Callable[[], Reply], num_entries: int) -> Response:
    """A whole answer, made and written aside where it is large."""
    if num_entries <= _INLINE:
        return JSONResponse(made().model_dump())
    content = await asyncio.to_thread(lambda: json_of(made()))
    return Response(content, media_type="application/json")


async def event(reply: Reply, num_entries: int) -> Reply | bytes:
    """One of a stream; written already, aside, where it is large."""
    return reply if num_entries <= _INLINE else await asyncio.to_thread(json_of, reply)


def num_entries(pieces: Iterable[Delta | Answer]) -> int:
    """Of log probabilities, and what as many of them take as plain token ids do."""
    return sum(
        len(one.logprobs) + len(one.prompt_logprobs) + len(one.token_ids) // _IDS_PER_ENTRY
        for one in pieces
    )


def json_of(reply: BaseModel) -> bytes:
    """As `model_dump_json` makes it, piece by piece."""
    return b"".join(_pieces(reply))


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, BaseModel):
        yield from _members(value)
    elif isinstance(value, list) and len(value) > _AT_ONCE:
        for start in range(0, len(value), _AT_ONCE):
            inner = pydantic_core.to_json(value[start : start + _AT_ONCE])[1:-1]
            yield b"%b%b" % (b"," if start else b"[", inner)
        yield b"]"
    elif isinstance(value, list):
        yield b"["
        for index, one in enumerate(value):
            yield b"," if index else b""
            yield from _pieces(one)
        yield b"]"
    else:
        yield pydantic_core.to_json(value)


def _members(model: BaseModel) -> Iterator[bytes]:
    optional = model.left_out if isinstance(model, Reply) else frozenset[str]()
    before = b"{"
    for name in type(model).model_fields:
        value = getattr(model, name)
        if value is None and name in optional:
            continue
        yield b'%b"%b":' % (before, name.encode())
        yield from _pieces(value)
        before = b","
    yield b"{}" if before == b"{" else b"}"
