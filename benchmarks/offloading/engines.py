"""Tokens a second of a model that doesn't fit into memory, side by side, each within a control
group with the same limit: onecopy over REST, and other packages' ways to do it.

All stay loaded and take turns; who is not measured is stopped. In a group the page cache counts
too, so nobody has the weights there. Resident is what is mapped, private memory and files. Whoever
is ended in its group for want of memory is measured in a larger one, which its figures tell.
"""

import contextlib
import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _client import completion, median_ttft_ms, random_prompt, tokens_per_s
from _control_group import MemoryGroup
from _machine import spread
from _peers import Engine, OverHTTP, started, versions
from _processes import NUM_THREADS, deadline, environment, pause, resume
from _server import running_server, server_status
from offloading.serving import Watch, group_or_none

OURS = "onecopy"
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "disk_offload": ("accelerate", ("accelerate", "transformers", "torch")),
    "device_map": ("accelerate", ("accelerate", "transformers", "torch")),
    "airllm": ("airllm", ("airllm", "transformers", "torch")),
    "llamacpp": ("llamacpp", ("xllamacpp",)),
}
"""By the name of what is measured: whose environment it runs in, and the packages of that."""
ABSENT = {
    "cpu_offload": "accelerate's keeps all weights in the processor's memory: on a machine without "
    "another device that is the whole model, which is more than the limit",
    "group_offloading": "diffusers' is for modules of diffusers; see `blocks`",
}
_PROGRAMS = Path(__file__).parents[1] / "peers"
_LAID_OUT_ANEW = ("disk_offload", "airllm")
_START_S = 400
_WIDER = 4


@dataclass(frozen=True)
class Work:
    """What everyone is asked."""

    tokens_in: int
    tokens_out: int
    turn_s: float


@dataclass(frozen=True)
class Place:
    """Where everyone runs: what is there, and how much memory each may have."""

    models: Path
    """As peers/write_models.py leaves it; weights that peers lay out anew are written there too."""
    model: Path
    """What onecopy serves, and transformers reads."""
    folder: Path
    """For logs and sockets."""
    pythons: Mapping[str, Path]
    limit_bytes: int
    device_memory: int
    """Of onecopy's weights, within the limit."""

    def wider(self) -> "Place":
        """For whoever was ended within the limit: what it takes is to be known all the same."""
        return dataclasses.replace(self, limit_bytes=_WIDER * self.limit_bytes)


@dataclass
class _Running:
    engine: Engine
    group: MemoryGroup | None
    limit_bytes: int
    tok_per_s: list[float]
    ttft_s: list[float]
    most_held: int = 0
    most_resident: int = 0

    def turn(self, work: Work, number: int, files: Path) -> None:
        """One answer is measured; `files` are in the page cache only as far as it has them there
        in its own group. Raises RuntimeError, OSError."""
        rng = random.Random(number)
        _drop_cached(files)
        resume(self.engine.pid)
        try:
            with deadline(work.turn_s):
                self.engine.generate([random_prompt(rng, 4)], 1)  # wakes what was stopped
                with Watch(self.group, self.engine.pid) as watch:
                    prompt = random_prompt(rng, work.tokens_in)
                    streams = self.engine.generate([prompt], work.tokens_out)
        finally:
            pause(self.engine.pid)
        if streams[0].num_tokens != work.tokens_out:
            raise RuntimeError(f"{streams[0].num_tokens} tokens of {work.tokens_out} came")
        self.tok_per_s.append(tokens_per_s(streams))
        self.ttft_s.append(median_ttft_ms(streams) / 1000)
        self.most_held = max(self.most_held, watch.most_bytes)
        self.most_resident = max(self.most_resident, watch.most_resident_bytes)

    @property
    def was_killed(self) -> bool:
        """For want of memory."""
        return self.group is not None and self.group.num_oom_kills > 0

    def figures(self, ours: "_Running") -> dict[str, Any]:
        """Of all turns."""
        pairs = zip(ours.tok_per_s, self.tok_per_s, strict=False)
        return {
            "version": self.engine.version,
            "tok_per_s": spread(self.tok_per_s, 3),
            "ttft_s": spread(self.ttft_s, 2),
            "limit_bytes": self.limit_bytes,
            "most_held_bytes": self.most_held,
            "most_resident_bytes": self.most_resident,
            "most_charged_bytes": self.group.most_bytes if self.group else None,
            "oom_kills": self.group.num_oom_kills if self.group else None,
            "ours_over": spread([one / other for one, other in pairs], 2),
        }


