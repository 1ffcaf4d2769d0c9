"""In which form a template reads what messages hold: found out by trying.

OpenAI's API lets a client say the same thing in several ways: a text as a string or as a list of
parts, a tool call's arguments as JSON text, nothing as null. A template was written for one or two
of them, and drops the others in silence, or writes Python's notation into the prompt. Owns the
choice. Invariants: what a template reads as it came is left as it came, so that the prompt is what
transformers makes of it; otherwise it takes the form that the template reads; nothing is lost. What
is chosen depends on the template alone. Knows no Jinja: it is given a function that renders.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

Message = dict[str, Any]
ContentForm = Literal["text", "part", "parts"]
"""A string; a list of one part; of several."""
ArgumentsForm = Literal["text", "object"]

_MARKS: Final = ("one7qz", "two7qz")
_NAME: Final = "name7qz"
_CALL_ID: Final = "call7qz00"  # nine letters and digits: Mistral's templates take no others
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called, the name that most templates read first."""


_NOTHING_SAID: Final[tuple[Message, ...]] = (
    {},
    {"content": None},
    {"content": ""},
    {"content": [{"type": "text", "text": ""}]},
)
_NULLS: Final = ("None", "null")
"""What is written of a content that is none."""
_NO_ARGUMENTS: Final[tuple[Any, ...]] = ({}, "{}")


class FormError(Exception):
    """A message can't be brought into the form that the template reads."""


