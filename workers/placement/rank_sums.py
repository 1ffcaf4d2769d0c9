"""What an instance's ranks sum, and the memory that this takes.

Owns these sizes: who leases the memory and who plans for it ask here. Does not know how ranks sum.
"""

from typing import Any

from workers.model.native.decoder import num_summed as num_rows_summed
from workers.placement.all_reduce import num_bytes
from workers.settings import EngineSettings


def num_summed(settings: EngineSettings, module: Any) -> int:
    """Numbers that ranks of a decoder of `transformers` sum at a time: rows of the residual stream
    where they divide the model, the logits of a row where they divide the sequences."""
    embeddings = module.get_input_embeddings()
    if settings.tensor_parallel_size > 1:
        return num_rows_summed(settings.most_rows, embeddings.embedding_dim)
    return int(embeddings.num_embeddings)


def sums_bytes(settings: EngineSettings, module: Any) -> int:
    """Of the memory in which they do, 0 for a single rank. Raises Unavailable, ValueError."""
    if settings.num_ranks == 1:
        return 0
    return num_bytes(settings.num_ranks, num_summed(settings, module))
