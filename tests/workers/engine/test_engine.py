"""Whole generations: against transformers, in company, resumed, aborted and refused.

Greedy comparisons across batches need the best token to be clearly the best: the tiny models'
logits are spread wide, and `test_the_models_leave_no_doubt` measures how far.
"""

from typing import Any

import pytest
import torch

from tests.quick import few_quick
from tests.workers.engine.engines import (
    NUM_NEW,
    PROMPTS,
    engine_of,
    expected,
    model_of,
    only,
    reference,
    request,
    run,
    tokens,
)
from tests.workers.tiny_models import (
    CONFIGS,
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    config_of,
    prompt,
    smallest_gap,
    tensors_of,
)
from workers.engine.generate import GenerationEngine
from workers.errors import DeviceLost
from workers.messages import Generate
from workers.model.decoder import build_model
from workers.placement.resident import Resident

# --- the same tokens as transformers


@pytest.mark.parametrize("family", CONFIGS)
def test_the_models_leave_no_doubt(family: str) -> None:
    for token_ids, new in zip(PROMPTS, expected(family), strict=True):
        with torch.inference_mode():
            logits = reference(family)(torch.tensor([token_ids + new])).logits
        assert smallest_gap(logits[0, len(token_ids) - 1 : -1]) > 1e-4
    assert max(len(set(new)) for new in expected(family)) > 3


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    for token_ids, new in zip(PROMPTS, expected(family), strict=True):
        assert only(engine_of(family), request("a", token_ids)) == (new, "length", "")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_bf16_tokens_of_a_request_alone_are_those_of_transformers(family: str) -> None:
    engine = GenerationEngine(model_of(family, torch.bfloat16), 128)
    for token_ids, new in zip(PROMPTS, expected(family, torch.bfloat16), strict=True):
        assert tokens(run(engine, request("a", token_ids))["a"]) == new


@pytest.mark.parametrize("family", CONFIGS)
def test_sequences_in_company_are_as_alone(family: str) -> None:
    engine = engine_of(family, max_num_batched_tokens=9, max_num_seqs=3)
    outputs = run(engine, *(request(str(i), one) for i, one in enumerate(PROMPTS)))
    assert [tokens(outputs[str(i)]) for i in range(len(PROMPTS))] == expected(family)


def test_sequences_that_come_and_go_are_as_alone() -> None:
    engine = engine_of("mistral", max_num_batched_tokens=6)
    got: dict[str, list[int]] = {}
    waiting = [request(str(index), one) for index, one in enumerate(PROMPTS)]
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop())
        for output in (*engine.step(), *engine.step()):
            got.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check()
    assert [got[str(index)] for index in range(len(PROMPTS))] == expected("mistral")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("max_num_batched_tokens", few_quick([*range(1, 14), 39, 40, 41]))
def test_any_chunk_size_gives_the_same_tokens(family: str, max_num_batched_tokens: int) -> None:
    engine = engine_of(family, max_num_batched_tokens=max_num_batched_tokens)
    for token_ids, new in list(zip(PROMPTS, expected(family), strict=True))[-2:]:
        assert tokens(run(engine, request("a", token_ids))["a"]) == new


# --- ends


def test_a_sequence_ends_with_its_end_token() -> None:
    new = expected("llama")[2]
    model = model_of("llama")
    ends = (new[4], VOCAB_SIZE - 1)
    tensors = tensors_of(reference("llama"))
    ending = build_model(config_of("llama"), Resident(tensors), torch.float32, ends)
    first = new.index(new[4]) + 1
    one = request("a", PROMPTS[2], ignore_eos=False)
    assert only(GenerationEngine(ending, 128), one) == (new[:first], "stop", "")
    assert only(GenerationEngine(ending, 128), request("a", PROMPTS[2])) == (new, "length", "")
    assert only(GenerationEngine(model, 128), request("a", PROMPTS[2])) == (new, "length", "")


