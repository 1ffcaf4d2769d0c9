"""Every command and every program that a document shows is run, as its reader runs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents.blocks import RUNNABLE, WORDS, Block, documents
from tests.documents.terminals import Desk

BESIDE_THE_README = ("docs/clients.md", "docs/memory.md", "docs/operations.md")
"""Documents whose commands ask the server that the README starts, in this order: the last ends it.
"""
BY_THEMSELVES = ("docs/serving.md", "docs/in-a-program.md", "CONTRIBUTING.md")
DOCUMENTS = {one.name: one for one in documents()}
NOT_RUN = [block for one in DOCUMENTS.values() for block in one.blocks if block.why_not]


@pytest.fixture(scope="module")
def readers_desk(tokenizer_cache: Path) -> Iterator[Desk]:
    """After the README was followed: its server runs."""
    desk = Desk(tokenizer_cache)
    try:
        desk.follow(DOCUMENTS["README.md"])
        yield desk
    finally:
        desk.close()


@pytest.mark.usefixtures("readers_desk")
def test_readme() -> None:
    """Two commands, and what they print."""


@pytest.mark.parametrize("name", BESIDE_THE_README)
def test_beside_the_readme(name: str, readers_desk: Desk) -> None:
    readers_desk.follow(DOCUMENTS[name])


@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_document(name: str, tokenizer_cache: Path) -> None:
    desk = Desk(tokenizer_cache)
    try:
        desk.follow(DOCUMENTS[name])
    finally:
        desk.close()


def test_no_document_with_commands_is_left_out() -> None:
    run = {one.name for one in DOCUMENTS.values() if any(block.is_run for block in one.blocks)}
    assert run == {"README.md", *BESIDE_THE_README, *BY_THEMSELVES}


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_not_run(block: Block) -> None:
    """A list, in the summary of every run, of what nobody has tried here."""
    assert block.language in RUNNABLE
    pytest.skip(block.why_not)


def test_every_block_says_what_it_is() -> None:
    for document in DOCUMENTS.values():
        for block in document.blocks:
            assert block.language in {"text", *RUNNABLE}, f"{block}: which language?"
            unknown = {one for one in block.words - WORDS if not one.startswith("file=")}
            assert not unknown, f"{block}: {unknown}"
            if block.language == "console":
                assert block.text.startswith("$ "), f"{block}: a console begins with a command"
