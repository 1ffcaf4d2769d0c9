"""A model as it is served at one moment: what a request that begins now is answered with.

Invariant: a request keeps to the one that it began with, also where the model is loaded anew
meanwhile.
"""

from dataclasses import dataclass

from server.generation import NO_ADVICE, Generator, SamplingDefaults
from server.text.text import Text


@dataclass(frozen=True)
class Serving:
    """All that the HTTP side needs of one model."""

    model_name: str
    generator: Generator
    text: Text
    created: int
    """When the server began to serve it, in seconds since 1970."""
    sampling_defaults: SamplingDefaults = NO_ADVICE
