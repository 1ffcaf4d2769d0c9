"""What is written down twice must agree: packages, pins, make targets, commands of deploy/.

Owns checks between files that no tool reads together. Knows nothing of what the code does.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = ("server", "workers", "allocator")
CONTRACT = {
    *(
        "help",
        "setup",
        "serve",
        "fmt",
        "check",
        "test",
        "test-fast",
        "test-long",
        "test-gpu",
        "bench",
        "clean",
    ),
    *("gpu-report", "gpu-wheels"),
}
# On a machine with a GPU, torch brings these and fixes their versions itself.
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")


def pins() -> dict[str, str]:
    """Name → version of every line of constraints.txt; each is exact and there once."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert match, f"not an exact pin: {line!r}"
            name = canonicalize_name(match[1])
            assert name not in found, f"pinned twice: {name}"
            found[name] = match[2]
    return found


def named_requirements() -> list[Requirement]:
    """What pyproject.toml names, development included."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for group in (PROJECT["dependencies"], *extras) for line in group]


def closure() -> set[str]:
    """Every installed package that the named requirements lead to, on this machine."""
    seen: set[str] = set()
    todo = named_requirements()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or name.startswith(LEFT_TO_TORCH):
            continue
        seen.add(name)
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            asked_by = ("", *requirement.extras)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in asked_by):
                todo.append(needed)
    return seen


def test_every_package_is_listed() -> None:
    on_disk = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert on_disk == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_everything_that_is_installed_is_pinned() -> None:
    unpinned = closure() - pins().keys()
    assert not unpinned, f"add to constraints.txt: {sorted(unpinned)}"


def test_pins_lie_in_the_ranges_of_the_package() -> None:
    versions = pins()
    for requirement in named_requirements():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_changelog_names_the_version() -> None:
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_make_targets_are_explained_and_exist() -> None:
    explained = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert explained == CONTRACT
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy/README.md"):
        # In code only, `make test` or a line of a block: prose may "make sure" of something.
        text = document.read_text()
        named = set(re.findall(r"(?:`|^\s*\$?\s*)make (?:-C \S+ )?([a-z-]+)", text, re.MULTILINE))
        assert named <= CONTRACT, f"{document.name} names {sorted(named - CONTRACT)}"


def test_an_image_is_built_from_all_that_a_build_reads() -> None:
    """What the build reads and an image's context lacks is left out of the image without a word."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    told = {project["project"]["readme"], *project["project"]["license-files"]}
    assert kept >= {"pyproject.toml", "setup.py", "constraints.txt", *told, *packages}


def deployed_commands() -> Iterator[list[str]]:
    """Every `onecopy ...` that systemd or compose starts, as words."""
    for unit in sorted((ROOT / "deploy/systemd").glob("*.service")):
        lines = re.findall(
            r"^Exec(?:Start|Reload)=\S+/onecopy (.*)$", unit.read_text(), re.MULTILINE
        )
        assert lines, f"{unit.name} does not start onecopy"
        yield from (line.split() for line in lines)
    compose = yaml.safe_load((ROOT / "deploy/docker/compose.yaml").read_text())
    for service in compose["services"].values():
        yield service["command"]


@pytest.mark.slow
@pytest.mark.parametrize("words", list(deployed_commands()), ids=" ".join)
def test_deployed_commands_exist(words: list[str]) -> None:
    module, function = PROJECT["scripts"]["onecopy"].split(":")
    program = f"import sys; from {module} import {function}; sys.exit({function}())"
    ended = subprocess.run(
        [sys.executable, "-c", program, words[0], "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert ended.returncode == 0, ended.stderr
    for word in words:
        if word.startswith("--"):
            assert word in ended.stdout
