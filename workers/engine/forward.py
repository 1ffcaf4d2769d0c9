"""The chunks of a step through the model, all together where they are sound.

Invariants: of a chunk that can't be computed nothing is kept, and the others are computed without
it; afterwards a sequence's cache holds its own tokens, and none that was computed on trial.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.engine.device import Fault, require_device
from workers.engine.isolation import in_sound_groups
from workers.engine.scheduler import Chunk
from workers.model.batch import Batch, Part
from workers.model.decoder import Model


@dataclass(frozen=True, slots=True)
class Computed:
    """A chunk whose keys and values are there; its logits are rows [first_row, first_row +
    num_rows) of those of all."""

    chunk: Chunk
    first_row: int
    num_rows: int

    @property
    def last_row(self) -> int:
        """The row from which the next token follows, without a draft."""
        return self.first_row + self.num_rows - 1 - len(self.chunk.draft)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What one pass gave."""

    computed: list[Computed]
    logits: torch.Tensor
    failed: list[tuple[Chunk, Exception]]


class Forward:
    """Passes of one model."""

    def __init__(self, model: Model, device_fault: Fault) -> None:
        """`device_fault` is asked after a failed pass."""
        self._model = model
        self._device_fault = device_fault
        self.num_drafted = 0
        """Tokens that were computed on trial."""

    def run(self, chunks: Sequence[Chunk]) -> Forwarded:
        """Compute them. Raises InstanceLost."""
        parts = [(chunk, self._part(chunk)) for chunk in chunks]
        computed: list[Computed] = []
        failed: list[tuple[Chunk, Exception]] = []
        logits: list[torch.Tensor] = []
        row = 0
        for group, found in in_sound_groups(parts, self._pass):
            if isinstance(found, Exception):
                failed += [(chunk, found) for chunk, _ in group]
                continue
            logits.append(found)
            for chunk, part in group:
                computed.append(Computed(chunk, row, part.num_logits))
                row += part.num_logits
                if chunk.draft:
                    chunk.sequence.table.rewind(chunk.stop)
        return Forwarded(computed, self._joined(logits), failed)

    def _joined(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(logits) == 1:
            return logits[0]
        nothing = torch.empty(0, self._model.geometry.vocab_size)
        return torch.cat(list(logits)) if logits else nothing

    def _pass(self, parts: Sequence[tuple[Chunk, Part]]) -> torch.Tensor:
        try:
            return self._model.forward(Batch.of([part for _, part in parts])).cpu()
        except Exception as error:  # the architectures are not our code
            require_device(self._device_fault, error)
            raise

    def _part(self, chunk: Chunk) -> Part:
        sequence = chunk.sequence
        tokens = [*sequence.token_ids[chunk.start : chunk.stop], *chunk.draft]
        num_logits = 1 + len(chunk.draft) if chunk.samples else 0
        if sequence.sampling.prompt_logprobs is not None and chunk.start < sequence.num_prompt:
            num_logits = len(tokens)
        self.num_drafted += len(chunk.draft)
        return Part(sequence.table, tokens, num_logits)
