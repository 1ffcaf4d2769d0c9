"""What sentence-transformers writes beside a model: how its vectors are made of its hidden states.

Owns where these files are: `modules.json` lists the steps; each step has a folder, the first the
checkpoint's own. Invariant: nothing outside the checkpoint's folder is read, and what is not there
is not guessed. Does not know what the steps mean.
"""

import re
from pathlib import Path
from typing import Any, Final

import msgspec

from workers.config.model_file import read_file, read_json
from workers.errors import CheckpointCorrupt

MAX_FILE_BYTES: Final = 1 << 20
_FOLDER: Final = re.compile(r"(?!\.+$)[\w.-]+")


class _Module(msgspec.Struct, frozen=True):
    type: str
    path: str = ""


def sentence_files(folder: Path) -> dict[str, Any] | None:
    """The steps of modules.json, each `{"type", "config"}`, under "modules", and the length limit
    under "max_seq_length" where there is one. None if the model was not saved by
    sentence-transformers. Raises CheckpointCorrupt."""
    file = folder / "modules.json"
    if not file.exists():
        return None
    try:
        steps = msgspec.json.decode(read_file(file, MAX_FILE_BYTES), type=list[_Module])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{file} is damaged: {error}. Download it again.") from error
    modules = [
        {"type": step.type.rpartition(".")[2], "config": _step_config(folder, step)}
        for step in steps
    ]
    found: dict[str, Any] = {"modules": modules}
    for settings in sorted(folder.glob("sentence_*_config.json")):
        limit = read_json(settings).get("max_seq_length")
        if isinstance(limit, int) and limit > 0:
            found["max_seq_length"] = limit
    return found


def _step_config(folder: Path, step: _Module) -> dict[str, Any]:
    if not step.path:
        return {}  # the model's own
    if not _FOLDER.fullmatch(step.path):
        raise CheckpointCorrupt(
            f"{folder / 'modules.json'} names the folder {step.path!r}, which is not one beside it"
        )
    config = folder / step.path / "config.json"
    return read_json(config) if config.exists() else {}
