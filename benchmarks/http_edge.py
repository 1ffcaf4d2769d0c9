"""What others notice while somebody abuses the server: with grammars, bodies and connections.

Somebody who knows nothing of it asks for /health every 20 ms, each time on a new connection, and
reads one stream of tokens after the other (`_probe.py`, a process of its own). What that one sees
in `--seconds` is measured

- alone, and beside one who sends a usual grammar after the other, each another one;
- while 8 clients send grammars that can't be compiled within bounds, each another one (chains of
  references, rules in rules, multiples of large primes), beside the same one;
- while 8 clients generate by ambiguous grammars, which compile at once and take up to a second for
  a token;
- while 8 clients send bodies of 8 million token ids, a million unknown keys, 30 MB of text;
- under `ulimit -n 1024`, with 1,100 idle connections, each opened again a second after its close;
- with 5,000 idle connections, 1,000 streams that wait for their turn, and 300 clients that send a
  byte a second, half of them of a head, half of a body; here all places of the instances are taken
  before, too.

    python benchmarks/http_edge.py [--seconds 30]

Another part: a stranger of the same user floods the sockets of the runtime directory that carry
tokens, and the memory of server and instances is watched.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from _client import completion
from _machine import describe_machine, percentiles
from _processes import Load, end_on_sigterm, environment

from allocator import RuntimeDir
from server.admin.client import AdminClient

_CLIENTS = 8
_IDLE = 5000
_STREAMS = 1000
_RUNNING = 80
_SLOW = 300
_IDLE_WHERE_FEW = 1100
_FEW = 1024
_MILLION = 1_000_000
_STANDS_S = 600.0


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    end_on_sigterm()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    figures: dict[str, Any] = {}
    for name, few, part in (
        ("grammars_and_bodies", False, _abuse),
        ("few_descriptors", True, _few_descriptors),
        ("many_connections", False, _many_connections),
        ("flood", False, _flood),
    ):
        with serving(few=few) as server:
            load = Load(server.pid)
            figures[name] = asyncio.run(part(server, arguments.seconds))
            figures[name]["shares_of_the_processors"] = load.shares()
    print(json.dumps({"machine": describe_machine(), "seconds": arguments.seconds, **figures}))


@dataclass(frozen=True)
class Server:
    """One of the benchmark's own."""

    url: str
    model: str
    pid: int
    runtime_dir: Path
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    @property
    def rss_mb(self) -> float:
        return round(_rss_bytes(self.pid) / 1e6, 1)

    def body(self, prompt: Any, max_tokens: int, **more: Any) -> dict[str, Any]:
        return {**completion(self.model, prompt, max_tokens), **more}


def _rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@contextlib.contextmanager
def serving(*, few: bool) -> Iterator[Server]:
    """Two instances. `few`: with 1,024 descriptors, which nobody may raise."""
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        runtime_dir, log = Path(folder) / "run", Path(folder) / "log"

        def limit() -> None:
            if few:
                resource.setrlimit(resource.RLIMIT_NOFILE, (_FEW, _FEW))

        command = [sys.executable, "-P", "-m", "server.cli", "serve", "demo", "--port", "0"]
        options = ["--runtime-dir", str(runtime_dir), "--max-queued", str(2 * _STREAMS)]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [*command, *options],
                env=environment(own=True),
                stdout=subprocess.PIPE,
                stderr=stderr,
                preexec_fn=limit,
                text=True,
            )
        try:
            assert process.stdout is not None
            if not any("is ready" in line for line in process.stdout):
                raise RuntimeError(log.read_text())
            status = AdminClient(RuntimeDir.open(runtime_dir)).status()
            yield Server(status.url, status.model, status.pid, runtime_dir, log)
        finally:
            stop = [
                sys.executable,
                "-P",
                "-m",
                "server.cli",
                "stop",
                "--runtime-dir",
                str(runtime_dir),
            ]
            subprocess.run(stop, check=False, stdout=subprocess.DEVNULL)
            process.wait(timeout=120)


# --- what is measured


async def measured(
    server: Server, seconds: float, *abuses: Callable[[], Coroutine[Any, Any, None]]
) -> dict[str, Any]:
    """What others see in that time, who know nothing of the abuse."""
    tasks = [asyncio.create_task(abuse()) for abuse in abuses]
    if tasks:
        await asyncio.sleep(1.0)  # until it is on its way
    rss, log = server.rss_mb, server.log.stat().st_size
    probe = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(Path(__file__).with_name("_probe.py"))),
        *(server.url, server.model, str(seconds)),
        stdout=subprocess.PIPE,
        env=environment(own=True) | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    seen, _ = await probe.communicate()
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        **json.loads(seen),
        "server_rss_mb": [rss, server.rss_mb],
        "log_bytes": server.log.stat().st_size - log,
    }


