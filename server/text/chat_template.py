"""Chat templates: messages to prompt text, in a process of their own.

A template is a program that came with the model. Jinja's sandbox keeps it from Python's insides and
limits `range`, but not nested loops, `'a' * 10**10`, or a string doubled forty times. So it runs in
a child that the kernel bounds: address space, no file writes; and the parent bounds the time and
kills it. Owns that child and both ends of the socket between.

Invariants: `render` returns within its deadline (and the start of a child), and the server's own
memory grows by no more than the longest text asked for; what somebody else does to the child is no
error of the template; the child ends with the server. Knows nothing of tokens and HTTP.

The child runs this file by its path, isolated (`python -I`): hence no import of our own packages at
the top, and the imports of jinja2 inside the functions that the child runs.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from server.processes.endings import OutOfMemoryKills

DEADLINE_S: Final = 10.0
ADDRESS_SPACE_BYTES: Final = 1 << 30
_HEADER_BYTES: Final = 4
_MAX_TRIES: Final = 3
"""How often a child is replaced that somebody else killed or stopped, for one text."""
_LOOK_EVERY_S: Final = 0.25
_F_SETSIG: Final = 10  # fcntl(2)


class TemplateFailed(Exception):
    """The template has an error, refused the messages, or used too much. The message says which."""


class _Late(Exception):
    """The deadline has passed."""


class _Interrupted(Exception):
    """The child was killed, or stopped, by somebody else. The message says how."""


class ChatTemplate:
    """One template, ready to render. Safe to use from several threads: one renders at a time."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        deadline_s: float = DEADLINE_S,
    ):
        """`special_tokens` are variables of the template, such as `bos_token`. Returns at once,
        while the child starts; an error of the template shows in `render`."""
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._closed = False
        self._memory_kills = _memory_kills()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pipe = -1
        """The child dies when this is closed."""
        self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        max_chars: int,
    ) -> str:
        """The prompt, ending where the assistant's answer begins. Raises `TemplateFailed`."""
        request = {
            "messages": messages,
            "tools": tools,
            "max_chars": max_chars,
            "deadline_s": int(self._deadline_s) + 2,
        }
        deadline = time.monotonic() + self._deadline_s
        with self._lock:
            for number in range(_MAX_TRIES):
                try:
                    answer = self._try(request, deadline)
                    break
                except _Interrupted as interrupted:
                    if number == _MAX_TRIES - 1:
                        raise TemplateFailed(str(interrupted)) from interrupted
        if "error" in answer:
            raise TemplateFailed(str(answer["error"]))
        return str(answer["text"])

    def close(self) -> None:
        """Ends the child, and with it a render in progress; nothing can be rendered afterwards."""
        self._closed = True
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            self._stop()

    def _try(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        """The child's answer. Raises TemplateFailed, _Interrupted."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        try:
            return self._ask(request, deadline)
        except _Late as error:
            self._stop()
            raise TemplateFailed(
                f"the chat template did not finish within {self._deadline_s:g} s"
            ) from error
        except _Interrupted:
            self._stop()
            raise
        except (OSError, EOFError) as error:
            how = self._how_it_ended()
            self._stop()
            if how is not None and not self._closed:
                raise _Interrupted(f"the chat template's process was ended: {how}") from error
            raise TemplateFailed(
                "the chat template's process ended; it may have used more than "
                f"{ADDRESS_SPACE_BYTES >> 20} MiB"
            ) from error

    def _how_it_ended(self) -> str | None:
        """How somebody else ended the child; None where it ended by itself."""
        from server.processes.endings import ending_of

        assert self._child is not None  # noqa: S101 - it was asked
        try:
            status = self._child.wait(_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:  # it closed its end, and goes on
            return None
        ending = ending_of(status, out_of_memory=self._memory_kills.just_now())
        return ending.how if status < 0 and not ending.by_itself else None

    def _ask(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        frame = json.dumps(request).encode()
        self._send(len(frame).to_bytes(_HEADER_BYTES, "big") + frame, deadline)
        length = int.from_bytes(self._receive(_HEADER_BYTES, deadline), "big")
        # Twelve bytes is the most that JSON's ASCII makes of one character; the child is not
        # trusted to keep to what it was asked for.
        if length > 12 * request["max_chars"] + 8192:
            raise EOFError("an answer longer than asked for")
        answer = json.loads(self._receive(length, deadline))
        if not isinstance(answer, dict) or not {"text", "error"} & answer.keys():
            raise EOFError("an answer of another kind")
        return answer

    def _send(self, data: bytes, deadline: float) -> None:
        """All of it. Raises as `_receive` does, or `OSError` where the child has closed its end."""
        rest = memoryview(data)
        while rest:
            with contextlib.suppress(TimeoutError):
                rest = rest[self._waiting(deadline).send(rest) :]

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        """Exactly `num_bytes`. Raises `_Late` at the deadline, `EOFError` at the end,
        `_Interrupted` where the child is stopped."""
        parts = bytearray()
        while len(parts) < num_bytes:
            try:
                part = self._waiting(deadline).recv(min(num_bytes - len(parts), 1 << 20))
            except TimeoutError:
                continue
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def _waiting(self, deadline: float) -> socket.socket:
        """The socket, set to wait for a while. Raises `_Late`, `_Interrupted`."""
        from allocator import ProcessState

        assert self._socket is not None  # noqa: S101 - `_start` made it
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise _Late
        self._socket.settimeout(min(left_s, _LOOK_EVERY_S))

        state = ProcessState.of(self._child.pid) if self._child is not None else None
        if state is not None and state.is_stopped:
            raise _Interrupted("the chat template's process was stopped by a signal")
        return self._socket

    def _start(self) -> None:
        if self._closed:
            raise TemplateFailed("the server is shutting down")
        self._stop()
        ours, theirs = socket.socketpair()
        pipe, self._pipe = os.pipe()
        with theirs:
            try:
                self._child = subprocess.Popen(  # noqa: S603 - this very file, by a fixed command
                    [sys.executable, "-I", str(Path(__file__).resolve()), str(pipe)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[pipe],
                    env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": os.environ.get("TZ", "")},
                )
            finally:
                os.close(pipe)
        self._socket = ours
        setup = json.dumps({"source": self.source, "special_tokens": self._special_tokens}).encode()
        ours.settimeout(self._deadline_s)
        with contextlib.suppress(OSError):  # a child that is gone already shows in `_ask`
            ours.sendall(len(setup).to_bytes(_HEADER_BYTES, "big") + setup)

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


def _memory_kills() -> "OutOfMemoryKills":
    from server.processes.endings import OutOfMemoryKills

    return OutOfMemoryKills()


# --- in the child


def _environment() -> Any:
    """What templates expect to find: the same names that transformers gives them."""
    import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant wrote, for training. Here: its body."""

        tags = {"generation"}  # noqa: RUF012 - the name and kind are jinja2's

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes <, > and &, which a model should see as they are.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().astimezone().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _rendered(template: Any, special_tokens: Mapping[str, str], request: Mapping[str, Any]) -> str:
    max_chars: int = request["max_chars"]
    parts, num_chars = [], 0
    pieces = template.generate(
        **special_tokens,
        messages=request["messages"],
        tools=request["tools"],
        documents=None,
        add_generation_prompt=True,
    )
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > max_chars:
            raise ValueError(f"the prompt it makes has more than {max_chars} characters")
        parts.append(piece)
    return "".join(parts)


def _serve(stream: Any) -> None:
    """Answers one request after the other until the parent is gone."""

    def receive() -> Any:
        header = stream.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            raise SystemExit(0)
        return json.loads(stream.read(int.from_bytes(header, "big")))

    def send(answer: Mapping[str, str]) -> None:
        frame = json.dumps(answer).encode()
        stream.write(len(frame).to_bytes(_HEADER_BYTES, "big") + frame)
        stream.flush()

    setup = receive()
    environment, template = _environment(), None
    while True:
        request = receive()
        # Should the parent die meanwhile, nobody else ends a template that never does.
        signal.alarm(request["deadline_s"])
        try:
            template = template or environment.from_string(setup["source"])
            answer = {"text": _rendered(template, setup["special_tokens"], request)}
        except MemoryError:
            answer = {"error": "the chat template used too much memory"}
        except Exception as error:  # noqa: BLE001 - whatever a template raises is its answer
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        signal.alarm(0)
        send(answer)


def _die_with(pipe: int) -> None:
    """As `workers.process.linux.die_with`, which can't be imported here: be killed when the
    parent's end is closed, however that comes, and even while this process is stopped."""
    import fcntl

    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGKILL)


def _main() -> None:
    import resource

    _die_with(int(sys.argv[1]))
    for limit, value in (
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    with socket.socket(fileno=sys.stdin.fileno()) as sock, sock.makefile("rwb") as stream:
        _serve(stream)


if __name__ == "__main__":
    _main()
