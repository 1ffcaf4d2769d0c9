"""What documents name is there: files, folders, links, headings, commands, options."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest
import typer.main

from server.cli.cli import app
from tests.documents.blocks import ROOT, Document, documents

OF_TODAY = [one for one in documents() if one.name not in {"docs/LOG.md", "CHANGELOG.md"}]
"""The others tell what was at its time."""
FOR_USE = [one for one in OF_TODAY if "/adr/" not in one.name]
"""Decisions tell what was decided, whatever its options are called today."""
OF_A_MODEL = {
    *("config.json", "tokenizer.json", "generation_config.json", "modules.json"),
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("model.gguf", "*.safetensors", "*.bin", "*.pt", "model.safetensors.index.json"),
}
MADE = {"benchmarks/results/gpu/", "../benchmarks/results/gpu/", ".gpu/", "report.json"}
"""By `make gpu-report` and `make gpu-wheels`."""
_ENDINGS = "py|md|json|toml|txt|yaml|service|conf|example|cpp|h|c|so"
_FILE = re.compile(rf"(?<![\w/.*~$-])[\w./*~$-]+\.(?:{_ENDINGS})(?![\w/])")
_FOLDER = re.compile(r"(?<![\w/.*~$-])(?:[\w.-]+/)+(?![\w*.])")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def tracked() -> set[str]:
    """Every file of the project, as one path from its root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


FILES = tracked()
BASENAMES = {PurePosixPath(name).name for name in FILES}
FOLDERS = {f"{parent}/" for name in FILES for parent in PurePosixPath(name).parents}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {
    name: {"--help"}
    | {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    for name, command in COMMANDS.items()
}
ALL_OPTIONS = {"--version"}.union(*OPTIONS.values())
OF_OTHERS = {
    "--shm-size": "docker",
    "--build": "docker",
    "--build-arg": "docker",
    "--no-deps": "pip",
    "--pdb": "pytest",
    "--wheels": "gpu_report.py",
    "--out": "gpu_report.py",
    "--store": "gpu_report.py",
    "--rehearse": "gpu_report.py",
}


def files_named(document: Document) -> Iterator[tuple[int, str]]:
    """(line, name) of every file or folder that it names as one of ours, in text and pictures."""
    own = {block.file for block in document.blocks if block.file}
    for line, code in document.inline_code:
        for name in _FILE.findall(code):
            if name not in OF_A_MODEL | own:
                yield line, name
        for name in _FOLDER.findall(code):
            if not re.search(r"\s|://", code):
                yield line, name
    for block in document.blocks:
        if block.language == "text" and not block.words:
            for name in _FILE.findall(block.text):
                if name not in OF_A_MODEL | own:
                    yield block.line, name


def exists(document: Document, name: str) -> bool:
    """Whether it is a path from the root or from the document, or the last part of one."""
    if name.startswith(("/", "~", "$", "path/")):
        return True  # of the reader's machine
    if name in MADE:
        return True
    if "*" in name:
        return any(ROOT.glob(name))
    if name.endswith("/"):
        return name in FOLDERS or any(one.endswith(f"/{name}") for one in FOLDERS)
    if "/" not in name:
        return name in BASENAMES
    here = (document.path.parent / name).resolve()
    return here.is_file() or any(one == name or one.endswith(f"/{name}") for one in FILES)


@pytest.mark.parametrize("document", OF_TODAY, ids=lambda one: one.name)
def test_files_that_are_named_exist(document: Document) -> None:
    gone = {f"{line}: {name}" for line, name in files_named(document) if not exists(document, name)}
    assert not gone, f"{document.name} names what is not there: {sorted(gone)}"


@pytest.mark.parametrize("document", documents(), ids=lambda one: one.name)
def test_links_lead_somewhere(document: Document) -> None:
    known = {one.path: one for one in documents()}
    for line, target in document.links:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (document.path.parent / path).resolve() if path else document.path
        if path in MADE:
            continue
        assert there.exists(), f"{document.name}:{line}: {target}"
        if anchor:
            assert anchor in known[there].anchors, f"{document.name}:{line}: {target}"


@pytest.mark.parametrize("document", FOR_USE, ids=lambda one: one.name)
def test_commands_that_are_named_exist(document: Document) -> None:
    for line, code in document.inline_code:
        where = f"{document.name}:{line}: {code}"
        words = code.split()
        if words[:1] == ["onecopy"] and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
            assert words[1] in COMMANDS, where
            assert set(_OPTION.findall(code)) <= OPTIONS[words[1]], where
        else:
            assert set(_OPTION.findall(code)) <= ALL_OPTIONS | OF_OTHERS.keys(), where


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_document_for_a_task_is_found_from_the_readme() -> None:
    named = {target for _, target in Document(ROOT / "README.md").links}
    for path in ROOT.glob("docs/*.md"):
        assert f"docs/{path.name}" in {one.partition("#")[0] for one in named}, path.name
