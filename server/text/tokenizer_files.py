"""Where a model's tokenizer files are: its own folder, or one built once from a GGUF file.

Owns the cache of built folders. Invariant: a folder with its final name is complete, whatever was
killed and however many servers build the same one at once: it is written beside under another name
and renamed. Building needs torch and much memory, so it happens in a process of its own
(`python -m server.text.tokenizer_files SRC OUT`), and nothing of it stays with the server.

Does not know how text is encoded, nor anything about weights.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from allocator import module_command, module_environment
from server.errors import ServerError
from workers import begins_like_gguf

FORMAT_VERSION: Final = 1
"""Raised when `build` writes something else for the same file, so that old folders are not used."""

BUILD_DEADLINE_S: Final = 300.0
BUILD_BYTES: Final = 4 << 30
"""Whatever a file says, building its tokenizer takes no more memory."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_NO_ROOM_STATUS: Final = 3
STALE_AFTER_S: Final = 3600.0
"""A half-built folder of that age belongs to a builder that was killed."""

SPECIAL_IDS_FILE: Final = "special_ids.json"
"""Beside the usual files, in built folders: what a GGUF file says that these have no place for."""

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


def tokenizer_folder(model_path: Path, cache_dir: Path | None = None) -> Path:
    """The folder with `tokenizer.json` (and what goes with it) for a model.

    `model_path` is a Hugging Face folder, a file inside one, or a `.gguf` file. The first call for
    a GGUF file takes some seconds, later ones a `stat`. Raises `TokenizerFilesError`.
    """
    if not model_path.exists():
        raise TokenizerMissing(f"{model_path} does not exist")
    if _is_gguf(model_path):
        return _built_folder(model_path.resolve(), cache_dir or default_cache_dir())
    folder = model_path if model_path.is_dir() else model_path.parent
    if not os.path.lexists(folder / "tokenizer.json"):
        raise TokenizerMissing(_what_is_missing(folder))
    return folder


def tokenizer_file(model_path: Path, cache_dir: Path | None = None) -> Path:
    """Where `tokenizer_folder` has, or will have, the model's tokenizer.json. Builds nothing."""
    if _is_gguf(model_path):
        folder = _final_folder(model_path.resolve(), cache_dir or default_cache_dir())
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


def _key(file: Path) -> str:
    """Changes whenever the file or the code that converts it may have changed."""
    stat = file.stat()
    parts = (
        FORMAT_VERSION,
        importlib.metadata.version("transformers"),
        importlib.metadata.version("tokenizers"),
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ino,
        stat.st_dev,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _final_folder(file: Path, cache_dir: Path) -> Path:
    if os.fsencode(cache_dir).decode(errors="ignore") != str(cache_dir):
        raise CacheNotWritable(
            f"The name of the cache {os.fsencode(cache_dir)!r} is no UTF-8. Set ONECOPY_CACHE_DIR "
            "to another folder."
        )
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", file.stem)[:64]
    return cache_dir / "tokenizers" / f"{stem}-{_key(file)}"


def _built_folder(file: Path, cache_dir: Path) -> Path:
    final = _final_folder(file, cache_dir)
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
        _run_builder(file, unfinished)
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


def _run_builder(file: Path, out: Path) -> None:
    environment = module_environment(
        HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES=""
    )
    try:
        done = subprocess.run(  # noqa: S603 - our own module, by a fixed command
            module_command("server.text.tokenizer_files", str(file), str(out)),
            env=environment,
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
    if done.returncode == _NO_ROOM_STATUS:
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


# --- in the builder's process


def build(source: Path, out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja (where the file has one)
    and `SPECIAL_IDS_FILE` for a GGUF file into `out`. Imports torch; keep it out of a server."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.save_pretrained(str(out))
    special = _special_ids(source)
    _obey_add_bos(out / "tokenizer.json", special)
    (out / SPECIAL_IDS_FILE).write_text(json.dumps(special, indent=1) + "\n")
    # A rename may reach the disk before the data does: a folder with its final name is complete.
    for file in out.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _special_ids(source: Path) -> dict[str, Any]:
    """What the file says of special tokens: ids by role, and whether a prompt starts with BOS."""
    # `gguf.GGUFReader` makes an array of each token: half a minute for the 262,144 of a Gemma.
    from transformers.integrations.gguf.reader import read_gguf_metadata

    said, _ = read_gguf_metadata(str(source))
    special: dict[str, Any] = {"format": FORMAT_VERSION}
    for role in ("bos", "eos", "eot", "eom"):
        if (token_id := said.get(f"tokenizer.ggml.{role}_token_id")) is not None:
            special[f"{role}_token_id"] = int(token_id)
    if (add_bos := said.get("tokenizer.ggml.add_bos_token")) is not None:
        special["add_bos_token"] = bool(add_bos)
    return special


def _obey_add_bos(file: Path, special: dict[str, Any]) -> None:
    """Makes the tokenizer start a prompt with BOS exactly if the GGUF file says so."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    wanted, bos_id = special.get("add_bos_token"), special.get("bos_token_id")
    if wanted is None or bos_id is None:
        return
    tokenizer = Tokenizer.from_file(str(file))
    bos = tokenizer.id_to_token(bos_id)
    if bos is None or wanted == (tokenizer.encode("a").ids[:1] == [bos_id]):
        return
    tokenizer.post_processor = TemplateProcessing(
        single=[bos, "$A"] if wanted else ["$A"],
        pair=[bos, "$A", "$B"] if wanted else ["$A", "$B"],
        special_tokens=[(bos, bos_id)] if wanted else [],
    )
    tokenizer.save(str(file))


def _main() -> int:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    bound = BUILD_BYTES if most == resource.RLIM_INFINITY else min(BUILD_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, most))
    try:
        build(Path(sys.argv[1]), Path(sys.argv[2]))
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        sys.stderr.write(f"{error.strerror}\n")
        return _NO_ROOM_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(_main())