class Forms:
    """Of one template."""

    def __init__(self, source: str, render: Callable[[Sequence[Message]], str]) -> None:
        """`render` may raise whatever the template does."""
        self._knows_developers = any(name in source for name in ("'developer'", '"developer"'))
        self._render = render
        self._reads: dict[tuple[str, str], bool] = {}

    def prepared(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """As the template reads them. Raises `FormError`."""
        return [self._prepared(message, index) for index, message in enumerate(messages)]

    def _prepared(self, given: Mapping[str, Any], index: int) -> Message:
        message = {name: value for name, value in given.items() if value is not None}
        if message["role"] == "developer" and not self._knows_developers:
            message["role"] = "system"  # the older name
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        calls = message.get("tool_calls")
        if "content" in message:
            message["content"] = self._content(message["role"], message["content"])
        else:
            message |= self._no_content(bool(calls))
        if calls:
            message["tool_calls"] = [
                self._call(call, f"messages[{index}].tool_calls[{number}]")
                for number, call in enumerate(calls)
            ]
        return message

    # --- content

    def _content(self, role: str, content: str | Sequence[Mapping[str, Any]]) -> Any:
        if isinstance(content, str):
            as_part = [{"type": "text", "text": content}]
            return content if self._reads_content(role, "text", "part") != "part" else as_part
        if len(content) > 1 and self._reads_content(role, "parts"):
            return content
        text = "\n".join(part["text"] for part in content)
        if len(content) == 1 and self._reads_content(role, "part"):
            return content
        is_part = self._reads_content(role, "text", "part") == "part"
        return [{"type": "text", "text": text}] if is_part else text

    def _reads_content(self, role: str, *forms: ContentForm) -> ContentForm | None:
        """The first of the forms that it reads."""
        return next((form for form in forms if self._tried(role, form)), None)

    def _tried(self, role: str, form: ContentForm) -> bool:
        key = (role, form)
        if key not in self._reads:
            marks = _MARKS if form == "parts" else _MARKS[:1]
            parts = [{"type": "text", "text": mark} for mark in marks]
            content = marks[0] if form == "text" else parts
            prompts = self._prompts(self._chats_with(role, content))
            shown = [prompt for prompt in prompts if all(mark in prompt for mark in marks)]
            # In one place it may be read, and in another be written as it is.
            notation = any(_shows_notation(prompt, marks[0]) for prompt in shown)
            self._reads[key] = bool(shown) and not notation
        return self._reads[key]

    def _chats_with(self, role: str, content: Any) -> Iterator[list[Message]]:
        """Some in which a message of that role may stand, since many templates are particular."""
        one = {"role": role, "content": content}
        if role == "user":
            yield [one]
            yield [_said("system"), one]
            yield [_said("user"), _said("assistant"), one]
            return
        user = _said("user")
        if self._reads_content("user", "text", "part") == "part":
            user = _said("user", [{"type": "text", "text": "x"}])
        if role == "assistant":
            yield [user, one, user]
            yield [user, one]
        elif role == "tool":
            one |= {"name": _NAME, "tool_call_id": _CALL_ID}
            for arguments, said in itertools.product(_NO_ARGUMENTS, _NOTHING_SAID):
                call = {**_calling(arguments), **said}
                yield [user, call, one]
                yield [user, call, one, _said("assistant"), user]
        else:
            yield [one, user]
            yield [one, user, _said("assistant"), user]
            yield [user, one]

    # --- tool calls

    def _call(self, call: Any, where: str) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        arguments = function["arguments"]
        form: ArgumentsForm = "text" if isinstance(arguments, str) else "object"
        other: ArgumentsForm = "object" if form == "text" else "text"
        if not self._reads_arguments(form) and self._reads_arguments(other):
            arguments = _parsed(arguments, where) if form == "text" else _written(arguments)
        return {**call, "function": {**function, "arguments": arguments}}

    def _reads_arguments(self, form: ArgumentsForm) -> bool:
        key = ("arguments", form)
        if key not in self._reads:
            given: Any = {_MARKS[0]: _MARKS[1]}
            arguments = given if form == "object" else json.dumps(given)
            shows_other = f"'{_MARKS[0]}'" if form == "object" else f'\\"{_MARKS[0]}'
            self._reads[key] = any(
                all(mark in prompt for mark in _MARKS) and shows_other not in prompt
                for said in _NOTHING_SAID
                for prompt in self._prompts(_chats_with_call({**_calling(arguments), **said}))
            )
        return self._reads[key]

    def _no_content(self, calls: bool) -> Message:
        """What a message that calls tools, or thinks, and says nothing holds: no content, as
        transformers has it, unless the template fails for want of one, or does not write calls."""
        wanted = _NAME if calls else ""
        for mark in (wanted, ""):
            for content in _NOTHING_SAID:
                key = (f"no content, {calls}, {mark}", json.dumps(content))
                if key not in self._reads:
                    self._reads[key] = any(
                        mark in prompt and not any(null in prompt for null in _NULLS)
                        for prompt in self._prompts(self._chats_without_content(calls, content))
                    )
                if self._reads[key]:
                    return content
        return {}

    def _chats_without_content(self, calls: bool, content: Message) -> Iterator[list[Message]]:
        if calls:
            arguments: Any = {} if self._reads_arguments("object") else "{}"
            yield from _chats_with_call({**_calling(arguments), **content})
        else:
            thought = {"role": "assistant", **dict.fromkeys(_REASONING, "x"), **content}
            yield from ([user, thought, user] for user in _users())

    def _prompts(self, chats: Iterator[list[Message]]) -> Iterator[str]:
        """Of those that the template takes."""
        for chat in chats:
            try:
                yield self._render(chat)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001, S112 - whatever a template raises: it does not read it
                continue


def _said(role: str, content: Any = "x") -> Message:
    return {"role": role, "content": content}


def _users() -> Iterator[Message]:
    yield _said("user")
    yield _said("user", [{"type": "text", "text": "x"}])


def _calling(arguments: Any) -> Message:
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _chats_with_call(call: Message) -> Iterator[list[Message]]:
    answer = {"role": "tool", "name": _NAME, "tool_call_id": _CALL_ID, "content": "x"}
    for user in _users():
        yield [user, call, answer]
        yield [user, call, answer, _said("assistant"), user]


def _shows_notation(prompt: str, mark: str) -> bool:
    """Whether a list of parts was written as Python or JSON writes it."""
    before = prompt[: prompt.find(mark)].rstrip("'\"").rstrip()
    return before.endswith(("'text':", '"text":'))


def _parsed(arguments: str, where: str) -> Any:
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FormError(
            f"{where}.function.arguments is not the text of a JSON object, which the model's "
            "template needs."
        )
    return value


def _written(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)
