"""docs/models.md says what the tests run, and nothing else."""

import pytest

from tests.documents import models_tables
from tests.documents.models_tables import DOCUMENT, with_tables
from tests.workers.model.tiny_families import FAMILIES


def test_the_tables_are_those_that_are_made() -> None:
    """Else: `python -m tests.documents.models_tables`."""
    document = DOCUMENT.read_text()
    assert with_tables(document) == document


def test_a_family_that_is_tested_and_not_described_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    described = {**models_tables.PARTICULAR}
    assert described.pop("scaled residuals and logits") == "granite"
    monkeypatch.setattr(models_tables, "PARTICULAR", described)
    with pytest.raises(LookupError, match="says nothing of granite"):
        models_tables.families()


def test_a_family_that_is_described_and_not_tested_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        models_tables, "FAMILIES", {k: v for k, v in FAMILIES.items() if k != "helium"}
    )
    with pytest.raises(KeyError, match="helium"):
        models_tables.families()


def test_a_document_without_a_place_is_found() -> None:
    with pytest.raises(LookupError, match="0 places for families"):
        with_tables("nothing")
