"""Greedy tokens beside a reference: what is computed otherwise is found."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.workers.tiny_models import prompt, write_checkpoint
from workers.conformance import program
from workers.conformance.program import compare
from workers.conformance.reference import ReferenceFailed, ReferenceMissing, ask_reference
from workers.errors import UnsupportedCheckpoint
from workers.messages import GreedyRequest

pytestmark = pytest.mark.slow

PROMPTS = tuple(tuple(prompt(length, seed=length)) for length in (1, 13))
NUM_NEW = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "gemma3")


def asked(model: Path, **changes: Any) -> GreedyRequest:
    given = {"model": str(model), "dtype": "float32", "prompts": PROMPTS, "num_new": NUM_NEW}
    return GreedyRequest(
        **{**given, "against": "transformers", "python": sys.executable, **changes}
    )


def test_the_same_model_gives_the_same_tokens(tiny: Path) -> None:
    found = compare(asked(tiny))
    assert found.reference.startswith("transformers 5.")
    for one in found.prompts:
        assert one.token_ids == one.reference_ids
        assert one.verdicts == ("same",) * NUM_NEW
        assert one.gaps == (0.0,) * NUM_NEW


@pytest.mark.parametrize(
    "fault",
    [{"sliding_window": 2}, {"query_pre_attn_scalar": 64}],
    ids=lambda fault: next(iter(fault)),
)
def test_what_is_computed_otherwise_is_found(
    fault: dict[str, Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours by another config than the file's."""
    build = program.build_model
    monkeypatch.setattr(
        program, "build_model", lambda config, *rest: build({**config, **fault}, *rest)
    )
    found = compare(asked(tiny))
    verdicts = [verdict for one in found.prompts for verdict in one.verdicts]
    assert "differs" in verdicts
    for one in found.prompts:
        for ours, theirs, gap, verdict in zip(
            one.token_ids, one.reference_ids, one.gaps, one.verdicts, strict=True
        ):
            assert (verdict == "same") == (ours == theirs) == (gap == 0)


def test_a_model_that_embeds_generates_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "embeds", "llama")
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}])
    )
    with pytest.raises(UnsupportedCheckpoint, match="embeds texts"):
        compare(asked(folder))


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        ("sys.exit(3)", ReferenceMissing, "pip install transformers"),
        ("raise ValueError('no such\\n model')", ReferenceFailed, "ValueError: no such"),
        ("sys.stderr.write('an Error here\\nbye\\n'); sys.exit(1)", ReferenceFailed, "Error here"),
        ("os.kill(os.getpid(), 9)", ReferenceFailed, "exit status -9"),
        ("print('[1]')", ReferenceFailed, "no answer"),
        ("print('{')", ReferenceFailed, "no answer"),
        ("select.select([], [], [])", ReferenceFailed, "took more than"),
    ],
)
def test_a_reference_that_fails_says_why(
    source: str, error: type[Exception], told: str, tmp_path: Path
) -> None:
    file = tmp_path / "asked.py"
    file.write_text(textwrap.dedent(f"import os, select, sys\n{source}\n"))
    deadline_s = 1 if "select.select" in source else 60
    with pytest.raises(error, match=told):
        ask_reference("transformers", file, {"a": 1}, python=sys.executable, deadline_s=deadline_s)


def test_it_may_say_more_before_its_answer(tmp_path: Path) -> None:
    file = tmp_path / "asked.py"
    file.write_text("import sys\nprint('hello')\nprint(sys.stdin.read(), end='')\n")
    asked_for = {"text": "é\n", "ids": [1]}
    answer = ask_reference("transformers", file, asked_for, python=sys.executable, deadline_s=60)
    assert answer == asked_for
