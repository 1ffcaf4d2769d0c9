"""The tables of docs/models.md, made of what the tests run.

    python -m tests.documents.models_tables          # writes them into docs/models.md

Owns what a document says of each family beside what its tests are called. Invariant: a model is in
a table where, and only where, a test is parametrized over it; so is the kind of file that it is
tried with. Each table stands between two comments in the document.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from server.text.gguf.splits import SPLITS
from tests.server.text.gguf.approximations import AS_LLAMACPP
from tests.server.text.test_published_templates import PUBLISHED
from tests.workers.checkpoint.gguf_converter import CONVERTERS
from tests.workers.checkpoint.test_checkpoint_gguf_architectures import MODELS
from tests.workers.model.tiny_families import FAMILIES, REFUSED, REFUSED_BY_NAME, tiny_config
from tests.workers.tiny_models import CONFIGS
from workers.model.native.families import DECODERS

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "models.md"
PARTICULAR: Final[Mapping[str, str]] = {
    "Llama and what is nearly one": "llama mistral qwen2 seed_oss smollm3 arcee helium ernie4_5",
    "norms on queries and keys, or after the blocks": "qwen3 olmo2 olmo3 exaone4 glm4 apertus",
    "soft caps, two bases of rotation, norms stored less 1": "gemma gemma2 gemma3_text gemma4_text",
    "fused projections, longrope": "phi3",
    "parallel residual, partial rotation, LayerNorm": "gpt_neox phi cohere cohere2 stablelm "
    "nemotron olmo persimmon starcoder2",
    "scaled residuals and logits": "granite",
    "position tables instead of rotation": "gpt2 opt biogpt",
    "attention sinks": "granite_swa gpt_oss",
    "experts": "mixtral qwen2_moe qwen3_moe olmoe phimoe granitemoe dots1 glm4_moe ernie4_5_moe "
    "minimax_m2",
}
"""What a test of a family is about: its model_types."""


def families() -> str:
    """Each model_type with what it is tried as: a folder of safetensors, a GGUF file."""
    as_folder: dict[str, list[str]] = {}
    for name in (*CONFIGS, *FAMILIES):
        as_folder.setdefault(str(tiny_config(name).model_type), []).append(name)
    as_file: dict[str, list[str]] = {}
    for name, (family, _) in MODELS.items():
        as_file.setdefault(str(tiny_config(family).model_type), []).append(name)
    rows = []
    for what, listed in PARTICULAR.items():
        for model_type in listed.split():
            architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
            file = ""
            if names := as_file.pop(model_type, None):
                file = f"`{CONVERTERS[model_type].architecture}`{_variants(model_type, names)}"
            folder = f"yes{_variants(model_type, as_folder.pop(model_type))}"
            by = "kernels" if architecture in DECODERS else "modules"
            rows.append((f"`{model_type}`", folder, file, by, what))
    left = {*as_folder, *as_file}
    if left:
        raise LookupError(f"PARTICULAR says nothing of {', '.join(sorted(left))}")
    heads = ("model_type", "a folder of safetensors", "a GGUF file", "in bf16 by", "particular")
    return _table(heads, rows)


def refused() -> str:
    """What a test has refused, and by which words."""
    rows = [(name, reason) for name, (_, reason) in REFUSED.items()]
    by_reason: dict[str, set[str]] = {}
    for name, reason in (*rows, *REFUSED_BY_NAME):
        by_reason.setdefault(reason, set()).add(f"`{name}`")
    listed = [(why, ", ".join(sorted(names))) for why, names in sorted(by_reason.items())]
    return _table(("the message says", "model_type"), listed)


def splits() -> str:
    """The names of `tokenizer.ggml.pre`, by what they were held against."""
    same = [name for name in SPLITS if name not in AS_LLAMACPP]
    rows = [
        ("llama.cpp's ids", _code(same)),
        ("the model's own tokenizer's, which llama.cpp approximates", _code(AS_LLAMACPP)),
    ]
    return _table((f"gives (of {len(SPLITS)})", "`tokenizer.ggml.pre`"), rows)


def templates() -> str:
    """Whose templates are rendered as transformers renders them."""
    names = [one.name for one in PUBLISHED]
    return f"{len(names)}: {', '.join(sorted(names))}.\n"


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "families": families,
    "refused": refused,
    "splits": splits,
    "templates": templates,
}


def with_tables(document: str) -> str:
    """The document, its tables made anew. Raises LookupError where it has no place for one."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: python -m tests.documents.models_tables -->\n", "<!-- end -->\n"
        parts = re.split(f"({re.escape(begin)}).*?({end})", document, flags=re.DOTALL)
        if len(parts) != 4:
            raise LookupError(f"the document has {(len(parts) - 1) // 3} places for {name}")
        before, begin, end, after = parts
        document = f"{before}{begin}{make()}{end}{after}"
    return document


def _variants(model_type: str, names: Sequence[str]) -> str:
    """What is tried beside the plain one."""
    stem = min(names, key=len)
    others = [name.removeprefix(stem).strip("-") or "plain" for name in names if name != stem]
    return f"; also {', '.join(others)}" if others else ""


def _code(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