# --- grammars and bodies


async def _abuse(server: Server, seconds: float) -> dict[str, Any]:
    grammars, bodies, usual = Answers(), Answers(), Answers()
    alone = await measured(server, seconds)
    before = Answers()
    with_usual = await measured(server, seconds, lambda: _usual(server, before))
    sends = [
        lambda number=number: _send_grammars(server, number, grammars) for number in range(_CLIENTS)
    ]
    during_grammars = await measured(server, seconds, *sends, lambda: _usual(server, usual))
    masks = Answers()
    ambiguous = [
        lambda number=number: _generate(server, number, masks) for number in range(_CLIENTS)
    ]
    during_masks = await measured(server, seconds, *ambiguous)
    raw = [_ids(server), _keys(server), _text(server)]
    big = [
        lambda number=number: _send_bodies(server, raw[number % len(raw)], bodies)
        for number in range(_CLIENTS)
    ]
    during_bodies = await measured(server, seconds, *big)
    after = await measured(server, seconds)
    return {
        "alone": alone,
        "beside_usual_grammars": {
            **with_usual,
            "usual_grammars": {**before.counted(), "ms": percentiles(before.ms)},
        },
        "during_grammars": {
            **during_grammars,
            "their_answers": grammars.counted(),
            "usual_grammars": {**usual.counted(), "ms": percentiles(usual.ms)},
        },
        "during_ambiguous_grammars": {**during_masks, "their_answers": masks.counted()},
        "during_bodies": {**during_bodies, "their_answers": bodies.counted()},
        "afterwards": after,
    }


@dataclass
class Answers:
    """By status."""

    statuses: dict[str, int] = field(default_factory=dict)
    ms: list[float] = field(default_factory=list)

    def add(self, status: str, ms: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.ms.append(ms)

    def counted(self) -> dict[str, Any]:
        return {"statuses": self.statuses}


def _grammar(client: int, number: int) -> dict[str, Any]:
    name = f"{client}-{number}"
    match number % 3:
        case 0:
            defs = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(1200)}
            defs["d1200"] = {}
            return {"guided_json": {"$id": name, "$ref": "#/$defs/d0", "$defs": defs}}
        case 1:
            rules = "".join(f"r{n}: r{n + 1}\n" for n in range(3000))
            return {"guided_grammar": f'start: r0 "{name}"\n{rules}r3000: "a"'}
        case _:
            return {"guided_json": {"title": name, "type": "integer", "multipleOf": 9999991}}


async def _send_grammars(server: Server, client: int, answers: Answers) -> None:
    number = client
    while True:
        body = {"model": server.model, "prompt": [1], "max_tokens": 4, **_grammar(client, number)}
        number += 1
        await _post(server, json.dumps(body).encode(), answers)


async def _generate(server: Server, client: int, answers: Answers) -> None:
    for number in range(1 << 30):
        grammar = f'start: s "{client}-{number}"?\ns: s s s | s s | "a" | "b" | "ab"'
        body = {"model": server.model, "prompt": [1], "max_tokens": 99, "guided_grammar": grammar}
        await _post(server, json.dumps(body).encode(), answers)


async def _usual(server: Server, answers: Answers) -> None:
    for number in range(1 << 30):
        schema = {"title": str(number), "type": "object", "properties": {"a": {"type": "integer"}}}
        body = {"model": server.model, "prompt": [1], "max_tokens": 4, "guided_json": schema}
        await _post(server, json.dumps(body).encode(), answers)


def _ids(server: Server) -> bytes:
    return b'{"model":"%s","prompt":[%s1]}' % (server.model.encode(), b"1," * (8 * _MILLION))


def _keys(server: Server) -> bytes:
    keys = ",".join(f'"k{n}":{n}' for n in range(_MILLION))
    return f'{{"model":"{server.model}","prompt":"a",{keys}}}'.encode()


def _text(server: Server) -> bytes:
    return b'{"model":"%s","prompt":"%s"}' % (server.model.encode(), b"a, b " * (6 * _MILLION))


async def _send_bodies(server: Server, raw: bytes, answers: Answers) -> None:
    while True:
        await _post(server, raw, answers)


async def _post(server: Server, raw: bytes, answers: Answers) -> None:
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(*server.address)
    status = "connection lost"
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode())
        sending = asyncio.create_task(_write(writer, raw))
        answer = await reader.readline()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        status = answer.split()[1].decode() if answer else status
    except OSError as error:
        status = type(error).__name__
    finally:
        writer.transport.abort()
    answers.add(status, (time.perf_counter() - begun) * 1000)


