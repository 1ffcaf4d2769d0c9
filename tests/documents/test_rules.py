"""The rules that documents are held to can fail: a wrong command, output, file or link is found."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.documents.blocks import Document
from tests.documents.terminals import Desk, compare
from tests.documents.test_names import exists, files_named

Write = Callable[[str], Document]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def document(text: str) -> Document:
        path = tmp_path / "a.md"
        path.write_text(text)
        return Document(path, tmp_path)

    return document


@pytest.fixture
def desk(tokenizer_cache: Path) -> Iterator[Desk]:
    desk = Desk(tokenizer_cache)
    yield desk
    desk.close()


def test_a_fence_says_what_a_block_is(write: Write) -> None:
    document = write(
        "# The way, of a `thing`\n\n```sh\na\n```\n\n```sh not-run: wants Docker\nb\n```\n"
        "```console fails\n$ c\nd\n$ e\n```\n```python file=f.py\n1\n```\n```text\ng\n```\n"
    )
    run, not_run, console, saved, shown = document.blocks
    assert [one.is_run for one in document.blocks] == [True, False, True, True, False]
    assert (run.line, run.text) == (4, "a\n")
    assert not_run.why_not == "wants Docker"
    assert list(console.commands()) == [("c", ["d"]), ("e", [])]
    assert console.words == {"fails"}
    assert (saved.language, saved.file) == ("python", "f.py")
    assert shown.language == "text"
    assert document.anchors == {"the-way-of-a-thing"}


def test_a_fence_without_end_is_found(write: Write) -> None:
    with pytest.raises(AssertionError, match=r"a\.md:3: this fence has no end"):
        print(write("a\n\n```sh\nb\n").blocks)


def test_commands_go_on_from_those_before(write: Write, desk: Desk) -> None:
    desk.follow(
        write(
            "```sh\nx=seen\nexport PS1=y\n```\n```console exact\n$ echo $x\nseen\n```\n"
            "```python file=p.py\nprint('run')\n```\n```sh\npython p.py\n```\n"
            "```text exact\nrun\n```\n```python\nn = 3\n```\n```python\nprint(n + 1)\n```\n"
            "```text exact\n4\n```\n```console fails\n$ false\n```\n"
        )
    )


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfalse\ntrue\n```\n",
        "```console\n$ false\n```\n",
        "```console fails\n$ true\n```\n",
        "```console\n$ echo this\nthat\n```\n",
        "```sh\necho this\n```\n```text output\nthat\n```\n",
        "```python\nraise SystemExit(1)\n```\n",
        "```python\nprint(unknown)\n```\n",
        "```sh terminal\ntrue\n```\n",
    ],
)
def test_what_does_not_do_as_shown_is_found(text: str, write: Write, desk: Desk) -> None:
    with pytest.raises(AssertionError, match=r"a\.md:[25]"):
        desk.follow(write(text))


def test_figures_may_differ_but_where_all_is_exact(write: Write) -> None:
    block, exact = write(
        "```text output\nTOOK  SIZE\n1 ms  2 MB\n```\n```text exact\n1 ms\n```\n"
    ).blocks
    compare(block, block.text.splitlines(), "first\nTOOK   SIZE\n7 ms   9 MB\n")
    with pytest.raises(AssertionError, match="'TOOK SIZE'"):
        compare(block, block.text.splitlines(), "TOOK   PLACE\n1 ms  2 MB\n")
    with pytest.raises(AssertionError, match="something else"):
        compare(exact, exact.text.splitlines(), "2 ms\n")


def test_what_is_named_and_gone_is_found(write: Write) -> None:
    document = write(
        "See `allocator/messages.py`, `messages.py`, `server/api/`, `config.json` and `a.py`, but\n"
        "not `allocator/gone.py`, `gone.py` or `server/gone/`.\n\n```python file=a.py\n1\n```\n"
        "```text\ndaemon/daemon.py gone.h\n```\n"
    )
    gone = [name for _, name in files_named(document) if not exists(document, name)]
    assert gone == ["allocator/gone.py", "gone.py", "server/gone/", "gone.h"]
