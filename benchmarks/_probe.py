"""A process of its own that asks a server for /health every 20 ms, each time on a new connection,
and reads one stream of tokens after the other; so that who makes the load does not delay it.

    python benchmarks/_probe.py URL MODEL SECONDS
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from _client import completion, stream
from _machine import percentiles

_EVERY_S = 0.02
_PROMPT = [1000, 2000, 3000]
_NUM_TOKENS = 24


@dataclass
class Probe:
    """What it has seen."""

    url: str
    model: str
    health_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)

    async def health(self) -> None:
        while True:
            begun = time.perf_counter()
            try:
                status = await self._ask()
                if b" 200 " not in status:
                    self.failed.append(status.decode(errors="replace")[:100])
                self.health_ms.append((time.perf_counter() - begun) * 1000)
            except OSError as error:
                self.failed.append(repr(error))
            await asyncio.sleep(max(0.0, _EVERY_S - (time.perf_counter() - begun)))

    async def _ask(self) -> bytes:
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return (await reader.read()).partition(b"\r\n")[0]
        finally:
            writer.close()

    async def streams(self) -> None:
        while True:
            body = completion(self.model, _PROMPT, _NUM_TOKENS)
            answer = await stream(f"{self.url}/v1/completions", body)
            self.gaps_ms += answer.itl_ms
            self.first_ms.append(answer.ttft_ms)

    async def watch(self, seconds: float) -> dict[str, Any]:
        tasks = [asyncio.create_task(self.health()), asyncio.create_task(self.streams())]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when="FIRST_EXCEPTION")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.failed += [repr(task.exception()) for task in done]
        found: dict[str, Any] = {
            "health_ms": percentiles(self.health_ms or [float("inf")]),
            "failed": len(self.failed),
        }
        if self.failed:
            found["failures"] = sorted(set(self.failed))[:5]
        if self.gaps_ms:
            found["ms_between_tokens"] = percentiles(self.gaps_ms)
            found["ms_to_first_token"] = percentiles(self.first_ms)
        return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(Probe(*sys.argv[1:3]).watch(float(sys.argv[3])))))
