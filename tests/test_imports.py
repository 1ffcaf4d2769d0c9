"""The three packages stay three: who may import whom, and what nobody may do.

Owns the rules as tables and a checker that reads sources with `ast`, `if TYPE_CHECKING` included.
Invariant: every module of the packages is read, and each rule is shown to be able to fail. Does not
know what the modules do; only the last test runs any of them.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "workers", "allocator")  # imports point to the right only
DOORS = ("messages", "client")  # the modules of a package that another package may import
FLOORS_OF_SERVER = (
    *("cli", "console", "conformance", "machine", "admin", "api", "api/openai"),
    *("models", "fleet", "text", "processes"),
)  # imports point to the right only; what lies beside the folders is above them (serve) or below
NEVER_IN_PACKAGE = {
    "server": ("torch",),
    "workers": ("fastapi", "starlette", "uvicorn", "jinja2", "tokenizers"),
    "allocator": ("fastapi", "starlette", "uvicorn", "jinja2", "tokenizers", "transformers"),
}
NEVER_IN_FOLDER = {  # folder → what its files never import
    "allocator/client/": ("allocator.daemon",),
    "allocator/daemon/": ("allocator.client",),
    "workers/checkpoint/": ("workers.model", "workers.engine", "workers.process"),
    "workers/model/": ("workers.engine", "workers.process"),
    "workers/engine/": ("workers.process",),
    "server/api/": ("workers.client",),
}
FORKS = ("os.fork", "os.forkpty", "multiprocessing.Process", "multiprocessing.Pool")
FORKING = "workers/process/"
DEVICES = "allocator/backends/"
DEVICE_APIS = (
    "_posixshmem",
    "multiprocessing.shared_memory",
    "cuda",
    "cupy",
    "pynvml",
    "acl",
    "torch.cuda",
    "torch.npu",
    "torch_npu",
)
RUNS_WHAT_IT_READS = (
    "pickle",
    "_pickle",
    "marshal",
    "shelve",
    "cloudpickle",
    "dill",
    "joblib",
    "torch.load",
    "torch.jit.load",
)
IMPORTERS = ("import_module", "__import__")
PICKLING_METHODS = ("recv_pyobj", "send_pyobj")
FALSE_ONLY = ("trust_remote_code", "allow_pickle")  # may be passed, but only as a literal False
SAFE_PATH = ("-P", "-I", "-IS")  # options that keep the working folder out of a child's sys.path


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def modules_of(root: Path) -> dict[str, str]:
    """Path relative to `root` → source, for every Python file in the packages."""
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


def dotted(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


class Reader:
    """One module's dotted names: what it imports, and what it reaches through imported names."""

    def __init__(self, path: str, source: str) -> None:
        self.tree = ast.parse(source, path)
        package = dotted(path).split(".")
        self.package = package if path.endswith("__init__.py") else package[:-1]
        self.bound: dict[str, str] = {}  # local name → the dotted name that it stands for
        self.imports: list[tuple[int, str]] = list(self._imports())

    def _imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name); `from a import b` yields a.b, whether b is a module or a name."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.split(".")[0]
                    self.bound[alias.asname or top] = alias.name if alias.asname else top
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                base = self.package[: len(self.package) - node.level + 1] if node.level else []
                module = ".".join([*base, *filter(None, [node.module])])
                for alias in node.names:
                    self.bound[alias.asname or alias.name] = f"{module}.{alias.name}"
                    yield node.lineno, f"{module}.{alias.name}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTERS):
                for value in node.args[:1]:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield node.lineno, value.value

    def reached(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of every attribute chain that starts at an imported name."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                first, _, rest = ast.unparse(node).partition(".")
                if first in self.bound:
                    yield node.lineno, f"{self.bound[first]}.{rest}"

    def passed(self) -> Iterator[tuple[int, str, ast.expr]]:
        """(line, name, value) of every keyword argument and every string key of a dict display."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.keyword) and node.arg:
                yield node.value.lineno, node.arg, node.value
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        yield value.lineno, key.value, value

    def children(self) -> Iterator[tuple[int, ast.expr | None]]:
        """(line, what follows it) of every `sys.executable` in a list or a tuple: a command."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.List | ast.Tuple):
                for this, after in zip_longest(node.elts, node.elts[1:]):
                    if isinstance(this, ast.Attribute) and ast.unparse(this) == "sys.executable":
                        yield this.lineno, after


def crossing(path: str, name: str, modules: frozenset[str]) -> str | None:
    """What is wrong with importing `name` at `path`, as far as packages go."""
    here, there = path.split("/")[0], name.split(".")[0]
    if there not in PACKAGES or there == here:
        return None
    if PACKAGES.index(there) < PACKAGES.index(here):
        return f"{here} imports {name}: imports point down only, {' → '.join(PACKAGES)}"
    # Longest prefix that is a module; what is left of the name is something the module hands out.
    module = name
    while module not in modules and "." in module:
        module = module.rpartition(".")[0]
    if module == there or module in {f"{there}.{door}" for door in DOORS}:
        return None
    return f"{here} imports {module}: of another package only {', '.join(DOORS)} or its __init__"


def floor_of(name: str) -> int | None:
    """Which of the server's floors a dotted name is on; None for what is on none of them."""
    for number, folder in reversed(list(enumerate(FLOORS_OF_SERVER))):
        if is_within(name, (f"server.{folder.replace('/', '.')}",)):
            return number
    return None


def violations(path: str, source: str, modules: frozenset[str]) -> list[str]:
    """Every broken rule of one module, as `path:line: what`; `modules` are all the dotted names."""
    reader, found = Reader(path, source), set[tuple[int, str]]()
    package = path.split("/")[0]
    here = floor_of(dotted(path))
    for line, name in reader.imports:
        there = floor_of(name)
        if here is not None and there is not None and there < here:
            found.add((line, f"{path} never imports {name}, which lies above it"))
        if wrong := crossing(path, name, modules):
            found.add((line, wrong))
        if is_within(name, NEVER_IN_PACKAGE[package]):
            found.add((line, f"{package} never imports {name.split('.')[0]}"))
        for folder, never in NEVER_IN_FOLDER.items():
            if path.startswith(folder) and is_within(name, never):
                found.add((line, f"{folder} never imports {name}"))
    for line, name in [*reader.imports, *reader.reached()]:
        if not path.startswith(DEVICES) and is_within(name, DEVICE_APIS):
            found.add((line, f"{name}: only {DEVICES} touches a device API"))
        if not path.startswith(FORKING) and is_within(name, FORKS):
            found.add((line, f"{name}: only {FORKING} forks"))
        if is_within(name, RUNS_WHAT_IT_READS) or name.split(".")[-1] in PICKLING_METHODS:
            found.add((line, f"{name} runs what it reads"))
    for node in ast.walk(reader.tree):
        if isinstance(node, ast.Attribute) and node.attr in PICKLING_METHODS:
            found.add((node.lineno, f"{node.attr} runs what it reads"))
    for line, name, value in reader.passed():
        if name in FALSE_ONLY and not (isinstance(value, ast.Constant) and value.value is False):
            found.add((line, f"{name} may only be a literal False"))
    for line, after in reader.children():
        if not (isinstance(after, ast.Constant) and after.value in SAFE_PATH):
            found.add((line, "the child would import from its working folder; say -P"))
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


def test_packages_keep_the_rules() -> None:
    sources = modules_of(ROOT)
    assert {path.split("/")[0] for path in sources} == set(PACKAGES)
    names = frozenset(map(dotted, sources))
    broken = [line for path, source in sources.items() for line in violations(path, source, names)]
    assert not broken, "\n".join(broken)


def test_clients_of_the_admin_api_import_no_application() -> None:
    for module in ("server.admin.client", "server.machine.served_check"):
        program = f"import sys, {module}; assert 'fastapi' not in sys.modules"
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr


def test_benchmarks_start_children_that_ignore_the_working_folder() -> None:
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for line, after in Reader(path.name, path.read_text()).children():
            assert isinstance(after, ast.Constant), f"{path}:{line}"
            assert after.value in SAFE_PATH, f"{path}:{line}: a child without -P"


def test_no_package_under_tests() -> None:
    # With one, `import tests.allocator` and `import allocator` begin to shadow each other.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_server_runs_without_torch() -> None:
    """What the sources cannot show: that nothing which the server imports brings torch along."""
    names = [
        dotted(path)
        for path in modules_of(ROOT)
        if path.startswith("server/") and not path.endswith("__main__.py")
    ]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'importing {name} brought torch along'\n"
    )
    command = [sys.executable, "-c", program, *names]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_what_all_processes_import_brings_no_large_library_along() -> None:
    """They start by the dozen, and each would take a tenth of a second longer."""
    program = (
        "import sys, workers\n"
        "found = {'numpy', 'gguf', 'torch', 'transformers', 'fastapi'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


MODULES = frozenset(
    [
        *("server", "server.api.app", "server.api.openai", "server.api.openai.chat"),
        *("workers", "workers.client", "workers.messages", "workers.engine.generate"),
        *(
            "allocator",
            "allocator.client",
            "allocator.digests",
            "allocator.daemon.pool.arena",
            "allocator.backends.host",
        ),
    ]
)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("allocator/daemon/pool/arena.py", "import workers", "imports point down only"),
        (
            "allocator/daemon/pool/arena.py",
            "from server.api.app import app",
            "imports point down only",
        ),
        ("workers/engine/generate.py", "import server", "imports point down only"),
        ("server/api/app.py", "import workers.engine.generate", "of another package only"),
        (
            "server/api/app.py",
            "from workers.engine.generate import Engine",
            "of another package only",
        ),
        ("server/api/app.py", "from workers.engine import generate", "of another package only"),
        (
            "server/api/openai/chat.py",
            "from allocator.daemon.pool.arena import Arena",
            "of another package only",
        ),
        (
            "workers/engine/generate.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import allocator.digests",
            "of another package only",
        ),
        (
            "workers/engine/generate.py",
            "def f():\n    import allocator.daemon.pool.arena",
            "of another package only",
        ),
        (
            "workers/engine/generate.py",
            "import importlib\nimportlib.import_module('allocator.daemon.pool.arena')",
            "of another package only",
        ),
        ("server/api/app.py", "import torch", "never imports torch"),
        ("server/api/app.py", "from torch.nn import functional", "never imports torch"),
        ("server/api/app.py", "__import__('torch')", "never imports torch"),
        ("workers/engine/generate.py", "from fastapi import FastAPI", "never imports fastapi"),
        ("allocator/daemon/pool/arena.py", "import transformers", "never imports transformers"),
        (
            "allocator/daemon/pool/arena.py",
            "from cuda.bindings import driver",
            "touches a device API",
        ),
        (
            "allocator/daemon/pool/arena.py",
            "from multiprocessing import shared_memory",
            "a device API",
        ),
        ("workers/engine/generate.py", "import torch\ntorch.cuda.Stream()", "touches a device API"),
        (
            "workers/engine/generate.py",
            "import torch as t\nt.cuda.Stream()",
            "touches a device API",
        ),
        ("workers/engine/generate.py", "from torch import cuda", "touches a device API"),
        ("allocator/backends/host.py", "import pickle", "runs what it reads"),
        ("allocator/daemon/pool/arena.py", "from marshal import loads", "runs what it reads"),
        ("workers/engine/generate.py", "import torch\ntorch.load('w')", "runs what it reads"),
        ("workers/engine/generate.py", "from torch import load", "runs what it reads"),
        ("workers/client.py", "socket.recv_pyobj()", "runs what it reads"),
        ("workers/engine/generate.py", "f(trust_remote_code=True)", "literal False"),
        ("workers/engine/generate.py", "f(trust_remote_code=flag)", "literal False"),
        ("workers/engine/generate.py", "f(**{'trust_remote_code': True})", "literal False"),
        ("allocator/client/pool.py", "from allocator.daemon.pool import arena", "never imports"),
        ("allocator/daemon/device.py", "import allocator.client.client", "never imports"),
        ("workers/checkpoint/plan.py", "from workers.model.decoder import Model", "never imports"),
        ("server/fleet/fleet.py", "from server.api.app import app", "never imports"),
        ("server/api/app.py", "from workers.client import Instance", "never imports"),
        ("server/fleet/fleet.py", "import os\nos.fork()", "only workers/process/ forks"),
        ("workers/grammar/cells.py", "from multiprocessing import Pool", "forks"),
        ("server/machine/plan.py", "run([sys.executable, '-m', 'workers'])", "say -P"),
        ("server/machine/plan.py", "command = (sys.executable, *arguments)", "say -P"),
        ("server/machine/plan.py", "run([*(sys.executable, 'server/machine/plan.py')])", "say -P"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str, complaint: str) -> None:
    found = violations(path, source, MODULES)
    assert len(found) >= 1
    assert all(complaint in line for line in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("server/api/app.py", "from workers import Instance\nfrom allocator import connect"),
        (
            "server/fleet/fleet.py",
            "from workers.client import Client\nimport workers.messages as m",
        ),
        ("workers/process/warden.py", "import os\nos.fork()"),
        (
            "allocator/client/pool.py",
            "from allocator.client import ledger\nimport allocator.messages",
        ),
        ("server/api/app.py", "from .openai import chat\nfrom server.api.openai.chat import route"),
        ("server/api/openai/chat.py", "from ...errors import ServerError\nfrom . import schemas"),
        (
            "workers/engine/generate.py",
            "import allocator.client\nfrom . import sampling\nimport torch",
        ),
        ("workers/engine/generate.py", "'''Not import pickle, nor torch.load().'''"),
        (
            "workers/engine/generate.py",
            "f(trust_remote_code=False)\ng(**{'trust_remote_code': False})",
        ),
        ("workers/engine/generate.py", "import json\njson.load(file)\nmodel.load()"),
        ("server/machine/plan.py", "run([sys.executable, '-P', '-m', 'workers'])"),
        ("server/machine/doctor.py", "run([sys.executable, '-IS', '-c', PROGRAM])"),
        ("allocator/backends/cuda.py", "from cuda.bindings import driver\nimport torch.cuda"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert violations(path, source, MODULES) == []
