"""How well models predict a text: `python -m workers.evaluation.program`.

Reads an `EvaluationRequest` from standard input, writes a `WindowScore` a line, as soon as it is
known. The weights are read into private memory, those of the reference and of one model at a time:
no allocator is needed, and none that runs is disturbed. What fails is one line on standard error,
and exit status 1.
"""

import gc
import sys

import msgspec
import torch

from workers.errors import WorkerError
from workers.evaluation.likelihood import loaded, score
from workers.messages import EvaluationRequest, WindowScore, decode_evaluation_request
from workers.model.decoder import Model
from workers.placement.packing import open_as_served
from workers.settings import checked


def evaluate(request: EvaluationRequest) -> None:
    """Prints what it finds. Raises WorkerError."""
    longest = max(map(len, request.windows))
    reference = None
    if request.reference is not None:
        reference = _loaded(request.reference, request.dtype, "bf16", "auto", longest)
    for number, path in enumerate(request.models):
        is_reference = reference is not None and number == 0
        model = reference
        if model is None or not is_reference:
            model = _loaded(path, request.dtype, request.weights, request.kv_cache_dtype, longest)
        with torch.inference_mode():
            for index, window in enumerate(request.windows):
                found = score(model, window, None if is_reference else reference)
                line = WindowScore(
                    model=number,
                    window=index,
                    num_tokens=found.num_tokens,
                    loss=found.loss,
                    divergence=found.divergence,
                    num_same=found.num_tokens if is_reference else found.num_same,
                )
                sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
                sys.stdout.flush()
        del model
        gc.collect()


def _loaded(path: str, dtype: str, weights: str, kv_cache_dtype: str, longest: int) -> Model:
    settings = checked({"dtype": dtype, "weights": weights, "kv_cache_dtype": kv_cache_dtype})
    return loaded(open_as_served(path, settings), longest, settings)


def main() -> int:
    """Answer one request."""
    try:
        evaluate(decode_evaluation_request(sys.stdin.buffer.read()))
    except WorkerError as error:
        return _failed(str(error))
    except Exception as error:  # noqa: BLE001
        # The architectures are not our code: whatever building one raises is shown to a person.
        return _failed(f"it can't be computed: {type(error).__name__}: {error}")
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(" ".join(message.split())[:2000] + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
