"""The real model's tokenizer, unpacked once for all tests of the server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.text import Text
from server.tokenizer_files import tokenizer_folder


@pytest.fixture(scope="session")
def tokenizer_dir(smollm2_gguf: Path, tokenizer_cache: Path) -> Path:
    return tokenizer_folder(smollm2_gguf, tokenizer_cache)


@pytest.fixture(scope="session")
def text(tokenizer_dir: Path) -> Iterator[Text]:
    loaded = Text.load(tokenizer_dir)
    yield loaded
    loaded.close()
