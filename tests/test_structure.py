"""The measuring of `tests/structure.py`, on packages that are small enough to count by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure import PACKAGES, Structure, circles, measured

ROOT = Path(__file__).parents[1]
SOURCES = {
    "allocator/__init__.py": 'from allocator.a import used\n__all__ = ["used", "lonely"]\n',
    "allocator/a.py": (
        "from allocator.inner import b\n\n\ndef used(): ...\n\n\ndef lonely(): ...\n\n\n"
        "class Kept(list):\n    def append(self, one): ...\n"
    ),
    "allocator/inner/__init__.py": "",
    "allocator/inner/b.py": (
        "def late():\n    from ..a import used\n\n    return used, Kept\n\n\n"
        "@route('/')\ndef shown(): ...\n\n\n"
        "class Open:\n    def lonely_too(self): ...\n\n    def _own(self): ...\n"
    ),
    "workers/__init__.py": "",
    "workers/c.py": "late = Open\n",
    "server/__init__.py": "",
    "server/d.py": "import workers.c\n\n\nclass D:\n    x = workers.c.late()\n",
    "benchmarks/one.py": "from server.d import D\n\nprint(D)\n",
    "tests/test_a.py": "from allocator.a import lonely\n\nassert lonely() is None\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, source in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (tmp_path / "README.md").write_text("# Nothing\n")
    return tmp_path


def test_imports_are_found_wherever_they_stand(checkout: Path) -> None:
    imports = Structure(checkout).imports
    assert imports["allocator.a"] == {"allocator.inner.b"}
    assert imports["allocator.inner.b"] == {"allocator.a"}
    assert imports["server.d"] == {"workers.c"}


def test_what_only_tests_use_is_found(checkout: Path) -> None:
    assert [one.name for one in Structure(checkout).unused()] == ["lonely", "Open.lonely_too"]


def test_a_program_in_a_document_is_a_use(checkout: Path) -> None:
    (checkout / "README.md").write_text("```python\nfrom allocator import lonely\nlonely()\n```\n")
    assert [one.name for one in Structure(checkout).unused()] == ["Open.lonely_too"]


def test_figures_of_a_checkout(checkout: Path) -> None:
    found = measured(checkout)
    allocator = found["packages"]["allocator"]
    assert allocator["files_per_folder"] == {"allocator": 2, "allocator/inner": 1}
    assert allocator["longest_file"] == ["allocator/inner/b.py", 14]
    assert (allocator["files_at_the_top"], allocator["folders"]) == (2, 1)
    assert allocator["imports_between_folders"] == 2
    assert found["circles_of_modules"] == [["allocator.a", "allocator.inner.b"]]
    assert found["circles_of_folders"] == [["allocator.a", "allocator/inner"]]


def test_circles_are_told_from_diamonds() -> None:
    assert circles({"a": "bc", "b": "d", "c": "d", "d": ""}) == []
    assert circles({"a": "b", "b": "c", "c": "a", "d": "a"}) == [["a", "b", "c"]]


@pytest.mark.slow
def test_the_project_has_no_circle_and_nothing_for_tests_alone() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tests/structure.py", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    assert set(found["packages"]) == set(PACKAGES)
    assert found["circles_of_modules"] == []
    assert found["circles_of_folders"] == []
    assert found["used_by_tests_only"] == []
