"""Where a model's tokenizer files are: its own folder, or one built once from a GGUF file.

Owns the cache of built folders. Invariant: a folder with its final name is complete, whatever was
killed and however many servers build the same one at once: it is written beside under another name
and renamed. Building happens in a process of its own (`server/text/gguf/build.py`), which the
kernel bounds, and nothing of it stays with the server.

Does not know how text is encoded, nor anything about weights.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from allocator import module_command, module_environment
from server.errors import ServerError
from server.text.gguf.build import FORMAT_VERSION, NO_ROOM_STATUS
from workers import begins_like_gguf

log = logging.getLogger("onecopy.server")

BUILD_DEADLINE_S: Final = 300.0
STALE_AFTER_S: Final = 3600.0
"""A half-built folder of that age belongs to a builder that was killed."""

_READ_BY: Final = {
    "tokenizer.model": "'onecopy[sentencepiece]'",
    "spiece.model": "'onecopy[sentencepiece]'",
    "sentencepiece.bpe.model": "'onecopy[sentencepiece]'",
    "tiktoken.model": "tiktoken",
    "tekken.json": None,
    "vocab.json": None,
    "vocab.txt": None,
}
"""Other forms of a tokenizer, and what transformers needs beside itself to read them."""


class TokenizerFilesError(ServerError):
    """The tokenizer of a model can't be had. Met at the start of a server, never by a request."""

    code = "tokenizer_files"


class TokenizerMissing(TokenizerFilesError):
    """The model has no tokenizer in a form that can be read."""


class CacheNotWritable(TokenizerFilesError):
    """The built folder has no place to go."""


class TokenizerBuildFailed(TokenizerFilesError):
    """The GGUF file's tokenizer could not be converted."""


def default_cache_dir() -> Path:
    """`$ONECOPY_CACHE_DIR`, else `$XDG_CACHE_HOME/onecopy`, else `~/.cache/onecopy`."""
    if own := os.environ.get("ONECOPY_CACHE_DIR"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "onecopy"
    return Path("~/.cache/onecopy").expanduser()


def tokenizer_folder(
    model_path: Path, cache_dir: Path | None = None, pre_tokenizer: str | None = None
) -> Path:
    """The folder with `tokenizer.json` (and what goes with it) for a model.

    `model_path` is a Hugging Face folder, a file inside one, or a `.gguf` file. The first call for
    a GGUF file takes a second, later ones a `stat`; `pre_tokenizer` goes before the file's own.
    Raises `TokenizerFilesError`.
    """
    if not model_path.exists():
        raise TokenizerMissing(f"{model_path} does not exist")
    if _is_gguf(model_path):
        cache_dir = cache_dir or default_cache_dir()
        return _built_folder(model_path.resolve(), cache_dir, pre_tokenizer)
    folder = model_path if model_path.is_dir() else model_path.parent
    if not os.path.lexists(folder / "tokenizer.json"):
        raise TokenizerMissing(_what_is_missing(folder))
    return folder


def tokenizer_file(
    model_path: Path, cache_dir: Path | None = None, pre_tokenizer: str | None = None
) -> Path:
    """Where `tokenizer_folder` has, or will have, the model's tokenizer.json. Builds nothing."""
    if _is_gguf(model_path):
        cache_dir = cache_dir or default_cache_dir()
        folder = _final_folder(model_path.resolve(), cache_dir, pre_tokenizer)
    else:
        folder = model_path if model_path.is_dir() else model_path.parent
    return folder / "tokenizer.json"


def _is_gguf(model_path: Path) -> bool:
    """In a hub's cache, or Ollama's, the file has no suffix."""
    if not model_path.is_file():
        return False
    return model_path.suffix.lower() == ".gguf" or begins_like_gguf(model_path)


def _what_is_missing(folder: Path) -> str:
    found = [name for name in _READ_BY if (folder / name).is_file()]
    if not found:
        return (
            f"{folder} has no tokenizer.json. Copy the model's tokenizer.json (and "
            "tokenizer_config.json) into it, or give a .gguf file, which carries its own."
        )
    needed = _READ_BY[found[0]]
    return (
        f"{folder} has {', '.join(found)} but no tokenizer.json, which is needed. Write it once "
        f"with transformers{f' (first: pip install {needed})' if needed else ''}: "
        f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
    )


def _key(file: Path, pre_tokenizer: str | None) -> str:
    """Changes whenever the file, what is said of it, or the code that converts it may have
    changed."""
    stat = file.stat()
    parts = (
        FORMAT_VERSION,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ino,
        stat.st_dev,
        *((pre_tokenizer,) if pre_tokenizer is not None else ()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _final_folder(file: Path, cache_dir: Path, pre_tokenizer: str | None) -> Path:
    if os.fsencode(cache_dir).decode(errors="ignore") != str(cache_dir):
        raise CacheNotWritable(
            f"The name of the cache {os.fsencode(cache_dir)!r} is no UTF-8. Set ONECOPY_CACHE_DIR "
            "to another folder."
        )
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", file.stem)[:64]
    return cache_dir / "tokenizers" / f"{stem}-{_key(file, pre_tokenizer)}"


def _built_folder(file: Path, cache_dir: Path, pre_tokenizer: str | None) -> Path:
    final = _final_folder(file, cache_dir, pre_tokenizer)
    home = final.parent
    if (final / "tokenizer.json").is_file():
        return final
    try:
        home.mkdir(parents=True, exist_ok=True)
        # Named with a dot: no complete folder is.
        unfinished = Path(tempfile.mkdtemp(prefix=".building-", dir=home))
    except OSError as error:
        raise CacheNotWritable(
            f"The tokenizer of {file.name} has to be unpacked once, and {home} can't be written "
            f"({error.strerror}). Set ONECOPY_CACHE_DIR to a folder that can."
        ) from error
    try:
        _sweep(home)
        _run_builder(file, unfinished, pre_tokenizer)
        try:
            unfinished.rename(final)
        except OSError:
            # Another server was quicker: the folder is there, and as good as ours.
            if not (final / "tokenizer.json").is_file():
                raise
    except OSError as error:
        raise CacheNotWritable(
            f"Writing the tokenizer of {file.name} to {home} failed ({error.strerror}). "
            "Make room there, or set ONECOPY_CACHE_DIR to another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def _sweep(home: Path) -> None:
    """Removes what killed builders left."""
    for folder in home.glob(".building-*"):
        with contextlib.suppress(FileNotFoundError):  # another server sweeps too
            if time.time() - folder.stat().st_mtime > STALE_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _run_builder(file: Path, out: Path, pre_tokenizer: str | None) -> None:
    given = [] if pre_tokenizer is None else [pre_tokenizer]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, by a fixed command
            module_command("server.text.gguf.build", str(file), str(out), *given),
            env=module_environment(OPENBLAS_NUM_THREADS="1"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TokenizerBuildFailed(
            f"Unpacking the tokenizer of {file.name} took more than {BUILD_DEADLINE_S:.0f} s."
        ) from error
    if done.returncode == NO_ROOM_STATUS:
        raise CacheNotWritable(
            f"Writing the tokenizer of {file.name} to {out.parent} failed "
            f"({done.stderr.strip().rpartition(chr(10))[2]}). Make room there, or set "
            "ONECOPY_CACHE_DIR to another folder."
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise TokenizerBuildFailed(
            f"The tokenizer of {file.name} can't be unpacked: {last[:500]}. Download the file "
            "again, or give a Hugging Face folder with tokenizer.json instead."
        )
    if done.stderr:
        log.warning("%s", done.stderr.strip())
