"""The process in which a model's chat template runs: `python -m server.text.template_process PIPE`.

Reads frames (a length, then JSON) from its standard input, which is a socket, and answers on it: at
first the templates, then one chat after the other. Invariant: the kernel bounds it (address space,
no file writes), it dies with its server, and whatever a template raises is an answer. Knows nothing
of tokens and HTTP.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import jinja2
import jinja2.meta

from server.text.template_environment import template_environment
from server.text.template_forms import FormError, Forms
from server.text.template_wire import ADDRESS_SPACE_BYTES, HEADER_BYTES, frame

_F_SETSIG: Final = 10  # fcntl(2)
_CONTINUED: Final = "CONTINUED7QZ "
_MAX_PROBE_CHARS: Final = 1 << 20
_OF_EVERY_CHAT: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _Refused(Exception):
    """A request that the template can't answer, for the sake of one field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class _Broken(Exception):
    """What was given is no template."""


class Template:
    """One, compiled when it is first needed, and what was found out of it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = special_tokens

    @cached_property
    def _environment(self) -> jinja2.Environment:
        return template_environment()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """Raises `_Broken`."""
        try:
            return self._environment.from_string(self._source)
        except Exception as error:
            # Not syntax alone: what is nested too deeply is an error of recursion, or of memory.
            raise _Broken(f"{type(error).__name__}: {error}") from error

    @cached_property
    def _names(self) -> frozenset[str]:
        """The variables that it reads. Raises `_Broken`."""
        assert self._compiled  # noqa: S101 - else it can't be parsed either
        read = jinja2.meta.find_undeclared_variables(self._environment.parse(self._source))
        return frozenset(read)

    def _check_reads(self, name: str, param: str) -> None:
        """Raises `_Refused` where `name`, which a request sets by its `param`, is not read."""
        if name in self._names:
            return
        if name == param:
            raise _Refused(
                f"This model's chat template does not read {name!r}: it would be ignored. Omit it.",
                param,
            )
        known = {*self._environment.globals, *self._special_tokens, *_OF_EVERY_CHAT}
        own = ", ".join(sorted(self._names - known)) or "nothing"
        raise _Refused(
            f"This model's chat template does not read {name!r}, which {param!r} would set. Of "
            f"such variables it reads {own}. Correct the name, or omit it.",
            param,
        )

    @cached_property
    def _forms(self) -> Forms:
        return Forms(self._source, lambda messages: self._written(messages, _MAX_PROBE_CHARS))

    def rendered(self, request: Mapping[str, Any]) -> str:
        for name, param in request["needed"].items():
            self._check_reads(name, param)
        try:
            messages = self._forms.prepared(request["messages"])
        except FormError as error:
            raise _Refused(str(error), "messages") from error
        if request["continues_last"]:
            _mark_end(messages[-1])
        prompt = self._written(
            messages,
            request["max_chars"],
            tools=request["tools"],
            documents=request["documents"],
            add_generation_prompt=request["add_generation_prompt"],
            others=request["variables"],
        )
        _check_calls(messages, prompt)
        return _up_to_mark(prompt) if request["continues_last"] else prompt

    def _written(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_chars: int,
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = True,
        others: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """`others` are the request's own variables, by whatever names. Raises ValueError where it
        is longer."""
        parts, num_chars = [], 0
        given = {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        names = {**self._special_tokens, **given, **others, "messages": messages}
        for piece in self._compiled.generate(names):
            num_chars += len(piece)
            if num_chars > max_chars:
                raise ValueError(f"the prompt it makes has more than {max_chars} characters")
            parts.append(piece)
        return "".join(parts)


def _check_calls(messages: Sequence[Mapping[str, Any]], prompt: str) -> None:
    """Raises `_Refused` where a call of a tool is not in the prompt: templates that know of none
    drop it in silence."""
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") if isinstance(call, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and name not in prompt:
                raise _Refused(
                    f"The model's chat template does not write messages[{index}].tool_calls"
                    f"[{number}]: the call of {name[:80]!r} would be lost. Say it in the content.",
                    "messages",
                )


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUED
    elif content:
        *before, last = content
        message["content"] = [*before, {**last, "text": last["text"] + _CONTINUED}]
    else:
        raise _Refused("The last message has no content to continue.", "continue_final_message")


def _up_to_mark(prompt: str) -> str:
    begin = prompt.rfind(_CONTINUED.strip())
    if begin < 0:
        raise _Refused(
            "The model's chat template does not write the last message as it is, so it can't be "
            "continued. Omit 'continue_final_message'.",
            "continue_final_message",
        )
    is_as_it_was = prompt.startswith(_CONTINUED, begin)
    return prompt[:begin] if is_as_it_was else prompt[:begin].rstrip()


def _chosen(templates: Mapping[str, Template], request: Mapping[str, Any]) -> Template:
    """Of several the one for tools, where there are some, else the default one."""
    if request["tools"] is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise _Refused(
            f"The model has the chat templates {', '.join(sorted(templates))}, and none is the "
            "default one. Start the server with --chat-template FILE.",
            "messages",
        )
    return templates["default"]


def answered(templates: Mapping[str, Template], request: Mapping[str, Any]) -> dict[str, Any]:
    """What the process answers."""
    try:
        return {"text": _chosen(templates, request).rendered(request)}
    except MemoryError:
        return {"error": "the chat template used too much memory"}
    except _Refused as refused:
        return {"error": str(refused), "param": refused.param}
    except _Broken as error:
        return {"error": str(error)[:2000], "broken": True}
    except Exception as error:  # noqa: BLE001 - whatever a template raises is its answer
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def _serve(stream: Any) -> None:
    """Answers one request after the other until the parent is gone."""

    def receive() -> Any:
        header = stream.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            raise SystemExit(0)
        return json.loads(stream.read(int.from_bytes(header, "big")))

    setup = receive()
    templates = {
        name: Template(source, setup["special_tokens"]) for name, source in setup["sources"].items()
    }
    while True:
        request = receive()
        # Should the parent die meanwhile, nobody else ends a template that never does.
        signal.alarm(request["deadline_s"])
        answer = answered(templates, request)
        signal.alarm(0)
        stream.write(frame(answer))
        stream.flush()


def _die_with(pipe: int) -> None:
    """As `workers.process.linux.die_with`, which would bring much more along: be killed when the
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
