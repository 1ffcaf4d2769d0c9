"""What a model is for, and how its hidden states become a vector: read from its own files.

Owns the meaning of the steps that sentence-transformers lists. Invariant: a step that would change
the vector and isn't computed here is refused by name, never left out. Does not know files, tensors
or architectures' code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from workers.errors import UnsupportedCheckpoint
from workers.messages import Task

Pooling = Literal["mean", "cls", "last", "max"]
"""Of a text's hidden states: their mean, the first, the last, or the largest of each number."""

ENCODERS: Final = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
    }
)
"""Model types whose hidden states are of use by themselves, and that were compared with
transformers' own (tests/workers/model/test_embedding_model.py)."""

_OTHER_HEADS: Final = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
_NAMES: Final[Mapping[str, Pooling]] = {
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_tokens": "mean",
}
"""As sentence-transformers writes them: `"pooling_mode": "mean"`, formerly
`"pooling_mode_mean_tokens": true`."""


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """How a text's hidden states become its vector."""

    pooling: Pooling = "mean"
    normalize: bool = True
    """Whether a vector is divided by its length."""
    max_seq_length: int | None = None
    """Tokens up to which its authors trained it; None is what the architecture can take."""


def task_of(metadata: Mapping[str, str]) -> Task:
    """What the checkpoint with this metadata is for. Raises UnsupportedCheckpoint for an encoder
    with a head of another purpose."""
    if "sentence" in metadata:
        return "embed"
    config = json.loads(metadata["config"])
    if config.get("model_type") not in ENCODERS or config.get("is_decoder"):
        return "generate"
    names = config.get("architectures") or []
    other = [name for name in names if str(name).endswith(_OTHER_HEADS)]
    if other:
        raise UnsupportedCheckpoint(
            f"{other[0]} is neither a decoder nor a model of embeddings: it can't be served"
        )
    return "embed"


def read_settings(metadata: Mapping[str, str]) -> EmbeddingSettings:
    """Of a checkpoint whose task is to embed; without files of sentence-transformers, the defaults.
    Raises UnsupportedCheckpoint."""
    if "sentence" not in metadata:
        return EmbeddingSettings()
    sentence = json.loads(metadata["sentence"])
    modules = sentence["modules"]
    kinds = [module["type"] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise UnsupportedCheckpoint(
            f"modules.json lists the step {unknown[0]}, which is not computed here"
        )
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedCheckpoint(
            f"modules.json lists {', '.join(kinds) or 'no step'}: possible are Transformer, "
            "Pooling and, last, Normalize"
        )
    return EmbeddingSettings(
        pooling=_pooling(modules[1]["config"]),
        normalize="Normalize" in kinds,
        max_seq_length=sentence.get("max_seq_length"),
    )


def _pooling(config: Mapping[str, Any]) -> Pooling:
    """The one way that a Pooling step's config names. Raises UnsupportedCheckpoint."""
    prefix = "pooling_mode_"
    named = config.get("pooling_mode")
    chosen = (
        [named]
        if named
        else [
            key.removeprefix(prefix)
            for key, on in config.items()
            if key.startswith(prefix) and on is True
        ]
    )
    if not chosen:
        return "mean"
    if len(chosen) > 1 or chosen[0] not in _NAMES:
        raise UnsupportedCheckpoint(
            f"the Pooling step is {' + '.join(map(str, chosen))}; computed here is one of "
            f"{', '.join(get_args(Pooling))}"
        )
    return _NAMES[chosen[0]]
