"""What a server reads of a model before it serves it: tried for one path after the other, each in a
fork of its own. Run by `tests.system.trial`.

Reads paths from stdin, answers what became of each, what it took, and what must not be.
"""

import asyncio
import contextlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import server.cli.cli  # noqa: F401 - all that a server imports
from server.errors import ServerError
from server.models.files import ModelFiles
from server.models.source import ModelNotFound, find_model
from server.text.chat_template import Chat, TemplateFailed
from server.text.kept_file import KeptFile
from server.text.text import Text
from server.text.tokenizer_check import try_tokenizer
from server.text.tokenizer_files import tokenizer_folder
from workers import CheckpointError

DEADLINE_S = 120.0
MAX_FILE_BYTES = 1 << 34


def serve(path: str) -> None:
    """As `onecopy serve` does until its instances are ready."""
    source = find_model(path)
    ModelFiles.at(source.path, source.given)
    folder = tokenizer_folder(source.path)
    file = folder / "tokenizer.json"
    kept = KeptFile.of(file) if source.path.is_dir() else None
    try_tokenizer(kept.path if kept else file, file)
    text = Text.load(folder, tokenizer_file=kept.path if kept else None)
    with contextlib.closing(text):
        ids = asyncio.run(text.encode("a b c", context_tokens=1 << 20))
        text.decode(ids)
        if text.has_chat_template:
            messages = [{"role": "user", "content": "hello"}]
            with contextlib.suppress(ServerError):  # of a chat, not of the model
                asyncio.run(text.encode_chat(Chat(messages), context_tokens=4096))
    if kept:
        kept.close()


def child(path: str, answer: int) -> None:
    told = {"message": "", "problem": ""}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            serve(path)
    except (ModelNotFound, CheckpointError, ServerError, TemplateFailed) as error:
        told["message"] = str(error) or type(error).__name__
    except BaseException:  # noqa: BLE001 - a traceback is what is looked for
        told["problem"] = traceback.format_exc()[-2000:]
    os.write(answer, json.dumps(told).encode())
    os._exit(0)


def tried(path: str) -> dict[str, object]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        child(path, theirs)
    os.close(theirs)
    deadline, text = time.monotonic() + DEADLINE_S, b""
    while True:
        readable, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            os.kill(pid, signal.SIGKILL)
            break
        piece = os.read(ours, 1 << 16)
        if not piece:
            break
        text += piece
    os.close(ours)
    _, status, usage = os.wait4(pid, 0)
    told = {"message": "", "problem": f"the server ended with status {status}"}
    if text:
        told = json.loads(text)
    children = usage.ru_utime + usage.ru_stime
    return {**told, "seconds": children, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(tried(json.loads(line))), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    assert Path("/proc/self").exists()
    main()
