"""How a sequence ends.

Invariant: who ends has left the schedule, its blocks and its grammar at once, and is answered once.
"""

import logging

from workers.engine.kv_room import KVRoom
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import GenerationSequence
from workers.errors import for_the_wire, unexpected
from workers.messages import Output, Problem

logger = logging.getLogger(__name__)


class Ends:
    """Of the sequences of one engine."""

    def __init__(self, scheduler: Scheduler, room: KVRoom) -> None:
        self._scheduler = scheduler
        self._room = room

    def forget(self, sequence: GenerationSequence, *, keep: bool = True) -> None:
        """It has ended. `keep` what it has computed for others to find."""
        self._scheduler.remove(sequence.request_id)
        self._room.end(sequence, keep=keep)
        sequence.sampler.leave()

    def fail(
        self,
        sequence: GenerationSequence,
        problem: str,
        *,
        keep: bool = True,
        invalid: bool = False,
        kind: Problem = "",
    ) -> Output:
        """End it with an error. `invalid`: the request is to blame; `kind` says which error it is,
        where a client can do something about it."""
        self.forget(sequence, keep=keep)
        return refusal(sequence.request_id, problem, invalid=invalid, kind=kind)

    def broken(self, sequence: GenerationSequence, error: Exception) -> Output:
        """End a sequence over which something was raised that nobody expects. What it computed is
        not kept: nobody knows how far it was right."""
        logger.error("request %s ends by an error", sequence.request_id, exc_info=error)
        return self.fail(sequence, unexpected(error), keep=False)


def refusal(request_id: str, problem: str, *, invalid: bool = False, kind: Problem = "") -> Output:
    """The one answer to a request that is not served."""
    return Output(
        request_id=request_id,
        token_ids=(),
        finish_reason="error",
        invalid=invalid,
        problem=kind,
        error=for_the_wire(problem),
    )
