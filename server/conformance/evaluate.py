"""How well models predict a text, beside the model that they were made of: `onecopy eval`.

Owns what text it is and how it is cut. Invariants: all models are asked for the same tokens, those
of the reference's tokenizer, and one whose tokenizer gives others is refused; nothing of a server
is needed or touched. Never imports torch: what computes is a process of the workers'.
"""

import asyncio
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from pydantic import BaseModel

from allocator import module_command, module_environment
from server.errors import InvalidRequest
from server.models.source import ModelSource
from server.text.loaded_text import KeptTokenizer, LoadedText
from workers.messages import EvaluationRequest, WindowScore, decode_window_score

OWN_TEXT: Final = Path(__file__).with_name("public_domain.txt")
"""The Declaration of Independence, and how Pride and Prejudice begins."""
_CONTEXT_TOKENS: Final = 1 << 24


class Evaluated(BaseModel, frozen=True):
    """One model. Without a reference nothing is said of what is compared with it."""

    model: str
    path: Path
    bytes_on_disk: int
    num_tokens: int
    perplexity: float
    loss_percent: float | None
    """How much larger its perplexity is than the reference's."""
    divergence: float | None
    """Of the reference's distribution from its, a token, in nats."""
    same_percent: float | None
    """How often both have the same favourite."""


class Evaluation(BaseModel, frozen=True):
    """All of them, the reference first."""

    reference: str | None
    text: Path
    num_windows: int
    window_tokens: int
    models: list[Evaluated]


class EvaluationFailed(Exception):
    """What computes could not. The message says why."""


def evaluate(
    models: Sequence[ModelSource],
    reference: ModelSource | None,
    text: Path,
    window_tokens: int,
    dtype: str,
    weights: str,
    kv_cache_dtype: str,
    tell: Callable[[str], None],
) -> Evaluation:
    """`dtype`, `weights` and `kv_cache_dtype` are what instances take as `--dtype`, `--weights` and
    `--kv-cache-dtype`; a reference's weights are expanded, and its keys and values kept as they
    are. `tell` hears how far it is. Raises EvaluationFailed, ServerError,
    CheckpointError, OSError."""
    asked = [*([reference] if reference is not None else []), *models]
    tell("reading the text")
    content = text.read_text()
    cut = [_windows(one, content, window_tokens) for one in asked]
    for one, windows in zip(asked, cut, strict=True):
        if windows != cut[0]:
            raise EvaluationFailed(
                f"the tokenizer of {one.name} makes other tokens of the text than that of "
                f"{asked[0].name}: their perplexities can't be compared"
            )
    if not cut[0]:
        raise EvaluationFailed(f"{text} has fewer than 2 tokens: give a longer one")
    request = EvaluationRequest(
        models=tuple(str(one.path) for one in asked),
        reference=None if reference is None else str(reference.path),
        dtype=dtype,
        weights=weights,
        kv_cache_dtype=kv_cache_dtype,
        windows=tuple(map(tuple, cut[0])),
    )
    scores: list[list[WindowScore]] = [[] for _ in asked]
    for score in _scores(request):
        scores[score.model].append(score)
        done = f"{len(scores[score.model])} of {len(cut[0])} windows"
        tell(
            f"{asked[score.model].name}: {done}, perplexity {_perplexity(scores[score.model]):.3f}"
        )
    best = _perplexity(scores[0])
    return Evaluation(
        reference=None if reference is None else reference.name,
        text=text,
        num_windows=len(cut[0]),
        window_tokens=window_tokens,
        models=[
            _evaluated(one, found, best if reference is not None else None)
            for one, found in zip(asked, scores, strict=True)
        ],
    )


def _windows(source: ModelSource, content: str, window_tokens: int) -> list[list[int]]:
    """Pieces of the text, one behind the other, each behind what the tokenizer puts before any
    text."""
    loaded = LoadedText.of(KeptTokenizer.of(source.path))
    try:

        async def encoded(text: str, special: bool) -> list[int]:
            return await loaded.text.encode(
                text, context_tokens=_CONTEXT_TOKENS, add_special_tokens=special
            )

        before = asyncio.run(encoded("", True))
        ids = asyncio.run(encoded(content, False))
    finally:
        loaded.close()
    step = window_tokens - len(before)
    if step < 1:
        raise InvalidRequest(f"a window of {window_tokens} tokens has no room for text")
    windows = [before + ids[begin : begin + step] for begin in range(0, len(ids), step)]
    return [window for window in windows if len(window) > 1]


def _scores(request: EvaluationRequest) -> Iterator[WindowScore]:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(  # noqa: S603 - our own interpreter and module
        module_command("workers.evaluation.program"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=module_environment(**quiet),
    ) as program:
        assert program.stdin and program.stdout and program.stderr  # noqa: S101, PT018
        try:
            program.stdin.write(msgspec.json.encode(request))
            program.stdin.close()
            for line in program.stdout:
                yield decode_window_score(line)
            words = program.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        finally:
            program.kill()
    if program.returncode != 0:
        raise EvaluationFailed(words or f"it ended with status {program.returncode}")


def _perplexity(scores: Sequence[WindowScore]) -> float:
    num_tokens = sum(one.num_tokens for one in scores)
    return math.exp(min(700.0, sum(one.loss for one in scores) / max(1, num_tokens)))


def _evaluated(
    source: ModelSource, scores: Sequence[WindowScore], reference: float | None
) -> Evaluated:
    num_tokens, own = sum(one.num_tokens for one in scores), _perplexity(scores)
    compares = reference is not None
    return Evaluated(
        model=source.name,
        path=source.path,
        bytes_on_disk=_bytes_on_disk(source.path),
        num_tokens=num_tokens,
        perplexity=own,
        loss_percent=None if reference is None else 100 * (own / reference - 1),
        divergence=sum(one.divergence for one in scores) / num_tokens if compares else None,
        same_percent=100 * sum(one.num_same for one in scores) / num_tokens if compares else None,
    )


def _bytes_on_disk(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
