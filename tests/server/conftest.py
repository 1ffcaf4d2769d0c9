"""The real model's tokenizer, unpacked once for all tests of the server; fleets of a tiny model."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from server.text.text import Text
from server.text.tokenizer_files import tokenizer_folder
from tests.daemon_process import DaemonProcess
from tests.server.fleet.tiny_fleet import Serve, served
from tests.workers.tiny_models import write_checkpoint


@pytest.fixture(scope="session")
def tokenizer_dir(smollm2_gguf: Path, tokenizer_cache: Path) -> Path:
    return tokenizer_folder(smollm2_gguf, tokenizer_cache)


@pytest.fixture(scope="session")
def text(tokenizer_dir: Path) -> Iterator[Text]:
    loaded = Text.load(tokenizer_dir)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its context is so long that no request reaches the end by itself."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_checkpoint(folder, "llama", max_position_embeddings=65536)


@pytest.fixture
def serve(daemon: DaemonProcess, tiny_model: Path) -> Serve:
    """Launch fleets of that model, or of another; see `tests.server.fleet.tiny_fleet.served`."""
    return partial(served, daemon.runtime_dir, tiny_model)
