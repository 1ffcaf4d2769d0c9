"""Steps and the grammars that are followed beside them.

Owns how long a step waits for what grammars allow. Invariant: who has no answer in time sits out,
and holds up nobody else.
"""

from collections.abc import Iterable
from typing import Final

from workers.engine.ends import Ends
from workers.engine.sequence import GenerationSequence
from workers.messages import Output
from workers.sampling import GrammarCompiler

_WAIT_S: Final = 0.005
_WAIT_SHARE: Final = 0.25
_MOST_WAIT_S: Final = 0.05
"""How long a step waits for what grammars allow, at least, as a share of the time that the last
one took, and at most; who has it later sits out until then."""
_DRAFT_WAIT_S: Final = 0.001
"""How long a further token of a draft waits for it."""
_HELD_WAIT_S: Final = 0.02
"""How long a step waits where there is nothing else to do."""


class GrammarWait:
    """Of one engine."""

    def __init__(self, grammars: GrammarCompiler, ends: Ends) -> None:
        self._grammars = grammars
        self._ends = ends

    def hold(self, sequences: Iterable[GenerationSequence], last_step_s: float) -> list[Output]:
        """Let those sit out whose grammar has not come as far as they have, and end those whose
        grammar can't go on."""
        followed = [
            (sequence, grammar)
            for sequence in sequences
            if (grammar := sequence.sampler.grammar) is not None
        ]
        if not followed:
            return []
        self._grammars.receive(min(max(_WAIT_S, _WAIT_SHARE * last_step_s), _MOST_WAIT_S))
        outputs = []
        for sequence, grammar in followed:
            sequence.is_held = not grammar.arrived
            if grammar.problem is not None:
                problem = f"the grammar can't be used: {grammar.problem}"
                outputs.append(self._ends.fail(sequence, problem, invalid=grammar.is_invalid))
        return outputs

    def has_arrived(self, sequence: GenerationSequence) -> bool:
        """Whether a further token of a draft can be chosen now."""
        grammar = sequence.sampler.grammar
        if grammar is None:
            return True
        self._grammars.receive(_DRAFT_WAIT_S)
        return grammar.arrived

    def wait(self) -> None:
        """There is nothing else to do."""
        self._grammars.receive(_HELD_WAIT_S, late_too=True)