def test_a_sequence_ends_with_a_stop_token_even_if_it_ignores_the_end() -> None:
    new = expected("llama")[2]
    one = request("a", PROMPTS[2], stop_token_ids=(EOS_TOKEN_ID, new[3]))
    assert only(engine_of(), one) == (new[: new.index(new[3]) + 1], "stop", "")


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_counts_generated_tokens(max_tokens: int) -> None:
    one = request("a", PROMPTS[1], max_tokens=max_tokens)
    assert only(engine_of(), one) == (expected("llama")[1][:max_tokens], "length", "")


def test_the_context_ends_a_sequence() -> None:
    room = 3
    engine = engine_of(max_model_len=len(PROMPTS[3]) + room)
    got = only(engine, request("a", PROMPTS[3]))
    assert got == (expected("llama")[3][:room], "length", "")


# --- going on where another instance ended


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.5, "seed": 11, "top_p": 0.95}])
@pytest.mark.parametrize("num_generated", [1, 7, NUM_NEW - 1])
def test_a_resumed_sequence_goes_on_as_if_nothing_had_been(
    num_generated: int, changes: dict[str, Any]
) -> None:
    whole = tokens(run(engine_of(), request("a", PROMPTS[3], **changes))["a"])
    assert len(whole) == NUM_NEW
    sent = whole[:num_generated]
    resumed = request("a", PROMPTS[3] + sent, num_generated, **changes)
    # In other company, and in other chunks.
    others = [request(str(seed), PROMPTS[4], seed=seed, temperature=1.0) for seed in range(2)]
    outputs = run(engine_of(max_num_batched_tokens=5), others[0], resumed, others[1])
    assert sent + tokens(outputs["a"]) == whole
    assert outputs["a"][-1].finish_reason == "length"


def test_what_was_finished_already_only_gets_its_reason() -> None:
    engine = engine_of(max_model_len=64)
    done = {
        "full": request("full", prompt(64), num_generated=3, max_tokens=10),
        "enough": request("enough", prompt(NUM_NEW + 4), num_generated=NUM_NEW),
        "ended": request("ended", [9, 8, EOS_TOKEN_ID], num_generated=1, ignore_eos=False),
    }
    outputs = run(engine, *done.values())
    got = {name: [(one.token_ids, one.finish_reason) for one in outputs[name]] for name in done}
    assert got == {"full": [((), "length")], "enough": [((), "length")], "ended": [((), "stop")]}
    # An end token in the prompt is nothing special.
    asked = request("a", [9, 8, EOS_TOKEN_ID], ignore_eos=False, max_tokens=2)
    assert len(tokens(run(engine, asked)["a"])) >= 1


def test_the_same_seed_gives_the_same_tokens_in_any_company() -> None:
    drawn: dict[str, Any] = {"temperature": 1.2, "top_k": 40, "seed": 5}
    alone = tokens(run(engine_of(), request("a", PROMPTS[1], **drawn))["a"])
    others = [request(str(index), one) for index, one in enumerate(PROMPTS)]
    outputs = run(engine_of(max_num_batched_tokens=7), *others, request("a", PROMPTS[1], **drawn))
    assert tokens(outputs["a"]) == alone
    assert alone != tokens(run(engine_of(), request("a", PROMPTS[1], **(drawn | {"seed": 6})))["a"])


# --- aborts


def test_an_abort_frees_memory_at_once() -> None:
    engine = engine_of(max_num_seqs=2)
    for index, one in enumerate(PROMPTS):
        engine.add(request(str(index), one))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 3)
    held = engine.kv_bytes
    assert held == 2 * model_of("llama").geometry.kv_layout.block_bytes
    engine.abort("1")
    engine.abort("4")
    engine.abort("unknown")
    engine.check()
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    outputs = run(engine)
    assert outputs.keys() == {"0", "2", "3"}
    assert tokens(outputs["2"]) == expected("llama")[2]


def test_an_aborted_request_is_answered_by_nothing_even_if_it_was_refused() -> None:
    engine = engine_of()
    engine.add(request("a", []))
    engine.add(request("b", []))
    engine.abort("a")
    assert run(engine).keys() == {"b"}


