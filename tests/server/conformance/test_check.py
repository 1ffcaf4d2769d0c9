"""`onecopy check`: what is the same is found to be, and what differs is found and shown."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.conformance import transformers_text
from server.conformance.check import Checked, chats_part, check, computed_part, tokens_part
from server.conformance.differences import ExpectedPrompt, Part, compared_ids, expected_prompt
from server.conformance.samples import CHATS, NUM_NEW, PROMPTS, TEXTS
from server.models.source import find_model
from server.text.given import GivenText
from server.text.loaded_text import KeptTokenizer, LoadedText
from tests.here import run_here
from tests.quick import long_run
from tests.server.text.gguf.corpus import trained
from tests.server.text.gguf.record import NUM_TOKENS, metadata_of, write_file
from tests.system.running_server import onecopy_here
from tests.workers.tiny_models import write_checkpoint, write_tokenizer
from workers import ReferenceMissing

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def model(folder: Path, template: str = TEMPLATE) -> Path:
    """A tiny Llama with a tokenizer of bytes and a template."""
    write_tokenizer(write_checkpoint(folder, "llama"))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def llamacpp_python() -> str:
    """The interpreter that has llama.cpp: named in the environment, or the tests' own."""
    if named := os.environ.get("ONECOPY_LLAMACPP_PYTHON"):
        return named
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed, and ONECOPY_LLAMACPP_PYTHON names no interpreter")
    return sys.executable


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def other(tiny: Path, tmp_path: Path) -> Path:
    """A copy, for a test to change."""
    return Path(shutil.copytree(tiny, tmp_path / "other"))


@pytest.fixture
def text_of() -> Iterator[Any]:
    """What a server would load of a folder."""
    opened: list[LoadedText] = []

    def load(folder: Path, chat_template: Path | None = None) -> LoadedText:
        opened.append(LoadedText.of(KeptTokenizer.of(folder, GivenText(chat_template))))
        return opened[-1]

    yield load
    for one in opened:
        one.close()


