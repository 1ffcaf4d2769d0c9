"""Chat templates as programs that may be wrong, slow or hostile."""

import datetime
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from allocator import ProcessState
from server.text.chat_template import Chat, ChatTemplate, TemplateFailed
from tests.leaks import wait_until

pytestmark = pytest.mark.slow

HI = [{"role": "user", "content": "hi"}]

Make = Callable[..., ChatTemplate]


@pytest.fixture
def template() -> Iterator[Make]:
    made: list[ChatTemplate] = []

    def make(source: str, deadline_s: float = 20.0, **special_tokens: str) -> ChatTemplate:
        made.append(ChatTemplate(source, special_tokens, deadline_s=deadline_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


def rendered(template: ChatTemplate, max_chars: int = 10_000) -> str:
    return template.render(Chat(HI), max_chars=max_chars)


def test_what_templates_expect_is_there(template: Make) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {%- generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}\n"
        "|{{ {'a': '<é>'} | tojson }}|{{ strftime_now('%Y') }}|{{ add_generation_prompt }}"
        "|{{ tools is none }}"
    )
    year = datetime.datetime.now().astimezone().year
    expected = f'<s>hi|{{"a": "<é>"}}|{year}|True|True'
    assert rendered(template(source, bos_token="<s>")) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{{ 'a' * 10**11 }}", "too much memory"),
        ("{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
         "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}", "too much memory"),
        ("{% for i in range(9999) %}xy{{ i }}{% endfor %}", "more than 10000 characters"),
        ("{{ 'x' * 20000 }}", "more than 10000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[7].content.upper() }}", "UndefinedError"),
    ],
)  # fmt: skip
def test_an_error_of_the_template_is_told(template: Make, source: str, message: str) -> None:
    broken = template(source)
    for _ in range(2):  # it answers the next request all the same
        with pytest.raises(TemplateFailed, match=message):
            rendered(broken)


def test_an_endless_template_ends_at_the_deadline_and_can_be_asked_again(template: Make) -> None:
    source = (
        "{% if messages[0].content == 'hi' %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}done"
    )
    endless = template(source, deadline_s=2.0)
    with pytest.raises(TemplateFailed, match="did not finish within 2 s"):
        rendered(endless)
    assert endless.render(Chat([{"role": "user", "content": "?"}]), max_chars=10) == "done"


def test_a_template_whose_process_is_gone_starts_another(template: Make) -> None:
    short = template("{{ messages[0].content }}")
    assert rendered(short) == "hi"
    child = short._child
    assert child is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert rendered(short) == "hi"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_what_others_do_to_its_process_is_no_error(template: Make, number: int) -> None:
    source = (
        "{% for i in range(9999 if messages[0].content == 'work' else 1) %}"
        "{% for j in range(999) %}{% endfor %}{% endfor %}x"
    )
    work = Chat([{"role": "user", "content": "work"}])
    slow = template(source, deadline_s=600.0)
    assert rendered(slow) == "x"
    child = slow._child
    assert child is not None
    before = ProcessState.of(child.pid)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(slow.render, work, max_chars=10)
        wait_until(lambda: ProcessState.of(child.pid) != before, "the template to be at work")
        os.kill(child.pid, number)
        assert running.result() == "x"
    assert slow._child is not child
    assert child.poll() is not None
    # And while it has nothing to do.
    child = slow._child
    assert child is not None
    os.kill(child.pid, number)
    assert rendered(slow) == "x"
    assert child.poll() is not None


def test_long_messages_to_a_stopped_process_pass(template: Make) -> None:
    echo = template("{{ messages[0].content }}")
    assert rendered(echo) == "hi"
    assert echo._child is not None
    os.kill(echo._child.pid, signal.SIGSTOP)
    content = "é" * 3_000_000
    messages = [{"role": "user", "content": content}]
    assert echo.render(Chat(messages), max_chars=len(content)) == content


def test_who_is_ended_again_and_again_is_given_up(template: Make) -> None:
    """It looks as if somebody else did it, and is not."""
    loops = "{% for _ in range(1000) %}" * 2 + "{% endfor %}" * 2  # longer than two kills are apart
    short = template(loops + "x")
    assert rendered(short) == "x"
    over = threading.Event()

    def kill_all() -> None:
        while not over.is_set():
            child = short._child
            if child is not None:
                child.kill()

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(TemplateFailed, match="ended: signal 9"):
            rendered(short)
    finally:
        over.set()
        killer.join()
    assert rendered(short) == "x"


def test_after_close_nothing_is_rendered_and_no_child_is_left(template: Make) -> None:
    short = template("x")
    child = short._child
    assert child is not None
    short.close()
    assert child.poll() is not None
    with pytest.raises(TemplateFailed, match="shutting down"):
        rendered(short)


def test_long_messages_pass(template: Make) -> None:
    content = "é" * 3_000_000
    echo = template("{{ messages[0].content }}")
    messages = [{"role": "user", "content": content}]
    assert echo.render(Chat(messages), max_chars=len(content)) == content
