"""What clients see of a server whose processes are killed and stopped at random.

`--streams` clients ask two instances in float32, one request after the other: completions, chats
(whose prompt the template's process writes) and answers that must match a grammar. Every `--every`
seconds a random process of the server is sent a signal: an instance, the forkserver, the allocator,
the template's process, or whatever other process the server has for single tasks. That goes on for
`--seconds` with SIGKILL, and then as long with SIGSTOP; nobody sends a SIGCONT.

Each answer is compared with the one that the same request got while nothing was disturbed. Requests
in whose answer two tokens are so near to each other that the order of a sum may decide between them
(`_LEAST_GAP` in log probability) are not used.

Afterwards a server is stopped (`onecopy stop`) while some of its processes are stopped by SIGSTOP:
none of them, each kind, all of them, and the server itself. The time is that of the whole command.

Fails (exit status 1, the reasons under "failures") if a request failed or its text changed, if
something was left behind, or if a stop took more than 5 s.

    python benchmarks/chaos.py [--model demo] [--seconds 60] [--every 2] [--streams 16]
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from _client import Stream, stream
from _machine import describe_machine, percentiles, spread, steal_ticks
from _processes import end_on_sigterm, tree
from _server import onecopy, running_server

from allocator import ProcessIdentity, RuntimeDir
from server.admin.client import AdminClient
from server.admin.schemas import ServerStatus

_NUM_INSTANCES = 2
_LEAST_GAP = 0.02
_REQUEST_S = 300.0
_RECOVERY_S = 300.0
_STOP_S = 5.0
_LOOK_S = 0.05
_FOR_TASKS = ("template", "other")
_SUBJECTS = (
    "the sea", "a bridge", "winter", "bread", "the moon", "a lost key", "music", "rain", "a garden",
    "the library", "a clock", "horses", "glass", "the mountain", "a letter", "coffee", "ships",
    "a village", "gold", "the desert", "a fox", "paper", "the river", "a lamp",
)  # fmt: skip
_STOPS: Sequence[Sequence[str]] = (
    (),
    ("instance",),
    ("forkserver",),
    ("allocator",),
    ("template",),
    ("server",),
    ("instance", "forkserver", "allocator", "template", "other"),
)
_GRAMMAR = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """One request: its path and body."""

    path: str
    body: dict[str, Any]


@dataclass
class Fault:
    """One signal."""

    at: float
    kind: str
    pid: int
    recovered_s: float | None = None
    """Until another process of that kind was there, and as many instances ready as are wanted."""


@dataclass
class Phase:
    """What happened under one signal."""

    faults: list[Fault] = field(default_factory=list)
    answers: list[Stream] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=2.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--stops", type=int, default=len(_STOPS), help="of the stops only the last so many"
    )
    arguments = parser.parse_args()
    end_on_sigterm()
    options = ["--dtype", "float32", *arguments.serve]
    steal = steal_ticks()
    chaos = Chaos(arguments)
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        runtime_dir = Path(folder) / "run"
        with running_server(
            arguments.model, runtime_dir, num_instances=_NUM_INSTANCES, options=options
        ):
            phases = asyncio.run(chaos.run(runtime_dir))
        stops = [
            _stopped_while(kinds, arguments.model, Path(folder), options)
            for kinds in _STOPS[len(_STOPS) - arguments.stops :]
        ]
    failures = chaos.failures
    failures += [f"{name}: {one}" for name, phase in phases.items() for one in phase.failed]
    failures += [f"{name}: {one}" for name, phase in phases.items() for one in phase.changed]
    for stop in stops:
        what = " and ".join(stop["stopped"]) or "nothing"
        failures += [f"stop while {what} hung left {left}" for left in stop["left"]]
        if stop["stop_s"] > _STOP_S:
            failures.append(f"stop while {what} hung took {stop['stop_s']} s")
    document = {
        "benchmark": "chaos",
        **describe_machine(),
        "steal_ticks": steal_ticks() - steal,
        "model": arguments.model,
        "serve_options": options,
        "num_streams": arguments.streams,
        "seconds": arguments.seconds,
        "every_s": arguments.every,
        "num_questions": len(chaos.expected),
        "num_questions_too_close_to_call": chaos.num_too_close,
        "phases": {name: _summary(phase) for name, phase in phases.items()},
        "stops": stops,
        "failures": failures,
    }
    print(json.dumps(document, indent=2))
    sys.exit(1 if failures else 0)


class Chaos:
    """One server, its clients, and who sends the signals."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._rng = random.Random(arguments.seed)
        self.failures: list[str] = []
        self.expected: list[tuple[Question, list[int]]] = []
        self.num_too_close = 0
        self._phase_is_over = False

    async def run(self, runtime_dir: Path) -> dict[str, Phase]:
        """Both phases."""
        self._runtime_dir = RuntimeDir.open(runtime_dir, create=False)
        self._admin = AdminClient(self._runtime_dir)
        status = await asyncio.to_thread(self._until_whole)
        self._url, self._server = status.url, status.pid
        await self._ask_undisturbed(status.model)
        phases = {}
        for number in (signal.SIGKILL, signal.SIGSTOP):
            phases[number.name] = await self._disturbed(number)
            await asyncio.to_thread(self._until_whole)
        return phases

    # --- requests

    async def _ask_undisturbed(self, model: str) -> None:
        """Every question's answer, and which of them can't be compared."""
        questions = _questions(model, self._arguments.max_tokens)
        room = asyncio.Semaphore(4)

        async def ask(question: Question) -> tuple[Question, list[int], float]:
            async with room:
                ids, gap = await asyncio.to_thread(self._whole, question)
                return question, ids, gap

        answers = await asyncio.gather(*(ask(one) for one in questions))
        self.expected = [(question, ids) for question, ids, gap in answers if gap >= _LEAST_GAP]
        self.num_too_close = len(answers) - len(self.expected)
        if not self.expected:
            raise SystemExit("no answer is certain enough to be compared")

    def _whole(self, question: Question) -> tuple[list[int], float]:
        """The tokens of the answer, and how near the second likeliest token ever came."""
        is_chat = "chat" in question.path
        wanted: dict[str, Any] = (
            {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
        )
        body = {**question.body, **wanted, "stream": False}
        body.pop("stream_options")
        answer = httpx.post(self._url + question.path, json=body, timeout=_REQUEST_S)
        answer.raise_for_status()
        (choice,) = answer.json()["choices"]
        if is_chat:
            tops = [
                [top["logprob"] for top in entry["top_logprobs"]]
                for entry in choice["logprobs"]["content"]
            ]
        else:
            tops = [list(top.values()) for top in choice["logprobs"]["top_logprobs"]]
        gaps = [max(top) - min(top) for top in tops if len(top) > 1]
        # What a grammar allows is not known here; two tokens that it forbids may be near.
        return choice["token_ids"], min(gaps, default=0.0)

    async def _keep_asking(self, phase: Phase, until: float) -> None:
        while time.monotonic() < until:
            question, ids = self._rng.choice(self.expected)
            try:
                async with asyncio.timeout(_REQUEST_S):
                    answer = await stream(self._url + question.path, question.body)
            except (RuntimeError, OSError, EOFError, TimeoutError) as error:
                phase.failed.append(f"{question.path}: {error!r}"[:500])
                continue
            phase.answers.append(answer)
            if answer.token_ids != ids:
                phase.changed.append(f"{question.body}: {answer.token_ids} instead of {ids}")

    # --- faults

    async def _disturbed(self, number: signal.Signals) -> Phase:
        phase = Phase()
        self._phase_is_over = False
        until = time.monotonic() + self._arguments.seconds
        clients = [
            asyncio.create_task(self._keep_asking(phase, until))
            for _ in range(self._arguments.streams)
        ]
        recovering: list[asyncio.Task[None]] = []
        while time.monotonic() < until:
            await asyncio.sleep(self._arguments.every)
            victims = await asyncio.to_thread(self._victims)
            if not victims:
                continue
            kind = self._rng.choice(sorted(victims))
            fault = Fault(time.monotonic(), kind, self._rng.choice(victims[kind]))
            try:
                os.kill(fault.pid, number)
            except ProcessLookupError:
                continue
            phase.faults.append(fault)
            recovering.append(asyncio.create_task(asyncio.to_thread(self._time, fault)))
        await asyncio.gather(*clients)
        self._phase_is_over = True
        await asyncio.gather(*recovering)
        phase.failed += [
            f"the {one.kind} (pid {one.pid}) was not replaced in time"
            for one in phase.faults
            if one.recovered_s is None and one.kind not in _FOR_TASKS
        ]
        return phase

    def _victims(self) -> dict[str, list[int]]:
        """Processes by kind."""
        return _processes_of(self._admin.status())

    def _time(self, fault: Fault) -> None:
        while (elapsed := time.monotonic() - fault.at) < _RECOVERY_S:
            status = self._admin.status()
            processes = _processes_of(status)
            gone = not any(fault.pid in pids for pids in processes.values())
            # One for single tasks comes back with the next task.
            for_tasks = fault.kind in _FOR_TASKS
            if gone and (fault.kind in processes if for_tasks else _is_whole(status)):
                fault.recovered_s = elapsed
                return
            if for_tasks and self._phase_is_over:
                return
            time.sleep(_LOOK_S)

    def _until_whole(self) -> ServerStatus:
        deadline = time.monotonic() + _RECOVERY_S
        while not _is_whole(status := self._admin.status()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not recover: {status}")
            time.sleep(_LOOK_S)
        return status


def _questions(model: str, max_tokens: int) -> Iterator[Question]:
    common = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    for subject in _SUBJECTS:
        prompt = f"Once upon a time there was a story about {subject}. It began"
        yield Question("/v1/completions", {**common, "prompt": prompt, "ignore_eos": True})
        asked = [{"role": "user", "content": f"Say something about {subject}."}]
        yield Question("/v1/chat/completions", {**common, "messages": asked})
    for subject in _SUBJECTS[:8]:
        asked = [{"role": "user", "content": f"Name and count things of {subject}, as JSON."}]
        yield Question(
            "/v1/chat/completions", {**common, "messages": asked, "guided_json": _GRAMMAR}
        )


def _processes_of(status: ServerStatus) -> dict[str, list[int]]:
    """By kind; a kind of which there is none is not there."""
    found: dict[str, list[int]] = {
        "instance": [one.pid for one in status.instances if one.pid],
        "forkserver": [status.forkserver_pid] if status.forkserver_pid else [],
        "allocator": [status.allocator.pid] if status.allocator.pid else [],
        "template": [],
        "other": [],
    }
    known = {status.pid, *(pid for some in found.values() for pid in some)}
    for pid in tree(status.pid):
        if pid in known or (state := _command(pid)) is None:
            continue
        found["template" if "chat_template" in state else "other"].append(pid)
    return {kind: pids for kind, pids in found.items() if pids}


def _command(pid: int) -> str | None:
    """None where it has ended, or begins: it has no command yet, or that of who forked it."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name = Path(f"/proc/{pid}/comm").read_text() if text else ""
    started = "workers.process.forkserver" in text or "server.cli" in text or "allocator" in text
    return None if not text or started or name.startswith("onecopy:") else text


def _is_whole(status: ServerStatus) -> bool:
    ready = [one for one in status.instances if one.state == "ready" and not one.unresponsive_s]
    return (
        len(ready) >= status.num_wanted
        and status.forkserver_is_up
        and status.allocator.pid is not None
        and status.allocator.unresponsive_s is None
    )


def _summary(phase: Phase) -> dict[str, Any]:
    by_kind: dict[str, list[float]] = {}
    for fault in phase.faults:
        if fault.recovered_s is not None:
            by_kind.setdefault(fault.kind, []).append(fault.recovered_s)
    gaps = [max(one.itl_ms, default=0.0) for one in phase.answers]
    return {
        "num_faults": dict(Counter(fault.kind for fault in phase.faults)),
        "num_requests": len(phase.answers) + len(phase.failed),
        "num_failed": len(phase.failed),
        "num_changed": len(phase.changed),
        "recovered_after_s": {kind: spread(times, 2) for kind, times in sorted(by_kind.items())},
        "ttft_ms": percentiles([one.ttft_ms for one in phase.answers]),
        "longest_gap_of_each_stream_ms": percentiles(gaps),
        "tokens_per_s": round(
            sum(one.num_tokens for one in phase.answers)
            / max(1e-9, statistics.fmean(_span(phase.answers))),
            1,
        ),
    }


def _span(answers: Sequence[Stream]) -> list[float]:
    if not answers:
        return [1.0]
    return [max(one.ended_at for one in answers) - min(one.sent_at for one in answers)]


# --- the end


def _stopped_while(
    kinds: Sequence[str], model: str, folder: Path, options: Sequence[str]
) -> dict[str, Any]:
    """Stop a server some processes of which are stopped."""
    runtime_dir = folder / f"stop-{len(kinds)}-{''.join(kinds)[:8]}"
    with running_server(model, runtime_dir, num_instances=_NUM_INSTANCES, options=options):
        directory = RuntimeDir.open(runtime_dir, create=False)
        prefix = directory.segment_prefix.lstrip("/")
        status = AdminClient(directory).status()
        processes = {**_processes_of(status), "server": [status.pid]}
        identities = [
            identity
            for pids in processes.values()
            for pid in pids
            if (identity := ProcessIdentity.of(pid)) is not None
        ]
        for kind in kinds:
            for pid in processes.get(kind, []):
                os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        onecopy(runtime_dir, "stop")
        took_s = time.monotonic() - begun
        left = [f"process {one.pid}" for one in identities if one.is_alive()]
        left += [f"segment {path.name}" for path in Path("/dev/shm").glob(f"{prefix}*")]
        left += [f"file {path.name}" for path in runtime_dir.iterdir()]
    return {"stopped": list(kinds), "stop_s": round(took_s, 2), "left": left}


if __name__ == "__main__":
    main()
