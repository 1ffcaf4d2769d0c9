"""What the instances of a fleet serve: a model as it was when it was loaded.

Invariant: it changes as a whole, when the model is loaded anew; requests and instances name the one
that they are for by its `epoch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workers.messages import ModelFacts, Ready


@dataclass(frozen=True)
class ModelState:
    """One state of a model; what it holds is known from the first instance that is ready."""

    path: Path
    tokenizer: Path
    """Where instances find the model's tokenizer.json."""
    epoch: int = 0
    """Goes up whenever the model is loaded anew."""
    ready: Ready | None = None
    """What that instance said."""

    @property
    def facts(self) -> ModelFacts | None:
        """What a server needs to know to admit requests."""
        return self.ready.facts if self.ready is not None else None

    @property
    def weight_set(self) -> str | None:
        """The key under which the allocator knows the weights. All further instances attach to this
        set, whatever becomes of the model's files."""
        return self.ready.weight_set if self.ready is not None else None

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """Of that set: all that is needed to build the model on it."""
        return self.ready.metadata if self.ready is not None else None
