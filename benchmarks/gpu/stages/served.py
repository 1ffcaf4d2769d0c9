"""A served model: the same tokens as transformers, how fast, what a further instance costs, whether
one copy is proven, and that it sleeps and wakes. The model is random, or the demo."""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _checkpoints import LlamaSize, random_llama, save_served_weights
from _client import Stream, completion, random_prompt, stream, together, tokens_per_s
from _server import onecopy, running_server, server_status, wait_ready
from gpu.figures import process_bytes, settles, used_bytes
from gpu.stage import NotRun, Stage, main

from tests.workers.tiny_models import write_tokenizer
from workers.conformance.ties import BF16_TIE_ULPS

_PEER = Path(__file__).parent.parent / "peer.py"
_RANDOM = LlamaSize(num_layers=24, hidden=2048, inner=5632)
_TINY = LlamaSize(num_layers=2, hidden=64, inner=96, num_heads=4, num_kv_heads=2, vocab=49152)
_SAFETENSORS = "model.safetensors"
_SPARE_BYTES = 200 << 20
_TELLING_BYTES = 1 << 30
"""Of weights that a further copy of would stand out from what contexts and kernels take."""


class Served:
    """The server, its peer, and what both are asked."""

    def __init__(self, stage: Stage, model: str):
        self.stage = stage
        self.runtime_dir = stage.folder / "run"
        self.model = model
        self.length = 16 if stage.small else 128
        self.rounds = 1 if stage.small else 2
        self.most_taken = 0
        """Bytes of the device, by any further instance."""
        self._address = ("", "")

    @property
    def status(self) -> dict[str, Any]:
        return server_status(self.runtime_dir)

    def used(self) -> int:
        """Of the device; nothing that tells anything where there is none."""
        return used_bytes(self.stage.device) if self.stage.on_gpu else 0

    def ask(self, prompts: list[list[int]]) -> list[Stream]:
        if not self._address[0]:  # to ask takes a process, and a second
            status = self.status
            self._address = (f"{status['url']}/v1/completions", status["model"])
        url, model = self._address

        async def all_at_once() -> list[Stream]:
            return await together(
                stream(url, completion(model, one, self.length)) for one in prompts
            )

        return asyncio.run(all_at_once())

    def prompts(self, count: int, seed: str) -> list[list[int]]:
        chance = random.Random(seed)
        return [random_prompt(chance, self.length) for _ in range(count)]


