"""The README and the documents that ask its server: every command and program in them is run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents.blocks import BESIDE_THE_README, ROOT, Document
from tests.documents.terminals import Desk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def readers_desk(tokenizer_cache: Path) -> Iterator[Desk]:
    """After the README was followed: its server runs."""
    desk = Desk(tokenizer_cache)
    try:
        desk.follow(Document(ROOT / "README.md"))
        yield desk
    finally:
        desk.close()


@pytest.mark.usefixtures("readers_desk")
def test_readme() -> None:
    """Its two commands and what they print, as `readers_desk` follows it."""


@pytest.mark.parametrize("name", BESIDE_THE_README)
def test_document(name: str, readers_desk: Desk) -> None:
    readers_desk.follow(Document(ROOT / name))
