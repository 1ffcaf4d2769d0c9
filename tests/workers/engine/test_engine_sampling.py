"""What requests say of their tokens, in the engine: beside others, guessed at, and gone on with."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.workers.engine.engines import (
    PROMPTS,
    engine_of,
    expected,
    only,
    reference,
    request,
    run,
    tokens,
)
from tests.workers.grammar.byte_tokenizer import byte_tokenizer
from tests.workers.tiny_models import EOS_TOKEN_ID
from workers.messages import GrammarSpec

NUMBERS = GrammarSpec(kind="regex", source=r"[0-9]{2}(,[0-9]{2}){3}")
OBJECT = GrammarSpec(
    kind="json_schema",
    source=json.dumps(
        {
            "type": "object",
            "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return byte_tokenizer(path), path


def asked(name: str, grammar: GrammarSpec, **changes: Any) -> Any:
    sampling = {"max_tokens": 100, "ignore_eos": False, "grammar": grammar, **changes}
    return request(name, PROMPTS[1], **sampling)


def test_texts_match_their_grammars_beside_each_other(tokenizer: tuple[Tokenizer, Path]) -> None:
    made, path = tokenizer
    drawn: dict[str, Any] = {"temperature": 1.5, "seed": 8}
    requests = [
        asked("numbers", NUMBERS),
        asked("drawn", NUMBERS, **drawn),
        asked("object", OBJECT, **drawn),
        request("free", PROMPTS[3]),
    ]
    outputs = run(engine_of(tokenizer=path), *requests)
    assert tokens(outputs["free"]) == expected("llama")[3]
    for name in ("numbers", "drawn", "object"):
        ids = tokens(outputs[name])
        assert ids[-1] == EOS_TOKEN_ID
        assert outputs[name][-1].finish_reason == "stop"
        text = made.decode(ids[:-1], skip_special_tokens=False)
        if name == "object":
            assert json.loads(text)["a"] in (1, 22)
        else:
            assert re.fullmatch(NUMBERS.source, text)
    # Alone, guessed at, and on another instance from the middle on, it is the same.
    for one in requests[:3]:
        ids = tokens(outputs[one.request_id])
        guessing = engine_of(tokenizer=path, num_speculative_tokens=4)
        assert tokens(run(guessing, one)[one.request_id]) == ids
        sampling = one.sampling
        resumed = type(one)(
            request_id="a",
            token_ids=(*one.token_ids, *ids[:5]),
            sampling=sampling,
            num_generated=5,
        )
        assert tokens(run(engine_of(tokenizer=path), resumed)["a"]) == ids[5:]


def test_a_bad_grammar_is_refused_as_the_requests_fault(tokenizer: tuple[Tokenizer, Path]) -> None:
    engine = engine_of(tokenizer=tokenizer[1])
    bad = GrammarSpec(kind="regex", source="(")
    outputs = run(engine, asked("a", bad), asked("b", NUMBERS, allowed_token_ids=(3,)))
    for name, message in (("a", "unclosed group"), ("b", "no token to choose")):
        (output,) = outputs[name]
        assert (output.finish_reason, output.invalid) == ("error", True)
        assert message in output.error
    got, reason, error = only(engine_of(), asked("a", NUMBERS))
    assert (got, reason) == ([], "error")
    assert "no tokenizer" in error


def test_log_probabilities_are_those_of_transformers() -> None:
    ids, new = PROMPTS[4], expected("llama")[4]
    with torch.inference_mode():
        logits = reference("llama")(torch.tensor([ids + new])).logits[0].log_softmax(-1)
    found = run(
        engine_of(max_num_batched_tokens=7, num_speculative_tokens=3),
        request("a", ids, logprobs=2, prompt_logprobs=3),
        request("b", PROMPTS[3]),
    )["a"]
    of_prompt = [one for output in found for one in output.prompt_logprobs]
    of_answer = [one for output in found for one in output.logprobs]
    assert (len(of_prompt), len(of_answer)) == (len(ids) - 1, len(new))
    for position, (token, one) in enumerate(
        zip([*ids[1:], *new], [*of_prompt, *of_answer], strict=True)
    ):
        assert one.logprob == pytest.approx(float(logits[position, token]), abs=1e-3)
        assert one.top_ids[0] == int(logits[position].argmax())
    assert [one.rank for one in of_answer] == [1] * len(new)
    assert {len(one.top_ids) for one in of_prompt} == {3}
