"""How the three packages are built, in figures: `python tests/structure.py [--json] [CHECKOUT]`.

Owns the measuring. Invariant: sources are parsed, never run, so that any checkout can be measured,
one of long ago, too. A folder's files are its own; those of folders inside it are theirs. A file at
a package's top is a place of its own: what the folders share, or a door to other packages.
"""

import argparse
import ast
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("allocator", "workers", "server")
USERS = (*PACKAGES, "benchmarks", "deploy")
"""Who may be the reason that something is there, beside programs in documents. Tests are none."""
PLAIN_DECORATORS = {
    *("property", "cached_property", "staticmethod", "classmethod", "abstractmethod", "override"),
    *("contextmanager", "asynccontextmanager", "cache", "lru_cache", "dataclass", "final"),
    *("inference_mode", "no_grad"),
}
"""Whatever else decorates a definition hands it to somebody who uses it: a route, a validator."""


class Definition(NamedTuple):
    """A public function, class or method."""

    module: str
    name: str
    """Qualified by its class."""
    line: int


class Structure:
    """One checkout's packages, parsed."""

    def __init__(self, root: Path):
        self.root = root
        self.paths = {
            dotted(path.relative_to(root)): path
            for package in PACKAGES
            for path in sorted((root / package).rglob("*.py"))
        }
        self._trees = {name: ast.parse(path.read_text()) for name, path in self.paths.items()}

    def folder(self, module: str) -> str:
        """Where the module's file lies."""
        return self.paths[module].parent.relative_to(self.root).as_posix()

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module → the modules that it imports, wherever in it, relative imports included."""
        return {name: set(self._imported(name)) - {name} for name in self.paths}

    def _imported(self, module: str) -> Iterator[str]:
        package = module.split(".")
        if self.paths[module].name != "__init__.py":
            package = package[:-1]
        for node in ast.walk(self._trees[module]):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *filter(None, [node.module])])
                for alias in node.names:
                    whole = f"{source}.{alias.name}"
                    yield from [whole] if whole in self.paths else self._known(source)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._known(alias.name)

    def _known(self, module: str) -> Iterator[str]:
        if module in self.paths:
            yield module

    def place(self, module: str) -> str:
        """The module's folder, or the module itself at a package's top."""
        folder = self.folder(module)
        return module if folder in PACKAGES else folder

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Place → the places that it imports from. What an `__init__` hands out belongs to those
        who ask for it: neither its own imports nor imports of it count."""
        modules = {name for name, path in self.paths.items() if path.name != "__init__.py"}
        found: dict[str, set[str]] = {self.place(module): set() for module in modules}
        for module in modules:
            for other in self.imports[module] & modules:
                if self.place(module) != self.place(other):
                    found[self.place(module)].add(self.place(other))
        return found

    def lines(self, package: str) -> dict[str, int]:
        """Path → number of lines, of a package's modules without what folders hand out."""
        return {
            path.relative_to(self.root).as_posix(): len(path.read_text().splitlines())
            for name, path in self.paths.items()
            if name.split(".")[0] == package and path.name != "__init__.py"
        }

    def unused(self) -> list[Definition]:
        """What nobody but tests refers to, by name: neither a package nor a benchmark."""
        used = self._names_used()
        return [
            definition
            for module in self.paths
            for definition in self._definitions(module)
            if used[definition.name.rpartition(".")[2]] == 0
        ]

    def _definitions(self, module: str) -> Iterator[Definition]:
        for node in self._trees[module].body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if is_public(node):
                    yield Definition(module, node.name, node.lineno)
                if isinstance(node, ast.ClassDef):
                    inherits = any(self._is_foreign(base) for base in node.bases)
                    for one in node.body:
                        if (
                            isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
                            and is_public(one)
                            and not inherits
                        ):
                            yield Definition(module, f"{node.name}.{one.name}", one.lineno)

    def _is_foreign(self, base: ast.expr) -> bool:
        """Whether a library's class is inherited from, which calls methods by names of its own."""
        module, _, name = ast.unparse(base).partition("[")[0].rpartition(".")
        if module and not any(path.endswith(module) for path in self.paths):
            return True
        return name not in self._classes and name not in {"Protocol", "Enum", "StrEnum", "Struct"}

    @cached_property
    def _classes(self) -> set[str]:
        return {
            node.name
            for tree in self._trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }

    def _names_used(self) -> Counter[str]:
        used: Counter[str] = Counter()
        for folder in USERS:
            for path in (self.root / folder).rglob("*.py"):
                used.update(names_used(ast.parse(path.read_text())))
            for path in (self.root / folder).rglob("*"):
                if path.suffix in {".service", ".yaml"}:
                    used.update(re.findall(r"\w+", path.read_text()))
        for path in (self.root / "README.md", *(self.root / "docs").glob("*.md")):
            for program in re.findall(r"^```python.*?\n(.*?)^```", path.read_text(), re.M | re.S):
                used.update(names_used(ast.parse(program)))
        return used


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def is_public(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether it is there for others, and they come to it by its name."""
    names = [ast.unparse(one).partition("(")[0].rpartition(".")[2] for one in node.decorator_list]
    return not node.name.startswith("_") and set(names) <= PLAIN_DECORATORS | {"setter"}


def names_used(tree: ast.Module) -> Iterator[str]:
    """Every name that a module refers to, or says as a string. An import alone is no use, nor is
    `__all__`."""
    exported = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    skipped = {id(one) for value in exported for one in ast.walk(value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.name.rpartition(".")[2]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
            and re.fullmatch(r"[\w.:]+", node.value)
        ):
            yield from re.split(r"[.:]", node.value)


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    sys.setrecursionlimit(10_000)
    for node in graph:
        if node not in index:
            visit(node)
    return found


def measured(root: Path) -> dict[str, object]:
    """All figures of a checkout."""
    structure = Structure(root)
    files: dict[str, dict[str, int]] = defaultdict(dict)
    for module in structure.paths:
        package = module.split(".")[0]
        folder = structure.folder(module)
        if structure.paths[module].name != "__init__.py" or folder == package:
            files[package][folder] = files[package].get(folder, 0) + 1
    packages = {}
    for package in PACKAGES:
        lines = structure.lines(package)
        longest = max(lines, key=lines.__getitem__)
        within = {one for one in structure.arrows if re.split("[/.]", one)[0] == package}
        packages[package] = {
            "files_at_the_top": files[package].get(package, 0),
            "folders": len([one for one in within if "/" in one]),
            "most_files_in_a_folder": max(files[package].values()),
            "files_per_folder": files[package],
            "imports_between_modules": sum(
                len({one for one in imported if one.split(".")[0] == package})
                for name, imported in structure.imports.items()
                if name.split(".")[0] == package
            ),
            "imports_between_folders": sum(len(structure.arrows[one] & within) for one in within),
            "lines": sum(lines.values()),
            "median_file": statistics.median(lines.values()),
            "longest_file": [longest, lines[longest]],
        }
    return {
        "packages": packages,
        "circles_of_modules": circles(structure.imports),
        "circles_of_folders": circles(structure.arrows),
        "used_by_tests_only": [
            f"{structure.paths[one.module].relative_to(root)}:{one.line} {one.name}"
            for one in structure.unused()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true", help="all of it, as one object")
    options = parser.parse_args()
    found = measured(options.checkout)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    packages = found["packages"]
    assert isinstance(packages, dict)
    figures = [name for name in packages["allocator"] if name != "files_per_folder"]
    print(f"{'':26}" + "".join(f"{package:>42}" for package in packages))
    for figure in figures:
        cells = [packages[package][figure] for package in packages]
        shown = [" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in cells]
        print(f"{figure:26}" + "".join(f"{one:>42}" for one in shown))
    for name in ("circles_of_modules", "circles_of_folders", "used_by_tests_only"):
        listed = found[name]
        assert isinstance(listed, list)
        print(f"{name}: {len(listed)}")
        for one in listed:
            print(f"  {one}")


if __name__ == "__main__":
    main()