def side_by_side(place: Place, work: Work, rounds: int, options: Sequence[str]) -> dict[str, Any]:
    """Whoever does not start, or fails in a turn, is `absent`, with the reason."""
    absent = dict(ABSENT)
    running: dict[str, _Running] = {}
    with contextlib.ExitStack() as stack:
        for name in (OURS, *PEERS):
            say(f"{name} starts")
            try:
                with deadline(_START_S):
                    running[name] = _start(name, place, stack, options)
                pause(running[name].engine.pid)
            except (RuntimeError, OSError) as error:
                if name == OURS:
                    raise
                absent[name] = str(error)
        order = list(running)
        for number in range(rounds):
            for name in tuple(order):
                say(f"round {number + 1}: {name}")
                try:
                    try:
                        running[name].turn(work, number, place.models)
                    except (RuntimeError, OSError):
                        if name == OURS or not running[name].was_killed:
                            raise
                        say(f"{name} needs more than the limit: it starts with {_WIDER} times that")
                        running[name] = _start(name, place.wider(), stack, options)
                        running[name].turn(work, number, place.models)
                except (RuntimeError, OSError) as error:
                    if name == OURS:
                        raise
                    absent[name] = f"dropped in round {number + 1}: {error}"
                    running.pop(name)
                    order.remove(name)
            order.append(order.pop(0))
        figures = {name: one.figures(running[OURS]) for name, one in running.items()}
        for one in running.values():
            resume(one.engine.pid)
    return {
        "limit_bytes": place.limit_bytes,
        "tokens_in": work.tokens_in,
        "tokens_out": work.tokens_out,
        "rounds": rounds,
        "engines": figures,
        "absent": absent,
    }


def _start(
    name: str, place: Place, stack: contextlib.ExitStack, options: Sequence[str]
) -> _Running:
    limit = place.limit_bytes
    group = stack.enter_context(group_or_none(limit, f"{name}-{limit}"))
    own = group if isinstance(group, MemoryGroup) else None
    within = own.enter if own else ()
    if name == OURS:
        return _Running(stack.enter_context(_ours(place, within, options)), own, limit, [], [])
    environment_of, packages = PEERS[name]
    if environment_of not in place.pythons:
        raise RuntimeError(f"not measured: --peer {environment_of}=PYTHON was not given")
    python = place.pythons[environment_of]
    version = versions(python, packages)
    if name == "llamacpp":
        program = [str(python), str(_PROGRAMS / "llamacpp_peer.py")]
        command = [*program, str(place.models / "bf16.gguf"), str(NUM_THREADS), "1", "2048"]
    else:
        program = [str(python), str(_PROGRAMS / "offload_peer.py")]
        own_files = place.models / "offload"
        rest = [str(place.model), str(own_files), str(NUM_THREADS), str(place.device_memory)]
        if name in _LAID_OUT_ANEW and not (own_files / f"{name}.complete").exists():
            _prepare([*program, f"{name}-prepare", *rest], place.folder / f"{name}-prepare.log")
            (own_files / f"{name}.complete").touch()
        command = [*program, name, *rest]
    log = place.folder / f"{name}-{limit}.log"
    engine = stack.enter_context(started(name, command, {}, version, log, within=within))
    return _Running(engine, own, limit, [], [])


def _drop_cached(folder: Path) -> None:
    """Pages of its files that nobody has mapped: they may be charged to another group."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _prepare(command: Sequence[str], log: Path) -> None:
    """Not in the group: to write weights in another form may take more memory."""
    with log.open("w") as out:
        code = subprocess.run(
            command, env=environment(own=False), stdout=out, stderr=out, check=False
        ).returncode
    if code:
        raise RuntimeError(f"it can't be prepared: {log.read_text(errors='replace')[-1500:]}")


@contextlib.contextmanager
def _ours(place: Place, within: Sequence[str], options: Sequence[str]) -> Iterator[OverHTTP]:
    every = ("--threads", str(NUM_THREADS), "--device-memory", f"{place.device_memory >> 20}MiB")
    runtime_dir, model = place.folder / "run", str(place.model)
    with running_server(
        model, runtime_dir, num_instances=1, options=(*every, *options), within=within
    ):
        status = server_status(runtime_dir)
        yield OverHTTP(
            status["pid"],
            OURS,
            f"{status['url']}/v1/completions",
            lambda prompt, max_tokens: completion(status["model"], prompt, max_tokens),
        )


def say(text: str) -> None:
    """What is done now."""
    print(text, file=sys.stderr, flush=True)
