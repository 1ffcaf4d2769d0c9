"""Documents that start what they need: every command and program in them is run."""

from pathlib import Path

import pytest

from tests.documents.blocks import BY_THEMSELVES, ROOT, Document
from tests.documents.terminals import Desk

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_document(name: str, tokenizer_cache: Path) -> None:
    desk = Desk(tokenizer_cache)
    try:
        desk.follow(Document(ROOT / name))
    finally:
        desk.close()
