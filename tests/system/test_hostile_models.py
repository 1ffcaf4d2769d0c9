"""Whatever lies where a model should: one line that names it, soon, and without much memory."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocator import connect
from tests.leaks import segments
from tests.quick import usual_or_long
from tests.system.hostile_models import Hostile, folders, gguf_files
from tests.system.model_fuzz import spoil_folder
from tests.system.trial import Outcome, Trials
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

MAX_BYTES = 500_000_000
MAX_SECONDS = 30.0
"""Of the processor's time, of which a busy machine counts several times more than one that does
nothing else; what hangs takes all of `DEADLINE_S`."""


@pytest.fixture(scope="module")
def trials(sound: Path) -> Iterator[Trials]:
    with Trials(dtype="float32", like=sound) as trials:
        yield trials


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("sound") / "tiny", "llama")
    return write_tokenizer(folder)


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "tiny")


def check(outcome: Outcome, words: tuple[str, ...]) -> None:
    assert outcome.problem == ""
    assert outcome.peak_bytes < MAX_BYTES
    assert outcome.seconds < MAX_SECONDS
    if not words:
        assert outcome.message == ""
        return
    assert outcome.where in ("server", "instance"), "it was served"
    assert not outcome.message.startswith("internal")
    line = " ".join(outcome.message.split())
    assert len(line) < 2000
    for word in words:
        assert word in line


def test_a_sound_model_is_served(trials: Trials, model: Path) -> None:
    check(trials.run(model), ())


@pytest.mark.parametrize("hostile", folders(), ids=lambda one: one.name)
def test_a_hostile_folder(hostile: Hostile, trials: Trials, model: Path) -> None:
    path = hostile.make(model) or model
    check(trials.run(path, server_part=hostile.concerns_the_server), hostile.words)


@pytest.mark.parametrize("hostile", gguf_files(), ids=lambda one: one.name)
def test_a_hostile_gguf_file(hostile: Hostile, trials: Trials, tmp_path: Path) -> None:
    path = hostile.make(tmp_path)
    assert path is not None
    check(trials.run(path, server_part=False), hostile.words)


@pytest.mark.parametrize("seed", range(usual_or_long(6, 60)))
def test_random_damage(seed: int, trials: Trials, model: Path) -> None:
    """Refused or served, but nothing else; `tests/system/model_fuzz.py` tries more."""
    spoil_folder(random.Random(seed), model)
    outcome = trials.run(model)
    check(outcome, ("",) if outcome.message else ())


def test_nothing_is_left_of_them(trials: Trials) -> None:
    with connect(trials.runtime_dir) as memory:
        memory.check_integrity()
        statistics = memory.statistics()
        assert statistics.num_sessions == 1
        assert {one.state for one in statistics.weight_sets} <= {"idle"}
    left = segments(trials.runtime_dir.segment_prefix)
    assert len(left) <= len(statistics.weight_sets) + 1  # and the pool
