"""A request's body, from bytes to a checked request; by the event loop or, where it is large, in a
cell.

Owns the reading of JSON, the wording of what is wrong with a body, and the form in which a cell
hands a large one on: piece by piece, so that no piece holds up the event loop for long. Invariant:
both ways give the same request or the same error. Knows nothing of HTTP, nor how bytes arrive.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from pydantic import ValidationError

from server.api.openai.chat_messages import Message
from server.api.openai.embedding_schemas import EmbeddingRequest
from server.api.openai.schemas import Body, ChatRequest, CompletionRequest, texts_or_ids
from server.errors import ContextLengthExceeded, InvalidRequest

AnyBody = TypeVar("AnyBody", bound=Body)

_SCHEMAS: Final[Mapping[str, type[Body]]] = {
    schema.__name__: schema for schema in (CompletionRequest, ChatRequest, EmbeddingRequest)
}
_ERRORS: Final[Mapping[str, type[InvalidRequest]]] = {
    error.__name__: error for error in (InvalidRequest, ContextLengthExceeded)
}
_MAX_FIELDS: Final = 256
"""Known and unknown ones."""
_MAX_REST_BYTES: Final = 1 << 18
"""Of a large body without what makes it large: more than all parameters together can take."""
_AT_ONCE: Final = 256
"""Messages that are looked at before others have their turn."""
_TYPE_NAMES: Final = frozenset({"str", "int", "float", "bool", "dict"})


def parsed(schema: type[AnyBody], content: bytes) -> AnyBody:
    """Raises `InvalidRequest`, which names what is wrong."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body isn't valid JSON at character {error.pos}: {error.msg}."
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body isn't UTF-8 at byte {error.start}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError:  # a number of thousands of digits
        raise InvalidRequest("The body holds a number that is too long.") from None
    if isinstance(value, dict) and len(value) > _MAX_FIELDS:
        raise InvalidRequest(f"The body has {len(value)} fields; at most {_MAX_FIELDS} are taken.")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise _what_is_invalid(error.errors(include_url=False, include_input=False)) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None


def _what_is_invalid(details: Sequence[Any]) -> InvalidRequest:
    """The first wrong field, with all that is allowed in its place."""
    param = _param(details[0]["loc"])
    reasons: dict[str, None] = {}
    for detail in details:
        if len(reasons) < 5 and _param(detail["loc"]) == param:
            is_extra = detail["type"] == "extra_forbidden"
            reasons[f"{detail['loc'][-1]!r} isn't known" if is_extra else detail["msg"]] = None
    text = "; or: ".join(reasons)
    message = f"{param}: {text}." if param else f"The body is wrong: {text}."
    return InvalidRequest(message, param=param)


def _param(loc: Sequence[int | str]) -> str | None:
    """`messages[0].content` of a location; what names a branch of a union isn't part of it."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _TYPE_NAMES or not re.fullmatch(r"[a-z_][a-z0-9_]*", part):
            break
        else:
            path += f".{part}" if path else part
    return path or None


# --- large ones


class _Reading(msgspec.Struct, frozen=True):
    """What a cell found: an error, or the request without its long part, and that in pieces."""

    error: str = ""
    message: str = ""
    param: str | None = None
    rest: bytes = b""
    pieces: list[msgspec.Raw] = []
    is_list: bool = True
    """Whether the long part is the list of its pieces; else it is the only piece."""


_reading: msgspec.msgpack.Decoder[_Reading] = msgspec.msgpack.Decoder(_Reading)


def cell_options(schema: type[Body], max_tokens: int, max_chars: int) -> dict[str, Any]:
    """What a cell must know to read a body of this schema: no prompt of more than `max_tokens`
    token ids or `max_chars` characters can be answered."""
    return {"schema": schema.__name__, "max_tokens": max_tokens, "max_chars": max_chars}


def read_in_cell(content: bytes, options: Mapping[str, Any]) -> bytes:
    """What `received` takes. Never raises for what is wrong with the body."""
    try:
        body = parsed(_SCHEMAS[options["schema"]], content)
        body.check_supported()
        body.check_lengths(options["max_tokens"], options["max_chars"])
        reading = _in_pieces(body)
    except InvalidRequest as error:
        reading = _failed(error)
    return msgspec.msgpack.encode(reading)


def _in_pieces(body: Body) -> _Reading:
    rest = _json(body, {body.LONG, *(body.model_extra or ())})
    if len(rest) > _MAX_REST_BYTES:
        raise InvalidRequest(
            f"Apart from {body.LONG!r} the body takes {len(rest)} bytes; at most "
            f"{_MAX_REST_BYTES} are taken."
        )
    long = getattr(body, body.LONG)
    each = long if isinstance(body, ChatRequest) else texts_or_ids(long)
    try:
        pieces = [msgspec.Raw(_packed(one)) for one in each]
    except UnicodeEncodeError:
        raise _half_a_pair(body.LONG) from None
    return _Reading(rest=rest, pieces=pieces, is_list=each is long)


def _json(body: Body, left_out: set[str]) -> bytes:
    try:
        return body.model_dump_json(by_alias=True, exclude_unset=True, exclude=left_out).encode()
    except ValueError:  # pydantic's own kind
        raise _half_a_pair(None) from None


def _packed(one: str | list[int] | Message) -> bytes:
    if not isinstance(one, Message):
        return msgspec.msgpack.encode(one)
    # What is ignored was looked at, and is not needed any more. As JSON, which has numbers that
    # msgpack has not.
    known = one.model_dump(exclude_unset=True, exclude={*(one.model_extra or ())})
    return msgspec.msgpack.encode(json.dumps(known, ensure_ascii=False))


def _half_a_pair(param: str | None) -> InvalidRequest:
    what = "The body" if param is None else repr(param)
    return InvalidRequest(f"{what} holds half of a surrogate pair, which is no text.", param=param)


def _failed(error: InvalidRequest) -> _Reading:
    message = error.message.encode(errors="replace").decode()
    return _Reading(error=type(error).__name__, message=message, param=error.param)


async def received(schema: type[AnyBody], answer: bytes) -> AnyBody:
    """The request that a cell has read; others have their turn meanwhile. Raises
    `InvalidRequest`."""
    reading = _reading.decode(answer)
    if reading.error:
        raise _ERRORS[reading.error](reading.message, param=reading.param)
    is_chat = issubclass(schema, ChatRequest)
    pieces: list[Any] = []
    for number, piece in enumerate(reading.pieces):
        value = msgspec.msgpack.decode(piece)
        pieces.append(Message.model_validate(json.loads(value)) if is_chat else value)
        if not is_chat or number % _AT_ONCE == 0:
            await asyncio.sleep(0)
    long = pieces if reading.is_list else pieces[0]
    # Messages that were looked at are taken as they are; of ids and text each would be looked at
    # once more, so these are put in afterwards.
    body = schema.model_validate({**json.loads(reading.rest), schema.LONG: long if is_chat else ""})
    setattr(body, schema.LONG, long)
    return body
