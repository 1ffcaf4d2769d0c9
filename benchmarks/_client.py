"""Streaming requests to an OpenAI-compatible server, each piece with the time at which it came.

The reader does as little as it can while tokens come, since it runs on the cores that are measured:
one read, one clock, no JSON. Pieces are parsed when the stream has ended.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LIMIT_BYTES = 1 << 20


@dataclass
class Stream:
    """One answer. `pieces` are (time of arrival, number of tokens); times are perf_counter's."""

    sent_at: float
    pieces: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    num_cached: int | None = None
    """Prompt tokens that a prefix cache gave; None where the server does not say."""

    @property
    def num_tokens(self) -> int:
        """How many came."""
        return sum(count for _, count in self.pieces)

    @property
    def ended_at(self) -> float:
        """When the last token came."""
        return self.pieces[-1][0]

    @property
    def ttft_ms(self) -> float:
        """From sending the request to its first token."""
        return (self.pieces[0][0] - self.sent_at) * 1000

    @property
    def itl_ms(self) -> list[float]:
        """The gaps between tokens; tokens that came together share the gap before them."""
        gaps = []
        for (before, _), (at, count) in zip(self.pieces, self.pieces[1:], strict=False):
            gaps += [(at - before) * 1000 / count] * count
        return gaps


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids that SmolLM2's vocabulary knows as ordinary text."""
    return [rng.randrange(1000, 40000) for _ in range(num_tokens)]


def completion(model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """The body that onecopy and vLLM take: greedy, no early end, every token told."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def llamacpp_completion(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """The body of llama.cpp's own `/completion`."""
    return {
        "prompt": list(prompt),
        "n_predict": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_tokens": True,
        "cache_prompt": False,
        "stream": True,
    }


async def stream(
    url: str,
    body: dict[str, Any],
    *,
    headers: dict[str, str] | None = None,
    stop_after: int | None = None,
    on_piece: Callable[[], None] | None = None,
) -> Stream:
    """Send and read to the end, or leave (the connection is closed) after `stop_after` pieces.

    Raises RuntimeError where the answer is not a stream, or breaks off.
    """
    parts = urlsplit(url)
    raw = json.dumps(body).encode()
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_LIMIT_BYTES)
    try:
        sent_at = time.perf_counter()
        writer.write(head.encode() + b"\r\n" + raw)
        status = await reader.readuntil(b"\r\n\r\n")
        first_line = status.splitlines()[0]
        if b" 200 " not in first_line:
            raise RuntimeError(f"{url}: {first_line!r} {await reader.read(2000)!r}")
        chunked = b"chunked" in status.lower()
        arrived: list[tuple[float, bytes]] = []
        while data := await (_chunk(reader) if chunked else reader.read(_LIMIT_BYTES)):
            arrived.append((time.perf_counter(), data))
            if on_piece is not None:
                on_piece()
            if stop_after is not None and len(arrived) >= stop_after:
                return _parsed(sent_at, arrived)
    finally:
        writer.close()
    answer = _parsed(sent_at, arrived)
    if not answer.pieces:
        raise RuntimeError(f"{url}: no token came: {arrived[-1:]!r}")
    return answer


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readuntil(b"\r\n"), 16)
    data = await reader.readexactly(size + 2)
    return data[:-2]


def _parsed(sent_at: float, arrived: Sequence[tuple[float, bytes]]) -> Stream:
    """Server-sent events; one that comes in two chunks has the time of its last byte."""
    answer = Stream(sent_at)
    rest = b""
    for at, data in arrived:
        *lines, rest = (rest + data).split(b"\n")
        token_ids: list[int] = []
        for line in lines:
            if line.startswith(b"data: ") and line[6:7] == b"{":
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"the stream ended with {event['error']}")
                token_ids += _token_ids(event)
                answer.usage = event.get("usage") or answer.usage
        if token_ids:
            answer.pieces.append((at, len(token_ids)))
            answer.token_ids += token_ids
    details = answer.usage.get("prompt_tokens_details") or {}
    answer.num_cached = details.get("cached_tokens")
    return answer


def _token_ids(event: dict[str, Any]) -> list[int]:
    if "choices" in event:
        return [token for one in event["choices"] for token in one.get("token_ids") or ()]
    return list(event.get("tokens") or ())


async def together(streams: Iterable[Awaitable[Stream]]) -> list[Stream]:
    """All at once."""
    return list(await asyncio.gather(*streams))


def tokens_per_s(streams: Sequence[Stream]) -> float:
    """All generated tokens, over the time from the first request sent to the last token."""
    wall = max(one.ended_at for one in streams) - min(one.sent_at for one in streams)
    return sum(one.num_tokens for one in streams) / wall


def median_ttft_ms(streams: Sequence[Stream]) -> float:
    """Of all streams."""
    return statistics.median(one.ttft_ms for one in streams)


def median_itl_ms(streams: Sequence[Stream]) -> float:
    """Of all gaps of all streams."""
    return statistics.median(gap for one in streams for gap in one.itl_ms)
