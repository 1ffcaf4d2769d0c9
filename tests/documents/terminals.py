"""Terminals in which a document's commands are run as a reader runs them.

Owns the processes, a network in which every port is free, and a folder that looks like the
project's.
Invariant: after `close` nothing of what was started is left: no process, no segment, no socket.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.documents.blocks import ROOT, Block, Document
from tests.system.running_server import TIMEOUT_S, leftovers, wait_until

_LOOPBACK_UP = """
import fcntl, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
print("up", flush=True)
sys.stdin.read()
"""
_INTERPRETER = """
import sys, traceback
own = {"__name__": "__main__"}
while line := sys.stdin.readline():
    name, token = line.split()
    status = 0
    try:
        with open(name) as file:
            exec(compile(file.read(), name, "exec"), own)
    except BaseException:
        traceback.print_exc()
        status = 1
    print(token, status, file=sys.stderr, flush=True)
"""
_READY = re.compile(r"^  stop  |allocator ready in ", re.MULTILINE)
_PORTS = (8000, 8001)

OF_MAKE = {"ARGS", "JOBS", "MODEL", "PYTHON", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
"""What whoever runs these tests by make may have given it, and a reader's make must not inherit."""


class Network:
    """The machine's loopback alone, for what is started with `prefix`."""

    def __init__(self) -> None:
        """Skips where this user can't make one and the machine's ports are taken."""
        own = "-n" if os.geteuid() == 0 else "-rn"
        self._holder = subprocess.Popen(
            ["unshare", own, sys.executable, "-c", _LOOPBACK_UP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        self.prefix: list[str] = []
        if self._holder.stdout.readline() == "up\n":
            spaces = f"/proc/{self._holder.pid}/ns"
            self.prefix = ["nsenter", f"--net={spaces}/net"]
            if own == "-rn":
                self.prefix += [f"--user={spaces}/user", "--preserve-credentials"]
        elif not all(map(_is_free, _PORTS)):
            self.close()
            pytest.skip(f"no network of its own can be made, and one of {_PORTS} is taken")

    def close(self) -> None:
        self._holder.communicate("")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Asked:
    """A program that reads what it is to run, and says when it has: a shell, an interpreter."""

    def __init__(self, command: list[str], say: str, desk: "Desk") -> None:
        """`say` is what to write for a file and a token."""
        self._say = say
        self._log = desk.scratch / f"asked-{len(desk.asked)}"
        self._folder = desk.scratch
        self._num_runs = 0
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*desk.network.prefix, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=desk.folder,
                env=desk.environment,
            )

    def run(self, text: str) -> tuple[int, str]:
        """The status of the text as a program, and what it printed."""
        self._num_runs += 1
        token = f"=={self._log.name}-{self._num_runs}=="
        file = self._folder / f"{self._log.name}-{self._num_runs}"
        file.write_text(text)
        begin = self._log.stat().st_size
        assert self._process.stdin is not None
        self._process.stdin.write(self._say.format(file=file, token=token) + "\n")
        self._process.stdin.flush()

        end = re.compile(rf"{token} (\d+)\n")

        def ended() -> bool:
            return end.search(self._told(begin)) is not None or self._process.poll() is not None

        wait_until(ended, f"the end of\n{text}")
        told = self._told(begin)
        found = end.search(told)
        return (int(found[1]), told[: found.start()]) if found else (1, told)

    def _told(self, begin: int) -> str:
        return self._log.read_bytes()[begin:].decode(errors="replace")

    def close(self) -> None:
        self._process.communicate("", TIMEOUT_S)


class Desk:
    """Where one reader sits: a shell, an interpreter, and terminals in which something runs on."""

    def __init__(self, tokenizer_cache: Path) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="onecopy-desk-", dir="/tmp"))
        self.folder = self.scratch / "project"
        self.folder.mkdir()
        for entry in ROOT.iterdir():
            if not entry.name.startswith(".") and entry.name != "__pycache__":
                (self.folder / entry.name).symlink_to(entry)
        (self.folder / ".venv").symlink_to(sys.prefix)
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="onecopy-t-", dir="/tmp"))
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("ONECOPY_")
            and not name.lower().endswith("_proxy")
            and name not in OF_MAKE
        }
        self.environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ONECOPY_RUNTIME_DIR": str(self.runtime_dir),
            "ONECOPY_CACHE_DIR": str(tokenizer_cache),
            "ONECOPY_IMAGE_DIR": str(self.scratch / "images"),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "COLUMNS": "200",
            "NO_COLOR": "1",
            # What was installed is what is tried: nothing is installed because a file is newer.
            "MAKEFLAGS": "-o .venv/.installed",
        }
        self.network = Network()
        self.asked: list[Asked] = []
        self._shell = self._ask(
            ["bash", "--noprofile", "--norc"], ". {file} < /dev/null; echo {token} $?"
        )
        self._interpreter: Asked | None = None
        self._terminals: list[tuple[Block, subprocess.Popen[bytes], Path]] = []
        self._printed = ""

    def _ask(self, command: list[str], say: str) -> Asked:
        asked = Asked(command, say, self)
        self.asked.append(asked)
        return asked

    def follow(self, document: Document) -> None:
        """Do what it says, from top to bottom."""
        for block in document.blocks:
            if not block.why_not:
                self._do(block)

    def _do(self, block: Block) -> None:
        if block.language == "text":
            if block.words & {"output", "exact"}:
                compare(block, block.text.splitlines(), self._printed)
        elif block.file:
            (self.folder / block.file).write_text(block.text)
        elif "terminal" in block.words:
            self._in_a_terminal(block)
        elif block.language == "sh":
            self._succeed(block, *self._shell.run(f"set -e\n{block.text}\nset +e\n"))
        elif block.language == "python":
            if self._interpreter is None:
                self._interpreter = self._ask(
                    [sys.executable, "-u", "-c", _INTERPRETER], "{file} {token}"
                )
            self._succeed(block, *self._interpreter.run(block.text))
        else:
            for command, shown in block.commands():
                status, printed = self._shell.run(command)
                self._succeed(block, status, printed)
                compare(block, shown, printed)

    def _succeed(self, block: Block, status: int, printed: str) -> None:
        failed, wanted = status != 0, "fails" in block.words
        assert failed == wanted, f"{block} ended with status {status}:\n{block.text}\n{printed}"
        self._printed = printed

    def _in_a_terminal(self, block: Block) -> None:
        log = self.scratch / f"terminal-{len(self._terminals)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.network.prefix, "bash", "-c", block.text],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
            )
        self._terminals.append((block, process, log))
        wait_until(
            lambda: _READY.search(log.read_text()) or process.poll() is not None,
            f"{block} to be ready",
        )
        self._printed = log.read_text()
        assert process.poll() is None, f"{block} ended:\n{self._printed}"

    def close(self) -> None:
        """Ctrl-C in every terminal, the last one first; then see that nothing is left."""
        for block, process, _ in reversed(self._terminals):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            process.wait(TIMEOUT_S)
            assert process.returncode == 0 or block.text.startswith("make"), block
        for asked in self.asked:
            asked.close()
        self.network.close()
        told = "\n".join(log.read_text() for _, _, log in self._terminals)
        assert "Traceback" not in told, told
        for folder in (self.runtime_dir, *self.folder.glob("*/")):
            if folder == self.runtime_dir or (not folder.is_symlink() and folder.is_dir()):
                assert leftovers(folder) == [], told
        shutil.rmtree(self.runtime_dir)
        shutil.rmtree(self.scratch)


def compare(block: Block, shown: list[str], printed: str) -> None:
    """Whether what a document shows is what was printed: all lines, or those of words alone."""
    wanted = [" ".join(line.split()) for line in shown if line.strip()]
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    if "exact" in block.words:
        assert lines == wanted, f"{block} shows something else than\n{printed}"
        return
    whole = "\n".join(lines)
    for line in wanted:
        if re.search(r"[^\W\d_]", line) and not re.search(r"\d", line):
            assert line in whole, f"{block} shows the line {line!r}, but printed was\n{printed}"
