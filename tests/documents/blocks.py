"""A document's parts, as far as they can be checked: fenced blocks, code in text, links, headings.

Owns what a fence's info string means. Invariant: a block that can be run is run, unless its fence
says why not.

    ```sh               run, line by line, to its end; every line succeeds
    ```sh terminal      run in a terminal of its own, and left there once it is ready
    ```console          lines that begin with `$ ` are run, each followed by what it prints
    ```python           run in one interpreter for all such blocks of the document
    ```python file=X    saved as X, for commands that follow
    ```text             shown: a picture, a message
    ```text output      what the block before it prints

`fails` says that the command ends with an error, `exact` that all printed lines are as shown; else
those are that have words and no figure in them. `not-run: REASON` ends an info string.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNNABLE = {"sh", "console", "python"}
WORDS = {"terminal", "output", "exact", "fails"}
BESIDE_THE_README = ("docs/clients.md", "docs/memory.md", "docs/operations.md")
"""Documents whose commands ask the server that the README starts, in this order: the last ends it.
"""
BY_THEMSELVES = (
    *("docs/serving.md", "docs/in-a-program.md", "docs/placement.md"),
    "CONTRIBUTING.md",
)
"""Documents whose commands start what they need."""

_NOT_RUN = "not-run: "


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    document: str
    line: int
    """Of its first line."""
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def language(self) -> str:
        return self.info.split(" ")[0]

    @property
    def words(self) -> set[str]:
        return set(self.info.partition(_NOT_RUN)[0].split()[1:])

    @property
    def why_not(self) -> str:
        """Why it isn't run; "" where it is."""
        return self.info.partition(_NOT_RUN)[2]

    @property
    def file(self) -> str:
        """As which it is saved; "" where it isn't."""
        return next((one[5:] for one in self.words if one.startswith("file=")), "")

    @property
    def is_run(self) -> bool:
        return self.language in RUNNABLE and not self.why_not

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Of a console: each command, and the lines that it prints."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, *printed = part.splitlines()
            yield command, printed


class Document:
    """One Markdown file."""

    def __init__(self, path: Path, root: Path = ROOT):
        self.path = path
        self.name = path.relative_to(root).as_posix()
        self._lines = path.read_text().splitlines()

    @cached_property
    def blocks(self) -> list[Block]:
        """In their order."""
        found: list[Block] = []
        start: int | None = None
        for number, line in enumerate(self._lines):
            if not line.startswith("```"):
                continue
            if start is None:
                start = number
            else:
                text = "\n".join(self._lines[start + 1 : number]) + "\n"
                found.append(Block(self.name, start + 2, self._lines[start][3:], text))
                start = None
        assert start is None, f"{self.name}:{start + 1}: this fence has no end"
        return found

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """(number, line) of what is in no block; code that goes on over a line's end is in one."""
        within = False
        found: list[tuple[int, str]] = []
        for number, line in enumerate(self._lines, 1):
            if line.startswith("```"):
                within = not within
            elif within:
                continue
            elif found and found[-1][1].count("`") % 2:
                found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
            else:
                found.append((number, line))
        return found

    @property
    def inline_code(self) -> Iterator[tuple[int, str]]:
        """(line, text) of what stands between backticks."""
        for number, line in self.prose:
            for code in re.findall(r"`([^`]+)`", line):
                yield number, code

    @property
    def links(self) -> Iterator[tuple[int, str]]:
        """(line, target)."""
        for number, line in self.prose:
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                yield number, target

    @cached_property
    def anchors(self) -> set[str]:
        """Names by which its headings are linked to, as GitHub makes them."""
        headings = [line.lstrip("# ") for _, line in self.prose if re.match(r"#+ ", line)]
        return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


def documents() -> list[Document]:
    """All that people read here, decisions and findings included."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")]
    return [Document(path) for path in sorted(paths)]