@pytest.fixture
def transformers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that asks transformers runs in this process, which has imported it already."""

    def ask(name: str, _python: str, request: Mapping[str, Any]) -> Any:
        assert name == "transformers"
        answered = run_here(transformers_text.main, reads=json.dumps(request))
        assert answered.returncode == 0
        return json.loads(answered.stdout)

    monkeypatch.setattr("server.conformance.check.ask", ask)


def counts(part: Part) -> tuple[int, int, int, int]:
    return part.num_compared, part.num_same, part.num_near, len(part.differences)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "server.cli", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


# --- what is the same


def test_a_model_is_that_of_transformers(tiny: Path) -> None:
    told: list[str] = []
    found = check(Checked(find_model(str(tiny))), told.append)
    assert found.same
    assert found.against == "transformers"
    tokens, chats, greedy = found.parts
    num_special = 4  # each in two texts
    assert counts(tokens) == (2 * (len(TEXTS) + 2 * num_special),) * 2 + (0, 0)
    assert counts(chats) == (len(CHATS), len(CHATS), 0, 0)
    assert greedy.num_compared == len(PROMPTS) * NUM_NEW == greedy.num_same + greedy.num_near
    assert all(part.reference.startswith("transformers 5.") for part in found.parts)
    assert len(told) == 4


def test_so_it_is_in_fewer_bits_up_to_ties(tiny: Path, text_of: Any) -> None:
    part = computed_part(Checked(find_model(str(tiny)), dtype="bfloat16"), text_of(tiny).text)
    assert part.holds, part
    assert "ours in bfloat16" in part.note


@long_run
def test_the_demo_model_is_that_of_transformers(smollm2_by_transformers: Path) -> None:
    found = check(Checked(find_model(str(smollm2_by_transformers))))
    assert found.same, found.model_dump_json(indent=1)
    assert found.parts[2].num_same == len(PROMPTS) * NUM_NEW


def test_the_demo_model_is_that_of_llamacpp() -> None:
    found = check(Checked(find_model("demo"), python=llamacpp_python()))
    assert found.same, found.model_dump_json(indent=1)
    assert found.against == "llama.cpp"
    assert found.parts[0].num_same == found.parts[0].num_compared > 2 * len(TEXTS)
    assert found.parts[2].num_same > 0.9 * found.parts[2].num_compared


@pytest.mark.usefixtures("transformers_here")
def test_a_template_that_refuses_is_the_same_where_both_refuse(other: Path, text_of: Any) -> None:
    (other / "chat_template.jinja").write_text(NO_SYSTEM + TEMPLATE)
    part = chats_part(Checked(find_model(str(other))), text_of(other))
    assert counts(part) == (len(CHATS), len(CHATS), 0, 0)


@pytest.mark.usefixtures("transformers_here")
def test_a_template_that_reads_parts_alone_is_asked_for_parts(other: Path, text_of: Any) -> None:
    (other / "chat_template.jinja").write_text(
        TEMPLATE.replace("{{ message.content }}", "{{ message.content[0].text }}")
    )
    part = chats_part(Checked(find_model(str(other))), text_of(other))
    assert counts(part) == (len(CHATS), len(CHATS), 0, 0)


@pytest.mark.usefixtures("transformers_here")
def test_a_model_without_a_template_has_no_chats_to_compare(other: Path, text_of: Any) -> None:
    (other / "chat_template.jinja").unlink()
    part = chats_part(Checked(find_model(str(other))), text_of(other))
    assert part.skipped == "the model has no chat template"
    assert part.holds


def test_a_model_that_embeds_has_no_tokens_to_compare(other: Path, text_of: Any) -> None:
    step = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
    (other / "modules.json").write_text(json.dumps([step]))
    part = computed_part(Checked(find_model(str(other))), text_of(other).text)
    assert part.skipped == "it embeds texts, and generates none"
    assert part.holds


@pytest.mark.usefixtures("transformers_here")
def test_a_given_template_is_compared_in_place_of_the_models(
    other: Path, tmp_path: Path, text_of: Any
) -> None:
    (other / "chat_template.jinja").write_text("nothing")
    (given := tmp_path / "given.jinja").write_text(TEMPLATE)
    checked = Checked(find_model(str(other)), given=GivenText(given))
    part = chats_part(checked, text_of(other, given))
    assert counts(part) == (len(CHATS), len(CHATS), 0, 0)


# --- what differs


@pytest.mark.usefixtures("transformers_here")
def test_another_tokenizer_is_found(tiny: Path, other: Path, text_of: Any) -> None:
    """Ours, that is, of a folder that is not the one that the reference reads."""
    file = other / "tokenizer.json"
    said = json.loads(file.read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(said))
    part = tokens_part(Checked(find_model(str(tiny))), text_of(other).text)
    with_digits = [text for text in TEXTS if "1" in text or "2" in text]
    assert [one.sample for one in part.differences] == with_digits * 2
    assert part.num_same == part.num_compared - 2 * len(with_digits)
    assert not part.holds
    first = next(one for one in part.differences if one.sample == "123")
    assert first.at == 0
    assert first.ours[2] == first.theirs[2]


@pytest.mark.usefixtures("transformers_here")
def test_one_blank_of_a_template_is_found(tiny: Path, other: Path, text_of: Any) -> None:
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("[assistant]", "[assistant] "))
    part = chats_part(Checked(find_model(str(tiny))), text_of(other))
    prompted = [chat.name for chat in CHATS if chat.add_generation_prompt]
    assert [one.sample for one in part.differences] == prompted
    assert all(one.at == len(one.theirs) for one in part.differences)


@pytest.mark.usefixtures("transformers_here")
def test_a_chat_that_only_one_refuses_is_found(tiny: Path, other: Path, text_of: Any) -> None:
    (other / "chat_template.jinja").write_text(NO_SYSTEM + TEMPLATE)
    part = chats_part(Checked(find_model(str(tiny))), text_of(other))
    assert [one.sample for one in part.differences] == [
        chat.name for chat in CHATS if chat.messages[0]["role"] == "system"
    ]
    assert {one.ours for one in part.differences} == {"refused"}


def test_what_transformers_cuts_otherwise_than_a_gguf_file_says_is_found(tmp_path: Path) -> None:
    """It builds tokenizers by architecture, and this one without composing characters."""
    vocabularies = {name: trained(name == "bytes", count) for name, count in NUM_TOKENS.items()}
    file = write_file(tmp_path / "qwen.gguf", metadata_of("qwen2", vocabularies))
    ended = run(
        *(str(file), "--against", "transformers", "--tokens-only", "--json"),
        ONECOPY_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert ended.returncode == 1, ended.stderr
    found = json.loads(ended.stdout)
    assert not found["same"]
    tokens, chats = found["parts"]
    decomposed = [text for text in TEXTS if "cafe\u0301" in text]
    assert decomposed
    assert {*decomposed} <= {one["sample"] for one in tokens["differences"]}
    assert "by architecture" in tokens["note"]
    assert chats["skipped"]


# --- how it is told


def test_the_command_shows_a_table(tiny: Path) -> None:
    ended = run(str(tiny), "--tokens-only")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "tiny, as here and as by transformers"
    assert lines[-1] == "Same."
    assert any(line.split()[:6] == ["chats,", "as", "prompts", "9", "9", "0"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--against", "llama.cpp"], "llama.cpp reads GGUF files alone"),
        (["--reference-python", "/nowhere/python"], "/nowhere/python can't be run"),
        (["--dtype", "int3"], "--dtype is 'int3': it is one of"),
        (["--chat-template", "/nowhere/file"], "There is no file /nowhere/file"),
    ],
)
def test_what_can_not_be_compared_is_one_line(tiny: Path, arguments: list[str], told: str) -> None:
    ended = onecopy_here("check", str(tiny), *arguments)
    assert ended.status == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("onecopy: ")
    assert ended.stderr.count("\n") == 1
    assert told in ended.stderr


def test_a_library_that_is_not_installed_is_named(smollm2_gguf: Path) -> None:
    """By an interpreter that has no packages at all."""
    bare = shutil.which("python3", path="/usr/local/bin:/usr/bin") or sys.base_prefix
    with pytest.raises(ReferenceMissing, match=r"pip install xllamacpp.*--reference-python"):
        check(Checked(find_model(str(smollm2_gguf)), python=bare, computes=False))


@pytest.mark.usefixtures("transformers_here")
def test_a_model_that_can_not_be_computed_is_no_agreement(other: Path) -> None:
    (other / "model.safetensors").write_bytes(b"damaged")
    found = check(Checked(find_model(str(other))))
    assert found.parts[0].holds
    assert found.parts[2].failed
    assert not found.same


# --- the judgement


def test_what_is_not_composed_is_near_where_only_that_is_the_difference() -> None:
    decomposed = "e\u0301"
    near: Mapping[str, tuple[list[int], list[int]]] = {decomposed: ([7], [7])}
    assert compared_ids([decomposed], [[7]], [[8, 9]], near) == (1, [])
    for pair in (([7], [8]), ([8], [8])):
        count, [found] = compared_ids([decomposed], [[7]], [[8, 9]], {decomposed: pair})
        assert (count, found.at) == (0, 0)
    assert compared_ids(["a"], [[7]], [[7, 9]], near)[1][0].at == 1


def test_the_form_that_loses_nothing_is_expected() -> None:
    lost, notation, whole = {"text": "[]"}, {"text": "[{'type': 'text', 'text': 'a'}]"}, "[a]"
    forms = [{"error": "no"}, lost, notation, {"text": whole}, {"text": "[a] more"}]
    assert expected_prompt(forms, ["a"]) == ExpectedPrompt(whole, ("a",))
    assert expected_prompt([lost], ["a"]) == ExpectedPrompt("[]", ("a",))
    assert expected_prompt([{"error": "no"}], ["a"]) == ExpectedPrompt(None, ("a",))


def test_what_is_lost_there_may_be_refused_here_or_kept() -> None:
    whole, lost = ExpectedPrompt("[a]", ("a",)), ExpectedPrompt("[]", ("a",))
    assert (whole.is_whole, lost.is_whole) == (True, False)
    assert [whole.agrees(ours) for ours in ("[a]", "a", None)] == [True, False, False]
    assert [lost.agrees(ours) for ours in ("[]", "[a]", None, "[b]")] == [True, True, True, False]
