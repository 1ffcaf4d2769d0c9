"""What a step gave, as frames that the server takes.

Owns the cut into frames. Invariants: no frame is longer than `MAX_FRAME_BYTES`, which would end the
connection; one output that can't be told becomes the end of its own request and keeps none of the
others back.
"""

import logging
from collections.abc import Callable, Iterator

import msgspec

from workers.errors import unexpected
from workers.messages import MAX_FRAME_BYTES, Embedded, Output, StepOutput, encode

log = logging.getLogger("onecopy.instance")


def frames(
    step: StepOutput, give_up: Callable[[str], None], most_bytes: int = MAX_FRAME_BYTES
) -> Iterator[bytes]:
    """One frame as a rule; a frame for each output, or for a part of one, where that is too long or
    can't be made. `give_up` is told the request of an output that can't be told at all."""
    frame = _frame(step)
    if isinstance(frame, bytes) and len(frame) <= most_bytes:
        yield frame
        return
    alone = len(step.outputs) == 1
    parts = _parts(step.outputs[0], frame, give_up) if alone else step.outputs
    for one in parts:
        yield from frames(msgspec.structs.replace(step, outputs=(one,)), give_up, most_bytes)


def _frame(step: StepOutput) -> bytes | Exception:
    try:
        return encode(step)
    except Exception as error:  # noqa: BLE001 - what is in an output came from a request
        return error


def _parts(
    output: Output | Embedded, frame: bytes | Exception, give_up: Callable[[str], None]
) -> tuple[Output | Embedded, ...]:
    """Log probabilities of a prompt may come piece by piece. What can't be cut is given up."""
    if isinstance(output, Output) and isinstance(frame, bytes) and len(output.prompt_logprobs) > 1:
        middle = len(output.prompt_logprobs) // 2
        first, rest = output.prompt_logprobs[:middle], output.prompt_logprobs[middle:]
        return (
            Output(request_id=output.request_id, token_ids=(), prompt_logprobs=first),
            msgspec.structs.replace(output, prompt_logprobs=rest),
        )
    if isinstance(frame, Exception):
        log.error("an output of request %s can't be told", output.request_id, exc_info=frame)
        problem = unexpected(frame)
    else:
        problem = f"a part of the answer is longer than a message of {MAX_FRAME_BYTES} bytes holds"
    give_up(output.request_id)
    if isinstance(output, Output):
        failed = Output(
            request_id=output.request_id, token_ids=(), finish_reason="error", error=problem
        )
        return (failed,)
    return (Embedded(request_id=output.request_id, error=problem),)
