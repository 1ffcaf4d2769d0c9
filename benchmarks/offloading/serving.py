"""A model of several times the memory that there is, served over REST within a control group.

All of the server's processes are in the group, and what they hold together counts: the server, the
allocator, the process that instances are forked from, the instance, and the memory they share.
"""

import asyncio
import contextlib
import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _client import (
    Stream,
    completion,
    median_itl_ms,
    median_ttft_ms,
    random_prompt,
    stream,
    tokens_per_s,
)
from _control_group import MemoryGroup, memory_group
from _machine import spread
from _processes import tree
from _server import running_server, server_status

_PATIENCE_S = 600
_LOOK_S = 0.05


class Watch:
    """The most that a group, or where there is none a tree of processes, held at once."""

    def __init__(self, group: MemoryGroup | None, pid: int) -> None:
        self._group, self._pid = group, pid
        self.most_bytes = 0
        """Private and shared memory."""
        self.most_resident_bytes = 0
        """With the files that are mapped."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            held, resident = self._group.memory if self._group else memory_of(self._pid)
            self.most_bytes = max(self.most_bytes, held)
            self.most_resident_bytes = max(self.most_resident_bytes, resident)


def memory_of(pid: int) -> tuple[int, int]:
    """Of the process and all that descend from it, what is shared once: private and shared memory,
    and these with the files that are mapped (proc(5), smaps_rollup)."""
    held = resident = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in ("Pss_Anon", "Pss_Shmem", "Pss_File"):
                    resident += int(rest.split()[0]) * 1024
                if name in ("Pss_Anon", "Pss_Shmem"):
                    held += int(rest.split()[0]) * 1024
    return held, resident


@contextlib.contextmanager
def group_or_none(limit_bytes: int, name: str = "bench") -> Iterator[MemoryGroup | str]:
    """Why not, where none can be made."""
    with contextlib.ExitStack() as stack:
        try:
            found: MemoryGroup | str = stack.enter_context(memory_group(limit_bytes, name))
        except OSError as error:
            found = str(error)
        yield found


def measure_serving(
    model: Path,
    runtime_dir: Path,
    *,
    budget_bytes: int,
    processes_bytes: int,
    tokens: tuple[int, int],
    rounds: int,
    options: Sequence[str],
) -> dict[str, Any]:
    """The weights get what `processes_bytes` leave of the budget; `tokens` in and out. Raises
    RuntimeError where the server does not start or an answer is not whole."""
    limit = budget_bytes + budget_bytes // 10
    every = ("--device-memory", f"{(budget_bytes - processes_bytes) >> 20}MiB", *options)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with group_or_none(limit) as group:
        own = group if isinstance(group, MemoryGroup) else None
        within = own.enter if own else ()
        with running_server(
            str(model), runtime_dir, num_instances=1, options=every, within=within
        ) as ready_ms:
            status = server_status(runtime_dir)
            with Watch(own, status["pid"]) as watch:
                answers = _answers(status, tokens, rounds)
            return {
                "weights_bytes": weights,
                "budget_bytes": budget_bytes,
                "weights_over_budget": round(weights / budget_bytes, 2),
                "options": list(every),
                "limit_bytes": limit,
                "control_group": True if own else group,
                "ready_s": round(ready_ms / 1000, 1),
                **answers,
                "most_held_bytes": watch.most_bytes,
                "most_resident_bytes": watch.most_resident_bytes,
                "most_charged_bytes": own.most_bytes if own else None,
                "oom_kills": own.num_oom_kills if own else None,
                "within_limit": watch.most_bytes <= limit and not (own and own.num_oom_kills),
            }


def _answers(status: dict[str, Any], tokens: tuple[int, int], rounds: int) -> dict[str, Any]:
    rng = random.Random(1)
    num_in, num_out = tokens
    url = status["url"]
    chats = [_chat(url, status["model"], num_out) for _ in range(rounds)]
    streams = []
    for _ in range(rounds):
        body = completion(status["model"], random_prompt(rng, num_in), num_out)
        streams.append(_stream(f"{url}/v1/completions", body, num_out))
    chat_streams = []
    for _ in range(rounds):
        body = completion(status["model"], [], num_out)
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "What is a ring?"}]
        chat_streams.append(_stream(f"{url}/v1/chat/completions", body, num_out))
    return {
        "tokens_in": num_in,
        "tokens_out": num_out,
        "chat_s": spread(chats, 2),
        "completions_streamed": _figures(streams),
        "chat_streamed": _figures(chat_streams),
    }


def _figures(streams: Sequence[Stream]) -> dict[str, Any]:
    return {
        "tok_per_s": spread([tokens_per_s([one]) for one in streams], 3),
        "ttft_s": spread([median_ttft_ms([one]) / 1000 for one in streams], 2),
        "itl_ms": round(statistics.median([median_itl_ms([one]) for one in streams])),
    }


def _stream(url: str, body: dict[str, Any], num_tokens: int) -> Stream:
    answer = asyncio.run(asyncio.wait_for(stream(url, body), _PATIENCE_S))
    if answer.num_tokens != num_tokens:
        raise RuntimeError(f"{url}: {answer.num_tokens} tokens of {num_tokens} came")
    return answer


def _chat(url: str, model: str, num_tokens: int) -> float:
    """A conversation that is answered in one piece: the seconds that it took."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is a ring?"}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=_PATIENCE_S) as reply:
        answer = json.load(reply)
    if answer["usage"]["completion_tokens"] != num_tokens:
        raise RuntimeError(f"an answer of {num_tokens} tokens was expected: {answer}")
    return time.perf_counter() - begun
