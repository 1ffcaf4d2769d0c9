"""Every block of every document says what it is, and is run unless it says why not."""

import pytest

from tests.documents.blocks import (
    BESIDE_THE_README,
    BY_THEMSELVES,
    RUNNABLE,
    WORDS,
    Block,
    documents,
)

BLOCKS = [block for document in documents() for block in document.blocks]


def test_no_document_with_commands_is_left_out() -> None:
    run = {block.document for block in BLOCKS if block.is_run}
    assert run == {"README.md", *BESIDE_THE_README, *BY_THEMSELVES}


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.why_not], ids=str)
def test_not_run(block: Block) -> None:
    """A list, in the summary of every run, of what nobody has tried here."""
    assert block.language in RUNNABLE
    pytest.skip(block.why_not)


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in {"text", *RUNNABLE}, f"{block}: which language?"
        unknown = {one for one in block.words - WORDS if not one.startswith("file=")}
        assert not unknown, f"{block}: {unknown}"
        if block.language == "console":
            assert block.text.startswith("$ "), f"{block}: a console begins with a command"
