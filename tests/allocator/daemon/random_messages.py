"""Random messages that are valid, made from what msgspec knows of their types.

Owns the choice of values: mostly such as were seen on the wire under the same name, so that what is
asked for often exists; else the bounds of the type, and numbers near them. Invariant: what is made
decodes. A message type that is added is covered by itself. Knows nothing of what messages mean.
"""

import random
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec
from msgspec import inspect

from allocator.messages import Message

INTERESTING = (0, 1, 2, 255, 4096, 65536, 1 << 20, (1 << 32) - 1, 1 << 61, (1 << 62) - 1, 1 << 62)
WAITS_MS = (0, 0, 1, 15)
"""Long waits would only make the test wait."""
MOST_ITEMS = 8
"""Of a collection whose bound is higher, mostly."""


class RandomMessages:
    """Messages by the dice, the same for the same seed and the same answers."""

    def __init__(self, chance: random.Random, known: Mapping[str, Sequence[Any]]):
        """`known` by field: values that are used often, so that messages meet."""
        self._chance = chance
        self._known = known
        self._seen: dict[type, deque[dict[str, Any]]] = {}
        self._infos: dict[type, inspect.StructType] = {}

    def message(self, kind: type[Message]) -> Message:
        """One of this type."""
        if kind not in self._infos:
            info = inspect.type_info(kind)
            assert isinstance(info, inspect.StructType)
            self._infos[kind] = info
        return self._struct(self._infos[kind])

    def learn(self, request: Message | None, reply: msgspec.Struct) -> None:
        """Use what was asked for and answered again, together where it came together."""
        asked = next(_records(request, {}))[1] if request is not None else {}
        for kind, record in islice(_records(reply, asked), 50):
            # The kind that was seen last comes last.
            self._seen[kind] = self._seen.pop(kind, deque(maxlen=MOST_ITEMS))
            self._seen[kind].append(record)

    def _struct(self, info: inspect.StructType) -> Any:
        names = {field.name for field in info.fields}
        alike = [records for records in self._seen.values() if len(names & records[-1].keys()) >= 2]
        record: dict[str, Any] = {}
        if alike and self._chance.random() < 0.7:
            records = alike[-1] if self._chance.random() < 0.5 else self._chance.choice(alike)
            record = records[-1] if self._chance.random() < 0.7 else self._chance.choice(records)
        fields = {}
        for field in info.fields:
            if field.name in record and _fits(record[field.name], field.type):
                fields[field.name] = record[field.name]
            elif field.required or self._chance.random() < 0.2:
                fields[field.name] = self._value(field.name, field.type)
        return info.cls(**fields)

    def _value(self, name: str, info: inspect.Type) -> Any:
        if name == "wait_ms":
            return self._chance.choice(WAITS_MS)
        if name in self._known and self._chance.random() < 0.85:
            value = self._chance.choice(self._known[name])
            if _fits(value, info):
                return value
        return self._fresh(name, info)

    def _fresh(self, name: str, info: inspect.Type) -> Any:
        match info:
            case inspect.IntType(ge=least, le=most):
                return self._number(least or 0, most if most is not None else 1 << 62)
            case inspect.FloatType():
                return self._chance.choice((0.0, -1.0, 1e300))
            case inspect.BoolType():
                return self._chance.random() < 0.5
            case inspect.StrType(min_length=least, max_length=most):
                return self._text(least or 0, most if most is not None else 100)
            case inspect.BytesType(min_length=least, max_length=most):
                length = self._length(least or 0, most if most is not None else 100)
                return self._chance.randbytes(length)
            case inspect.LiteralType(values=values):
                return self._chance.choice(values)
            case inspect.NoneType():
                return None
            case inspect.UnionType(types=types):
                return self._fresh(name, self._chance.choice(types))
            case inspect.VarTupleType(item_type=item, min_length=least, max_length=most):
                length = self._length(least or 0, most if most is not None else 100)
                return tuple(self._value(name.removesuffix("s"), item) for _ in range(length))
            case inspect.DictType(key_type=key, value_type=value, max_length=most):
                length = self._length(0, most if most is not None else 100)
                return {
                    self._fresh(f"{name} key", key): self._fresh(f"{name} value", value)
                    for _ in range(length)
                }
            case inspect.StructType():
                return self._struct(info)
            case _:
                raise AssertionError(f"no way to make a {info}")

    def _number(self, least: int, most: int) -> int:
        if self._chance.random() < 0.3:
            return self._chance.choice((least, most, min(least + 1, most), max(most - 1, least)))
        return min(max(self._chance.choice(INTERESTING), least), most)

    def _length(self, least: int, most: int) -> int:
        if self._chance.random() < 0.02:
            return self._chance.choice((least, most))
        return self._chance.randint(least, min(most, least + MOST_ITEMS))

    def _text(self, least: int, most: int) -> str:
        letters = self._chance.choice(("k", "\0", "/", "\N{SNOWMAN}", "\N{PILE OF POO}", "\n"))
        return letters * self._length(max(least, 1), most) if most else ""


def _records(value: Any, around: dict[str, Any]) -> Iterator[tuple[type, dict[str, Any]]]:
    """Of every struct inside a message the fields that hold no others, with those around it."""
    if isinstance(value, tuple):
        for item in value:
            yield from _records(item, around)
    if not isinstance(value, msgspec.Struct):
        return
    fields = {name: getattr(value, name) for name in value.__struct_fields__}
    plain = {k: v for k, v in fields.items() if not isinstance(v, tuple | msgspec.Struct)}
    record = {**around, **plain}
    yield type(value), record
    for inner in fields.values():
        yield from _records(inner, record)


def _fits(value: Any, info: inspect.Type) -> bool:
    """Whether a value that was seen under a name can be one of this type."""
    match info:
        case inspect.IntType(ge=least, le=most):
            if type(value) is not int:
                return False
            return (least is None or value >= least) and (most is None or value <= most)
        case inspect.StrType(min_length=least, max_length=most):
            return isinstance(value, str) and (least or 0) <= len(value) <= (most or 1 << 30)
        case inspect.BytesType(min_length=least, max_length=most):
            return isinstance(value, bytes) and (least or 0) <= len(value) <= (most or 1 << 30)
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.LiteralType(values=values):
            return value in values
        case inspect.StructType(cls=cls):
            return isinstance(value, cls)
        case inspect.DictType():
            return isinstance(value, dict)
        case inspect.UnionType(types=types):
            return any(_fits(value, one) for one in types)
        case inspect.NoneType():
            return value is None
        case _:
            return False


def spoiled(chance: random.Random, payload: bytes) -> bytes:
    """A valid message with some bits flipped, cut off, repeated, or with numbers exchanged."""
    data = bytearray(payload)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = chance.randrange(len(data)) if data else 0
        match chance.randrange(9):
            case 0 | 1 | 5 | 6 | 7 if data:
                data[place] ^= 1 << chance.randrange(8)
            case 2:
                del data[place:]
            case 3:
                data[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                data += data[place:]
            case _:
                number = struct.pack(">BQ", 0xCF, chance.getrandbits(64))  # msgpack's uint 64
                data[place : place + len(number)] = number
    return bytes(data)
