"""The decoder's functions, carried out by an emulated process that reaches into this one's memory.

Owns that process. Invariant: what a function is given by address is what it works on, as if it had
been loaded here.
"""

import ctypes
import os
import struct
import subprocess
from pathlib import Path
from typing import Any, Final

from tests.daemon_process import ROOT
from workers.model.native import library

SOURCE: Final = Path(__file__).with_name("decoder_server.cpp")
_TAKEN: Final = 3
_PR_SET_PTRACER: Final = 0x59616D61
_PR_SET_PTRACER_ANY: Final = ctypes.c_ulong(-1 & (1 << 64) - 1)


def compile_server(compiler: str, flags: list[str], to: Path) -> None:
    """One file that needs nothing of the other machine's system."""
    command = [compiler, *flags, "-static", "-pthread", str(SOURCE), "-o", str(to)]
    subprocess.run(command, check=True, cwd=ROOT)


class ForeignLibrary:
    """Stands for what ctypes.CDLL gives."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._specs: dict[int, Any] = {}
        self._handles: dict[int, int] = {}
        # The other process is a child: the kernel may be set to let only parents look into others.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        sizes = tuple(self._ask(number) for number in range(3))
        parts = (library.Layer, library.Decoder, library.Call)
        assert sizes == tuple(ctypes.sizeof(part) for part in parts)

    def onecopy_decoder_create(self, spec: Any) -> int:
        handle = len(self._specs) + 1
        self._specs[handle] = spec._obj
        self._handle(handle)
        return handle

    def onecopy_decoder_workspace_bytes(self, handle: int) -> int:
        return self._ask(4, self._handle(handle))

    def onecopy_decoder_hidden_stride(self, handle: int) -> int:
        return self._ask(5, self._handle(handle))

    def onecopy_decoder_forward(self, handle: int, call: Any) -> int:
        while True:
            try:
                return self._ask(6, self._handle(handle), ctypes.addressof(call._obj))
            except _TakenError:
                continue

    def onecopy_decoder_counted(self, handle: int, counts: Any) -> None:
        self._ask(7, self._handle(handle), ctypes.addressof(counts))

    def onecopy_decoder_destroy(self, handle: int) -> None:
        if handle in self._handles:
            self._ask(8, self._handles.pop(handle))

    def _handle(self, handle: int) -> int:
        """The process's own, which may be a new process."""
        while handle not in self._handles:
            try:
                self._handles[handle] = self._ask(3, ctypes.addressof(self._specs[handle]))
            except _TakenError:
                continue
        return self._handles[handle]

    def _ask(self, *command: int) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [*self._command, f"/proc/{os.getpid()}/mem"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(struct.pack("<3q", *command, *[0] * (3 - len(command))))
        self._process.stdin.flush()
        answer = self._process.stdout.read(8)
        if len(answer) < 8:
            status = self._process.wait()
            self.close()
            if status == _TAKEN:
                raise _TakenError
            raise AssertionError(f"the emulated process ended with {status}")
        return int(struct.unpack("<q", answer)[0])

    def close(self) -> None:
        if self._process is not None:
            with self._process:
                self._process.kill()
            self._process = None
        self._handles.clear()


class _TakenError(Exception):
    """An address of ours is in use there. By the next process's luck it is not."""