async def _write(writer: asyncio.StreamWriter, raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        writer.write(view[: 1 << 18])
        view = view[1 << 18 :]
        await writer.drain()


# --- connections


@contextlib.asynccontextmanager
async def held(
    server: Server, number: int, first: bytes = b"", then: bytes = b""
) -> AsyncIterator[None]:
    """So many connections, which say `first`, and then `then` once a second; each is opened again
    when it is closed."""
    standing = 0

    async def hold() -> None:
        nonlocal standing
        while True:
            try:
                reader, writer = await asyncio.open_connection(*server.address)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            standing += 1
            try:
                writer.write(first)
                while True:
                    with contextlib.suppress(TimeoutError):
                        if not await asyncio.wait_for(reader.read(65536), 1.0 if then else None):
                            break
                    writer.write(then)
            except OSError:
                pass
            finally:
                standing -= 1
                writer.close()
            await asyncio.sleep(1.0)

    tasks = [asyncio.create_task(hold()) for _ in range(number)]
    deadline = time.monotonic() + _STANDS_S
    while standing < number * 0.7 and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _few_descriptors(server: Server, seconds: float) -> dict[str, Any]:
    alone = await measured(server, seconds)
    async with held(server, _IDLE_WHERE_FEW):
        during = await measured(server, seconds)
        begun = time.perf_counter()
        status = await asyncio.to_thread(AdminClient(RuntimeDir.open(server.runtime_dir)).status)
        admin_ms = (time.perf_counter() - begun) * 1000
        descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))  # noqa: PTH208
    return {
        "alone": alone,
        "during": during,
        "admin_ms": round(admin_ms, 1),
        "instances_ready": sum(one.state == "ready" for one in status.instances),
        "descriptors": descriptors,
    }


async def _many_connections(server: Server, seconds: float) -> dict[str, Any]:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def waiting(priority: int) -> bytes:
        raw = json.dumps(server.body([1000] * 8, 64, priority=priority)).encode()
        return head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw

    # All places are taken by then, as they are during the rest.
    async with held(server, _RUNNING, waiting(10)):
        before = await measured(server, seconds)
        async with (
            held(server, _STREAMS - _RUNNING, waiting(20)),
            held(server, _IDLE),
            held(server, _SLOW // 2, b"GET /health HTTP/1.1\r\nX: ", b"a"),
            held(server, _SLOW // 2, head + b"Content-Length: 100000\r\n\r\n", b"{"),
        ):
            await asyncio.sleep(5)  # until all have been read
            connections = len(os.listdir(f"/proc/{server.pid}/fd"))  # noqa: PTH208
            during = await measured(server, 2 * seconds)
            status = await asyncio.to_thread(
                AdminClient(RuntimeDir.open(server.runtime_dir)).status
            )
            requests = sum(one.num_requests for one in status.instances)
    return {
        "before": before,
        "during": during,
        "afterwards": await measured(server, seconds),
        "descriptors": connections,
        "requests_that_run_or_wait": requests,
    }


# --- a flood


async def _flood(server: Server, seconds: float) -> dict[str, Any]:
    """Endless messages of ZeroMQ to every socket that carries tokens."""
    sockets = sorted(server.runtime_dir.glob("engine*.sock"))
    status = AdminClient(RuntimeDir.open(server.runtime_dir)).status()
    pids = {"server": server.pid} | {one.name: one.pid for one in status.instances if one.pid}
    before = {name: round(_rss_bytes(pid) / 1e6, 1) for name, pid in pids.items()}
    most = dict(before)

    async def flood() -> None:
        await asyncio.to_thread(_send_garbage, sockets, min(seconds, 10.0))

    async def look() -> None:
        while True:
            for name, pid in pids.items():
                most[name] = max(most[name], round(_rss_bytes(pid) / 1e6, 1))
            await asyncio.sleep(0.1)

    during = await measured(server, min(seconds, 10.0) + 2, flood, look)
    return {"sockets": len(sockets), "rss_mb": before, "most_rss_mb": most, "during": during}


def _send_garbage(paths: list[Path], seconds: float) -> None:
    part = b"\x03" + (1 << 20).to_bytes(8, "big") + b"x" * (1 << 20)  # more follows, 1 MiB
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in paths:
            with socket.socket(socket.AF_UNIX) as one, contextlib.suppress(OSError):
                one.settimeout(1.0)
                one.connect(str(path))
                one.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
                for _ in range(256):
                    one.sendall(part)


if __name__ == "__main__":
    main()
