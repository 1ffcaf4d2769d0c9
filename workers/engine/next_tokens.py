"""The tokens that follow from a step's logits: one for each sequence, and further ones where its
draft was right.

Invariant: whatever is raised over one sequence's choice ends that one, after what it gained before.
"""

from collections.abc import Callable, Sequence

import torch

from workers.engine.ends import Ends
from workers.engine.forward import Computed
from workers.engine.isolation import in_sound_groups
from workers.engine.sequence import GenerationSequence
from workers.errors import InvalidLogits, NoTokenLeft
from workers.messages import FinishReason, Output, TokenLogprobs
from workers.sampling import Sampled, sample


class NextTokens:
    """Chooses for the sequences of one engine."""

    def __init__(
        self,
        ends: Ends,
        finish_reason: Callable[[GenerationSequence], FinishReason | None],
        has_arrived: Callable[[GenerationSequence], bool],
    ) -> None:
        """`finish_reason` says whether a sequence's last token was its last one, `has_arrived`
        whether what its grammar allows behind it is known."""
        self._ends = ends
        self._finish_reason = finish_reason
        self._has_arrived = has_arrived
        self.num_accepted = 0
        """Tokens computed on trial that were right."""

    def follow(self, computed: Sequence[Computed], logits: torch.Tensor) -> list[Output]:
        """Add to each sequence what follows from its row of `logits` on."""
        emitted: dict[GenerationSequence, list[Sampled]] = {
            one.chunk.sequence: [] for one in computed
        }
        outputs: list[Output] = []
        going_on = list(computed)
        position = 0
        while going_on:
            rows = [one.last_row + position for one in going_on]
            further = []
            for one, token in zip(going_on, self._choose(going_on, rows, logits), strict=True):
                sequence = one.chunk.sequence
                own = emitted.setdefault(sequence, [])
                try:
                    reason, goes_on = self._take(one, token, own, position)
                    if goes_on:
                        further.append(one)
                    else:
                        outputs += self._emit(sequence, own, reason)
                except InvalidLogits as error:
                    outputs += self._emit(sequence, own, None)
                    invalid = isinstance(error, NoTokenLeft)
                    failed = self._ends.fail(sequence, str(error), keep=False, invalid=invalid)
                    outputs.append(failed)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is this sequence's
                    outputs += self._emit(sequence, own, None)
                    outputs.append(self._ends.broken(sequence, error))
            going_on = further
            position += 1
        return outputs

    def _choose(
        self, going_on: Sequence[Computed], rows: Sequence[int], logits: torch.Tensor
    ) -> list[Sampled | Exception]:
        """The token that follows from each of `rows`, or why there is none."""
        samplers = [one.chunk.sequence.sampler for one in going_on]

        def together(some: Sequence[int]) -> list[Sampled | InvalidLogits]:
            wanted = [rows[index] for index in some]
            own = logits if wanted == list(range(len(logits))) else logits[wanted]
            return sample(own, [samplers[index] for index in some])

        chosen: list[Sampled | Exception] = []
        for _, found in in_sound_groups(range(len(rows)), together):
            chosen += [found] if isinstance(found, Exception) else found
        return chosen

    def _take(
        self, one: Computed, token: Sampled | Exception, taken: list[Sampled], position: int
    ) -> tuple[FinishReason | None, bool]:
        """Add one more to the tokens that a sequence has `taken` in this step. Returns why it has
        ended, if it has, and whether the draft was right, so that another follows. Raises what
        there is in the token's place."""
        if isinstance(token, Exception):
            raise token
        sequence, draft = one.chunk.sequence, one.chunk.draft
        sequence.sampler.accept(token.token)
        reason = self._finish_reason(sequence)
        taken.append(token)
        right = position < len(draft) and token.token == draft[position]
        if reason is not None or not right or not self._has_arrived(sequence):
            return reason, False
        self.num_accepted += 1
        sequence.table.commit(1)
        return None, True

    def _emit(
        self, sequence: GenerationSequence, tokens: list[Sampled], reason: FinishReason | None
    ) -> list[Output]:
        if not tokens:
            return []
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sequence.sampling.logprobs is not None:
            logprobs = tuple(one.logprobs for one in tokens if one.logprobs is not None)
        output = Output(
            request_id=sequence.request_id,
            token_ids=tuple(one.token for one in tokens),
            finish_reason=reason,
            logprobs=logprobs,
            num_cached=sequence.num_cached or 0,
        )
        sequence.num_cached = 0
        if reason is not None:
            self._ends.forget(sequence)
        return [output]
