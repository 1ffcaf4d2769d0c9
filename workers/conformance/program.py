"""Greedy tokens of a model beside what a reference thinks of them: `python -m
workers.conformance.program`.

Reads a `GreedyRequest` from standard input, writes a `GreedyComparison`. Owns the order: our tokens
first, then, once our weights are gone, the reference's word on each, given all of ours before it,
so that one difference hides nothing that comes after it. The weights are read into private memory:
no allocator is needed, and none that runs is disturbed. A model or a reference that fails is one
line on standard error, and exit status 1; one that generates nothing is another, and status 4.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from workers.checkpoint import metadata_of, open_checkpoint
from workers.config.encoder_settings import task_of
from workers.conformance.greedy import generated, read_whole
from workers.conformance.reference import ask_reference
from workers.conformance.ties import ROUNDED_TIE_GAP, TIE_ULPS
from workers.errors import UnsupportedCheckpoint, WorkerError
from workers.messages import (
    GENERATES_NOTHING_STATUS,
    ComparedPrompt,
    GreedyComparison,
    GreedyRequest,
    decode_greedy_request,
)
from workers.model.decoder import build_model
from workers.placement.resident import Resident
from workers.weight_format import float_dtype

DEADLINE_S: Final = 3600.0
"""Of the reference, which may have to read and to compute a large model on few cores."""
_PROGRAMS: Final = {
    "transformers": "transformers_logits.py",
    "llama.cpp": "llamacpp_logits.py",
}


class GeneratesNothing(UnsupportedCheckpoint):
    """The model is for something else."""


def compare(request: GreedyRequest) -> GreedyComparison:
    """Raises WorkerError."""
    dtype, computed_by, new = _ours(request)
    found = _theirs(request, dtype, new)
    rounded = [[ROUNDED_TIE_GAP] * request.num_new] * len(new)
    ties = [[TIE_ULPS[dtype] * ulp for ulp in one] for one in found.get("ulps", [])] or rounded
    prompts = []
    for ids, theirs, gaps, least in zip(new, found["choices"], found["gaps"], ties, strict=True):
        prompts.append(
            ComparedPrompt(
                token_ids=tuple(ids),
                reference_ids=tuple(theirs),
                gaps=tuple(gaps),
                verdicts=tuple(
                    "same" if one == other else "tie" if gap <= tie else "differs"
                    for one, other, gap, tie in zip(ids, theirs, gaps, least, strict=True)
                ),
            )
        )
    return GreedyComparison(
        dtype=dtype, computed_by=computed_by, reference=found["version"], prompts=tuple(prompts)
    )


def _ours(request: GreedyRequest) -> tuple[str, str, list[list[int]]]:
    """The dtype, what computed, and the new tokens of each prompt."""
    checkpoint = open_checkpoint(request.model, request.dtype)
    metadata = metadata_of(checkpoint)
    if task_of(metadata) == "embed":
        raise GeneratesNothing("it embeds texts, and generates none")
    tensors = read_whole(checkpoint)
    dtype = checkpoint.dtype or float_dtype(tensors)
    model = build_model(json.loads(metadata["config"]), Resident(tensors), dtype)
    longest = max(map(len, request.prompts)) + request.num_new
    model.accelerate(256, longest, torch.get_num_threads())  # where it can: as an instance does
    computed_by = f"the kernels for {model.kernels}" if model.kernels else "transformers' modules"
    new = generated(model, request.prompts, request.num_new)
    return str(dtype).removeprefix("torch."), computed_by, new


def _theirs(request: GreedyRequest, dtype: str, new: list[list[int]]) -> dict[str, Any]:
    asked = {
        "model": request.model,
        "is_file": not Path(request.model).is_dir(),
        "dtype": dtype,
        "prompts": request.prompts,
        "new": new,
    }
    return ask_reference(
        request.against,
        Path(__file__).with_name(_PROGRAMS[request.against]),
        asked,
        python=request.python,
        deadline_s=DEADLINE_S,
    )


def main() -> int:
    """Answer one request."""
    try:
        answer = compare(decode_greedy_request(sys.stdin.buffer.read()))
    except GeneratesNothing as error:
        _failed(str(error))
        return GENERATES_NOTHING_STATUS
    except WorkerError as error:
        return _failed(str(error))
    except Exception as error:  # noqa: BLE001
        # The architectures are not our code: whatever building one raises is shown to a person.
        return _failed(f"it can't be computed: {type(error).__name__}: {error}")
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(" ".join(message.split())[:2000] + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
