"""Chat templates: messages to prompt text, in a process of their own.

A template is a program that came with the model. Jinja's sandbox keeps it from Python's insides and
limits `range`, but not nested loops, `'a' * 10**10`, or a string doubled forty times. So it runs in
a child that the kernel bounds: address space, no file writes; and the parent bounds the time and
kills it. Owns that child and both ends of the socket between.

Invariants: `render` returns within its deadline (and the start of a child), and the server's own
memory grows by no more than the longest text asked for; what somebody else does to the child is no
error of the template; the child (`server.text.template_process`) ends with the server. Knows
nothing of tokens and HTTP.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from allocator import ProcessState, module_command, module_environment
from server.processes.endings import OutOfMemoryKills, ending_of
from server.text.template_wire import ADDRESS_SPACE_BYTES, HEADER_BYTES, frame

DEADLINE_S: Final = 10.0
DEFAULT: Final = "default"
_VARIABLES: Final = ("PATH", "PYTHONPATH", "TZ")
"""All that the child sees of our environment: nobody's keys."""
_MAX_TRIES: Final = 3
"""How often a child is replaced that somebody else killed or stopped, for one text."""
_LOOK_EVERY_S: Final = 0.25


class TemplateFailed(Exception):
    """The template has an error, refused the messages, or used too much. The message says which;
    `param` is what it can't do, where the template is not to blame; `is_its_answer`: it ran, and
    this is what came of it, so that other messages may be taken."""

    def __init__(
        self, message: str, param: str | None = None, *, is_its_answer: bool = False
    ) -> None:
        super().__init__(message)
        self.param = param
        self.is_its_answer = is_its_answer


@dataclass(frozen=True)
class Chat:
    """What a template makes a prompt of. Contents of messages are texts, or lists of text parts."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template's own, such as `enable_thinking`; they go before special tokens."""
    needed: Mapping[str, str] = field(default_factory=dict)
    """Variables that the template must read, by what the request calls them; else `render`
    refuses."""
    add_generation_prompt: bool = True
    """Whether the prompt ends where an assistant's answer begins; else with the last message."""
    continues_last: bool = False
    """Whether it ends within the last message, which the answer goes on with."""

    @property
    def num_chars(self) -> int:
        """Of the contents of messages."""
        contents = (message.get("content") or "" for message in self.messages)
        return sum(
            len(one) if isinstance(one, str) else sum(len(part["text"]) for part in one)
            for one in contents
        )


class _Late(Exception):
    """The deadline has passed."""


class _Interrupted(Exception):
    """The child was killed, or stopped, by somebody else. The message says how."""


class ChatTemplate:
    """One template, ready to render. Safe to use from several threads: one renders at a time."""

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        deadline_s: float = DEADLINE_S,
    ):
        """`source`: one template, or several by name: "default", and "tool_use" for chats with
        tools. `special_tokens` are variables of the template, such as `bos_token`. Returns at once,
        while the child starts; an error of the template shows in `render`."""
        self._sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens or {})
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._closed = False
        self._memory_kills = OutOfMemoryKills()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pipe = -1
        """The child dies when this is closed."""
        self._start()

    def render(self, chat: Chat, *, max_chars: int) -> str:
        """The prompt. Raises `TemplateFailed`."""
        request = {
            "messages": chat.messages,
            "tools": chat.tools or None,
            "documents": chat.documents or None,
            "variables": chat.variables,
            "needed": chat.needed,
            "add_generation_prompt": chat.add_generation_prompt and not chat.continues_last,
            "continues_last": chat.continues_last,
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
            raise TemplateFailed(
                str(answer["error"]), answer.get("param"), is_its_answer=not answer.get("broken")
            )
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
        assert self._child is not None  # noqa: S101 - it was asked
        try:
            status = self._child.wait(_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:  # it closed its end, and goes on
            return None
        ending = ending_of(status, out_of_memory=self._memory_kills.just_now())
        return ending.how if status < 0 and not ending.by_itself else None

    def _ask(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        self._send(frame(request), deadline)
        length = int.from_bytes(self._receive(HEADER_BYTES, deadline), "big")
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
                    module_command("server.text.template_process", str(pipe)),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[pipe],
                    env=_environment(),
                )
            finally:
                os.close(pipe)
        self._socket = ours
        ours.settimeout(self._deadline_s)
        with contextlib.suppress(OSError):  # a child that is gone already shows in `_ask`
            ours.sendall(frame({"sources": self._sources, "special_tokens": self._special_tokens}))

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


def _environment() -> dict[str, str]:
    ours = module_environment()
    return {"LC_ALL": "C.UTF-8"} | {name: ours[name] for name in _VARIABLES if name in ours}