# --- what can't be served


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (request("a", []), "prompt is empty"),
        (request("a", [4, 5], num_generated=2), "prompt is empty"),
        (request("a", prompt(64)), "the prompt has 64 tokens; at most 63 fit"),
        (request("a", prompt(70), num_generated=3), "the prompt has 67 tokens"),
        (request("a", [4, VOCAB_SIZE]), f"token id {VOCAB_SIZE} is outside"),
    ],
)
def test_impossible_requests_are_answered(one: Generate, message: str) -> None:
    engine = engine_of(max_model_len=64)
    got, reason, error = only(engine, one)
    assert (got, reason) == ([], "error")
    assert message in error
    assert tokens(run(engine, request("a", PROMPTS[1]))["a"]) == expected("llama")[1]


def test_an_id_used_twice_ends_both() -> None:
    engine = engine_of()
    engine.add(request("a", PROMPTS[1]))
    engine.step()
    (output,) = run(engine, request("a", PROMPTS[2]))["a"]
    assert output.finish_reason == "error"
    assert "in use" in output.error


def test_bad_logits_end_one_sequence_only() -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(reference("llama")).items()}
    poison = 300
    tensors["model.embed_tokens.weight"][poison] = float("nan")
    engine = GenerationEngine(
        build_model(config_of("llama"), Resident(tensors), torch.float32), 128
    )
    token_ids = [token if token != poison else 5 for token in PROMPTS[2]]
    alone = tokens(run(engine, request("a", token_ids, max_tokens=4))["a"])
    outputs = run(
        engine,
        request("a", token_ids, max_tokens=4),
        request("b", [4, poison, 5]),
        request("c", token_ids, max_tokens=4),
    )
    assert outputs["b"][-1].finish_reason == "error"
    assert "not finite" in outputs["b"][-1].error
    assert tokens(outputs["a"]) == tokens(outputs["c"]) == alone


def test_a_failed_pass_ends_the_sequence_that_fails_alone() -> None:
    model = build_model(config_of("llama"), Resident(tensors_of(reference("llama"))), torch.float32)

    met = {token for one in (*PROMPTS, *expected("llama")) for token in one}
    poison = next(token for token in range(4, VOCAB_SIZE) if token not in met)

    def refuse(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if bool((arguments[0] == poison).any()):
            raise RuntimeError("out of patience" + "!" * 10_000)

    model.module.get_input_embeddings().register_forward_pre_hook(refuse)  # type: ignore[operator]
    engine = GenerationEngine(model, 128)
    others = [request(str(index), one) for index, one in enumerate(PROMPTS)]
    outputs = run(engine, *others[:2], request("bad", [4, poison, 5]), *others[2:])
    error = outputs["bad"][-1].error
    assert error.startswith("the forward pass failed: out of patience!")
    assert len(error) == 4096  # what a message on the wire may hold
    assert [tokens(outputs[one.request_id]) for one in others] == expected("llama")


def test_a_failed_pass_on_a_device_that_is_lost_ends_the_engine() -> None:
    """Its requests are not answered: they go on in another instance."""
    model = build_model(config_of("llama"), Resident(tensors_of(reference("llama"))), torch.float32)
    faults = iter([None, "illegal address"])

    def refuse(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if bool((arguments[0] == 300).any()):
            raise RuntimeError("out of patience")

    model.module.get_input_embeddings().register_forward_pre_hook(refuse)  # type: ignore[operator]
    engine = GenerationEngine(model, 128, device_fault=lambda: next(faults))
    assert tokens(run(engine, request("a", PROMPTS[1]))["a"]) == expected("llama")[1]
    assert "out of patience" in run(engine, request("b", [4, 300]))["b"][-1].error
    engine.add(request("c", [4, 300]))
    with pytest.raises(DeviceLost, match="illegal address") as lost:
        engine.step()
    assert not isinstance(lost.value, Exception)
    assert isinstance(lost.value.__cause__, RuntimeError)


def test_settings_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="2 to 256"):
        engine_of(max_model_len=257)
    with pytest.raises(ValueError, match="at least 1"):
        engine_of(max_num_seqs=0)
