"""Two instances of one server, and how a benchmark chooses who answers.

The router gives a request to the least loaded instance. So whoever shall not answer is stopped
(SIGSTOP) and left with a request that it can't see: it takes no processor time meanwhile, and
everything goes to the other. It runs on as soon as it is let go.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _client import Stream, completion, random_prompt, stream
from _processes import NUM_THREADS
from _server import running_server

from allocator import RuntimeDir
from server.admin.client import AdminClient
from server.admin.schemas import InstanceStatus

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Fleet:
    """A server and its instances."""

    runtime_dir: Path
    url: str
    model: str
    pid: int
    admin: AdminClient

    @property
    def instances(self) -> list[InstanceStatus]:
        """As they are now."""
        return self.admin.status().instances

    def num_requests(self, name: str) -> int:
        """That the router has given to it, and that have not ended."""
        return next(one.num_requests for one in self.instances if one.name == name)

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """See `_client.completion`."""
        return completion(self.model, prompt, max_tokens)

    async def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        stop_after: int | None = None,
        on_piece: Callable[[], None] | None = None,
    ) -> Stream:
        """Of whoever the router chooses."""
        url = f"{self.url}/v1/completions"
        body = self.body(prompt, max_tokens)
        return await stream(url, body, stop_after=stop_after, on_piece=on_piece)

    @contextlib.asynccontextmanager
    async def without(self, other: InstanceStatus) -> AsyncIterator[None]:
        """`other` is stopped, and busy in the router's eyes."""
        rng = random.Random()
        asked: list[asyncio.Task[Stream]] = []
        with stopped(other):
            with contextlib.ExitStack() as stack:  # the others too, for the router to count
                for one in self.instances:
                    stack.enter_context(stopped(one))
                while not self.num_requests(other.name):
                    prompt = random_prompt(rng, 4)
                    asked.append(asyncio.create_task(self.ask(prompt, 1)))
                    await self.until(lambda: self._num_given() >= len(asked))
            await self.until(lambda: self._num_given() == self.num_requests(other.name))
            yield
        await asyncio.gather(*asked)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looks every 10 ms. Raises TimeoutError."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not come so far in {_PATIENCE_S:.0f} s")
            await asyncio.sleep(0.01)

    def _num_given(self) -> int:
        return sum(one.num_requests for one in self.instances)


@contextlib.contextmanager
def stopped(instance: InstanceStatus) -> Iterator[None]:
    """It takes no step."""
    assert instance.pid is not None
    before = _is_stopped(instance.pid)
    os.kill(instance.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if not before:
            os.kill(instance.pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@contextlib.contextmanager
def two_instances(model: str, runtime_dir: Path, options: Sequence[str]) -> Iterator[Fleet]:
    """Both ready; each may use all threads, since only one of them computes at a time."""
    # Whoever is stopped here is to be left alone.
    every = ("--threads", str(NUM_THREADS), "--hang-timeout", "0", *options)
    with running_server(model, runtime_dir, num_instances=2, options=every):
        admin = AdminClient(RuntimeDir.open(runtime_dir, create=False))
        deadline = time.monotonic() + 60
        while [one.state for one in admin.status().instances] != ["ready"] * 2:
            if time.monotonic() > deadline:
                raise TimeoutError("the second instance did not become ready")
            time.sleep(0.05)
        status = admin.status()
        yield Fleet(runtime_dir, status.url, status.model, status.pid, admin)