class Peer:
    """`gpu/peer.py` in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended; its words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def peer(folder: Path, device: str) -> Iterator[Peer]:
    with subprocess.Popen(
        [sys.executable, "-P", str(_PEER), str(folder), device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        asked = Peer(process)
        asked.answer()
        yield asked
        assert process.stdin is not None
        process.stdin.close()


def run(stage: Stage) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("random", "demo"), default="random")
    which = parser.parse_known_args()[0].model
    model = _random(stage) if which == "random" else "demo"
    served = Served(stage, model)
    before = served.used()
    options = ["--device", stage.device, "--max-model-len", "4096"]
    with running_server(model, served.runtime_dir, num_instances=1, options=options) as ready_ms:
        with stage.part("start"):
            _started(served, ready_ms, before)
        with stage.part("beside transformers"):
            _beside_transformers(served)
        with stage.part("further instances"):
            _further(served)
        with stage.part("verify"):
            _verify(served)
        with stage.part("sleep and wake"):
            _sleep(served)
    with stage.part("after the end"):
        left = settles(served.used, lambda now: now <= before + (64 << 20))
        stage.claim("the device's memory is back", left <= before + (64 << 20), left=left - before)


def _random(stage: Stage) -> str:
    size = _TINY if stage.small else _RANDOM
    device = stage.device if stage.on_gpu else "cpu"
    folder = stage.folder / "random-llama"
    return str(random_llama(folder, size, write_tokenizer, device))


def _started(served: Served, ready_ms: float, before: int) -> None:
    status = served.status
    stage, (first,) = served.stage, status["instances"]
    stage.figure("weights_bytes", status["weights_bytes"])
    stage.figure("process_start_to_ready_ms", round(ready_ms))
    stage.figure("first_instance_phases_ms", _rounded(first["startup_ms"]))
    if stage.on_gpu:
        stage.figure("device_bytes_with_one_instance", served.used() - before)


def _beside_transformers(served: Served) -> None:
    stage, folder = served.stage, Path(served.model)
    if not (folder / _SAFETENSORS).exists():
        folder = stage.folder / "for-the-peer"
        save_served_weights(served.status["path"], served.runtime_dir, folder)
    with peer(folder, stage.device) as transformers:
        _equality(served, transformers)
        _speed(served, transformers)


def _equality(served: Served, transformers: Peer) -> None:
    prompts = served.prompts(4, "equality")
    alone = [served.ask([one])[0].token_ids for one in prompts]
    judged = [
        transformers.ask({"judge": [prompt, new]})
        for prompt, new in zip(prompts, alone, strict=True)
    ]
    served.stage.figure(
        "first_tokens_equal", [f"{one['equal']} of {served.length}" for one in judged]
    )
    served.stage.claim(
        f"each greedy token is transformers' own, or within {BF16_TIE_ULPS} bf16 ulps of it",
        all(one["ulps"] <= BF16_TIE_ULPS for one in judged),
        most_ulps=max(one["ulps"] for one in judged),
    )
    in_company = [one.token_ids for one in served.ask(prompts)]
    changed = sum(a != b for a, b in zip(alone, in_company, strict=True))
    served.stage.figure("texts_that_company_changed", changed)


def _speed(served: Served, transformers: Peer) -> None:
    rates: dict[str, list[float]] = {}
    served.ask(served.prompts(1, "warm"))
    for count in (1, 8):
        for number in range(served.rounds + 1):
            prompts = served.prompts(count, f"{count} {number}")
            request = {"generate": prompts, "max_tokens": served.length}
            theirs = transformers.ask(request)["seconds"]
            ours = tokens_per_s(served.ask(prompts))
            if number or served.rounds == 1:  # the first round warms both up
                rates.setdefault(f"onecopy_{count}", []).append(ours)
                rate = count * served.length / theirs
                rates.setdefault(f"transformers_{count}", []).append(rate)
    medians = {name: round(statistics.median(some), 1) for name, some in rates.items()}
    served.stage.figure("tokens_per_s", medians)
    if served.stage.small:  # so small a model tells of nothing but Python
        return
    for count in (1, 8):
        ours, theirs = medians[f"onecopy_{count}"], medians[f"transformers_{count}"]
        served.stage.claim(f"no slower than transformers at {count}", ours >= theirs)


def _further(served: Served) -> None:
    stage, taken = served.stage, []
    for count in (2, 3, 4):
        before = served.used()
        onecopy(served.runtime_dir, "scale", str(count))
        status = wait_ready(served.runtime_dir, count)
        served.ask(served.prompts(count, "all of them"))
        taken.append(served.used() - before)
    further = status["instances"][1:]
    stage.figure("further_instances_ready_ms", [round(one["ready_ms"], 1) for one in further])
    stage.figure("further_instance_phases_ms", _rounded(further[-1]["startup_ms"]))
    if stage.on_gpu:
        stage.figure("device_bytes_of_each_further_instance", taken)
        by_process = [process_bytes(stage.device, one["pid"]) for one in status["instances"]]
        stage.figure("device_bytes_by_process", by_process)
        weights = status["weights_bytes"]
        served.most_taken = max(taken)
        if weights >= _TELLING_BYTES:
            stage.claim(
                "a further instance takes no copy of the weights",
                served.most_taken < weights,
                weights_bytes=weights,
            )


def _verify(served: Served) -> None:
    if served.stage.on_gpu and served.status["weights_bytes"] < _TELLING_BYTES:
        raise NotRun("what contexts take differs by more than the weights: a copy would not show")
    # What it may have by default is so much that less weights than these could hide among several.
    allowed = served.most_taken + _SPARE_BYTES
    ended = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "server.cli", "verify", "--json"),
            *("--runtime-dir", str(served.runtime_dir)),
            *(("--max-private", str(allowed)) if served.most_taken > 0 else ()),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    verdict = json.loads(ended.stdout)
    served.stage.figure("verdict", verdict)
    served.stage.claim("onecopy verify holds", verdict["holds"], problems=verdict["problems"])


def _sleep(served: Served) -> None:
    stage, prompts = served.stage, served.prompts(1, "sleep")
    (before,), used = served.ask(prompts), served.used()
    onecopy(served.runtime_dir, "sleep")
    weights = served.status["weights_bytes"]
    if stage.on_gpu:
        after = settles(served.used, lambda now: now <= used - weights)
        stage.claim("a sleeping model takes nothing of the device", used - after >= weights)
        stage.figure("device_bytes_freed_by_sleep", used - after)
    onecopy(served.runtime_dir, "wake")
    wait_ready(served.runtime_dir, served.status["num_wanted"])
    (after_waking,) = served.ask(prompts)
    stage.claim("it says the same after waking", after_waking.token_ids == before.token_ids)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


if __name__ == "__main__":
    main(run)
