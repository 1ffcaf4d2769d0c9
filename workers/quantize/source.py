"""Where a checkpoint's tensors come from, whatever its format: elements on demand, into a buffer.

Owns the interface. Invariant: no more is held than what is asked for.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from workers.config.model_file import (
    file_identity,
    identity_of,
    opened,
    read_json,
    unreadable,
)
from workers.config.quantization import SIDE_FILES, method_of_tensors, named_method
from workers.config.safetensors_file import (
    StoredTensor,
    read_header,
    read_tensors,
    weight_files,
)
from workers.errors import (
    CheckpointChanged,
    CheckpointCorrupt,
    CheckpointNotFound,
    UnsupportedCheckpoint,
)
from workers.quantize.plan import Input

_MAX_OPEN: Final = 1000


class Source(Protocol):
    """A checkpoint that is read."""

    @property
    def path(self) -> Path:
        """The folder, or the file."""

    @property
    def config(self) -> dict[str, Any]:
        """As config.json says it."""

    def tensors(self) -> list[Input]:
        """In the order of the files. Raises CheckpointError."""

    def identity(self) -> dict[str, str]:
        """What changes when any tensor may have: a word for each file."""

    def open(self) -> None:
        """Before anything is read. Raises CheckpointError."""

    def read(self, name: str, begin: int, out: memoryview) -> None:
        """Fill `out` with bytes of the tensor, from its byte `begin` on. From any thread."""

    def side_files(self) -> Iterator[tuple[str, Path]]:
        """What goes along unchanged: the path in the folder, and where it is."""

    def close(self) -> None:
        """Nothing is read after it."""


class SafetensorsSource:
    """A folder with config.json and one or more .safetensors files."""

    def __init__(self, path: Path):
        """Raises CheckpointError."""
        self.path = path
        if not os.path.lexists(path / "config.json"):
            raise CheckpointNotFound(
                f"{path} holds no config.json: give a Hugging Face model folder, or a .gguf file"
            )
        self.config = read_json(path / "config.json")
        side = (method for name, method in SIDE_FILES.items() if os.path.lexists(path / name))
        self._refuse_rounded(named_method(self.config) or next(side, None))
        self._files = weight_files(path)
        if len(self._files) > _MAX_OPEN:
            raise UnsupportedCheckpoint(f"{path} has more than {_MAX_OPEN} files of weights")
        self._tensors: dict[str, StoredTensor] = {}
        for file in self._files:
            for name, stored in read_tensors(file).items():
                if name in self._tensors:
                    raise CheckpointCorrupt(
                        f"{file} holds {name!r}, as {self._tensors[name].file} does"
                    )
                self._tensors[name] = stored
        self._refuse_rounded(method_of_tensors(self._tensors))
        self._identities = {file: file_identity(file) for file in self._files}
        self._descriptors: dict[Path, int] = {}
        self._opened = contextlib.ExitStack()

    def _refuse_rounded(self, method: str | None) -> None:
        if method is not None:
            raise UnsupportedCheckpoint(
                f"{self.path} is quantized already ({method}): give the checkpoint that it was "
                "made of, since rounding twice loses twice"
            )

    def tensors(self) -> list[Input]:
        """See Source."""
        return [Input(name, one.dtype, one.shape) for name, one in self._tensors.items()]

    def identity(self) -> dict[str, str]:
        """See Source."""
        found = {"config.json": file_identity(self.path / "config.json")}
        for file in self._files:
            header = hashlib.sha256(read_header(file)[0]).hexdigest()[:16]
            found[file.name] = f"{file_identity(file)}:{header}"
        return found

    def open(self) -> None:
        """Before anything is read: the files stay open. Raises CheckpointError."""
        for file in self._files:
            descriptor = self._opened.enter_context(opened(file))
            if identity_of(os.fstat(descriptor)) != self._identities[file]:
                raise CheckpointChanged(f"{file} has changed while it was looked at: try again")
            self._descriptors[file] = descriptor

    def read(self, name: str, begin: int, out: memoryview) -> None:
        """See Source."""
        stored = self._tensors[name]
        done, descriptor = 0, self._descriptors[stored.file]
        try:
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], stored.begin + begin + done)
                if count == 0:
                    raise CheckpointCorrupt(f"{stored.file} became shorter while it was read")
                done += count
        except OSError as error:
            raise unreadable(stored.file, error) from error

    def side_files(self) -> Iterator[tuple[str, Path]]:
        """See Source."""
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path)
            if _goes_along(name) and file.is_file():
                yield str(name), file

    def close(self) -> None:
        """See Source."""
        self._descriptors.clear()
        self._opened.close()


_SUFFIXES: Final = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
_WRITTEN: Final = frozenset({"config.json", "model.safetensors.index.json"})
_LICENSES: Final = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def _goes_along(name: Path) -> bool:
    """Tokenizer, templates, settings, and what a license asks to be passed on."""
    if any(part.startswith(".") for part in name.parts) or len(name.parts) > 2:
        return False
    if str(name) in _WRITTEN or name.name.endswith(".index.json"):
        return False
    return name.suffix in _SUFFIXES or name.name.upper().startswith(_LICENSES)
