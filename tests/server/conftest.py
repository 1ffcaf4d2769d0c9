"""The real model's tokenizer, unpacked once for all tests of the server; fleets of a tiny model."""

import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allocator import module_command, module_environment
from server.text.text import Text
from server.text.tokenizer_files import tokenizer_folder
from tests.daemon_process import DaemonProcess
from tests.server.fleet.tiny_fleet import Serve, served
from tests.warm import Started, Warm
from tests.workers.tiny_models import write_checkpoint
from workers import client


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


@pytest.fixture(scope="session")
def warm_forkserver(adopted_orphans: None) -> Iterator[Warm]:
    """A process that has imported what a forkserver imports, as the server starts one."""
    also = (
        *("workers.process.instance", "workers.process.rank_follow", "workers.model.encoder"),
        "transformers.models.llama.modeling_llama",
    )
    environment = module_environment(**client._ENVIRONMENT)
    with Warm("workers.process.forkserver", also, environment) as warm:
        yield warm


@pytest.fixture
def serve(
    daemon: DaemonProcess,
    tiny_model: Path,
    warm_forkserver: Warm,
    monkeypatch: pytest.MonkeyPatch,
) -> Serve:
    """Launch fleets of that model, or of another; see `tests.server.fleet.tiny_fleet.served`. Their
    forkservers are what a server's are, and spared the imports."""

    def start(command: Sequence[str], *, pass_fds: Sequence[int], env: Any, stdin: int) -> Started:
        *_, module = command[: len(module_command(""))]
        assert (module, stdin) == ("workers.process.forkserver", subprocess.DEVNULL)
        assert warm_forkserver.starts_the_same(env)
        arguments = command[len(module_command("")) :]
        return warm_forkserver.start(
            *arguments, cwd=str(Path.cwd()), pass_fds=pass_fds, environment=env
        )

    started_by = SimpleNamespace(**{**vars(subprocess), "Popen": start})
    monkeypatch.setattr(client, "subprocess", started_by)
    return partial(served, daemon.runtime_dir, tiny_model)
