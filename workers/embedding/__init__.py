"""Models that make one vector of a text: encoders, and decoders that were trained for it."""

from workers.embedding.engine import EmbeddingEngine
from workers.embedding.model import EmbeddingModel, build_embedding_model, preload
from workers.embedding.settings import task_of

__all__ = [
    "EmbeddingEngine",
    "EmbeddingModel",
    "build_embedding_model",
    "preload",
    "task_of",
]
