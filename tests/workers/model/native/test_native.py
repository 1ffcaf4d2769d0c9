"""The native decoder against transformers, against itself cut up in other ways, and against misuse.

What bf16 rounding may do is measured, not guessed: the same weights in fp32 tell how far
transformers' own bf16 logits are off, and the native ones may not be off further.
"""

import contextlib
import copy
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.quick import LONG
from tests.workers.conftest import EMULATED
from tests.workers.model.tiny_families import tiny_model
from tests.workers.tiny_models import CONFIGS, VOCAB_SIZE, prompt, reference_model
from workers.checkpoint import open_checkpoint
from workers.kv.layout import KVLayer, KVLayout
from workers.model.native.architecture import NotNative
from workers.model.native.decoder import NativeDecoder, supports

pytestmark = pytest.mark.usefixtures("kernels")

SIZES: dict[str, Any] = {"head_dim": 32, "hidden_size": 96, "intermediate_size": 160}
ODD: dict[str, Any] = {"head_dim": 20, "hidden_size": 100, "intermediate_size": 77}
"""No multiple of anything that a register holds."""
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 3, "moe_intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"num_key_value_heads": 4},
    "llama-rope-scaled": {"attention_bias": True, "mlp_bias": True, **ODD},
    "mistral": {"num_attention_heads": 20, "num_key_value_heads": 1},
    "qwen2": {"head_dim": 128},
    "qwen2-sliding": {"num_attention_heads": 20, "num_key_value_heads": 20},
    "qwen3": {"head_dim": 64, "num_attention_heads": 6},
    "qwen3_moe": {"num_experts": 12, **EXPERTS},
    "qwen3_moe odd": {"num_experts": 7, **EXPERTS, "hidden_size": 104, "moe_intermediate_size": 40},
    "mixtral": {"num_local_experts": 5},
    "gemma": {"head_dim": 80},
    "gemma2": {"query_pre_attn_scalar": 256, "head_dim": 256},
    "gemma3": {"query_pre_attn_scalar": 32, "vocab_size": VOCAB_SIZE + 7},
    "gemma3 odd": {"query_pre_attn_scalar": 32, **ODD},
    "phi3": {},
    "phi3 odd": ODD,
    "olmo2": {"attention_bias": True},
    "olmo2 odd": ODD,
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"use_bias": True},
    "starcoder2 odd": {**ODD, "use_bias": True},
    "phi": {"partial_rotary_factor": 0.5},
    "phi odd": {"partial_rotary_factor": 0.4, "hidden_size": 80, "intermediate_size": 77},
    "gpt_neox": {"rotary_pct": 0.25, "head_dim": None},
    "gpt_neox one by one": {"rotary_pct": 1.0, "use_parallel_residual": False, "head_dim": None},
    "gpt_neox odd": {"hidden_size": 80, "intermediate_size": 77, "head_dim": None},
    "cohere": {"logit_scale": 0.5},
    "cohere odd": {"logit_scale": 0.25, "hidden_size": 80, "head_dim": 20},
}
MAX_MODEL_LEN = 1280


@cache
def model_of(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    changes = {**SIZES, "max_position_embeddings": MAX_MODEL_LEN, **FAMILIES[family]}
    name = family.partition(" ")[0]
    if name in CONFIGS:
        return reference_model(name, dtype, **changes)
    model = tiny_model(name, **changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@cache
def in_fp32(family: str) -> Any:
    """The same weights, computed in fp32."""
    model = model_of(family, torch.float32)
    rounded = dict(model_of(family).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = rounded[name].data.float()
    return model


def kv_layers(module: Any) -> tuple[KVLayer, ...]:
    """As workers.model.decoder finds them."""
    config = module.config
    attentions = [part for part in module.modules() if hasattr(part, "is_causal")]
    head_dim = getattr(attentions[0], "head_dim", None) or attentions[0].head_size
    groups = getattr(attentions[0], "num_key_value_groups", 1)
    return (KVLayer(config.num_attention_heads // groups, head_dim),) * config.num_hidden_layers


class Blocks:
    """Private memory for blocks in shuffled order, filled with NaN."""

    def __init__(self, module: Any, num_blocks: int = 400, block_size: int = 16) -> None:
        self.layout = KVLayout(kv_layers(module), torch.bfloat16, block_size)
        elements = num_blocks * self.layout.block_bytes // 2 + 32
        self._memory = torch.full((elements,), float("nan"), dtype=torch.bfloat16)
        base = -(-self._memory.data_ptr() // 64) * 64
        order = np.random.default_rng(3).permutation(num_blocks)
        self._free = list(base + order * self.layout.block_bytes)

    def table(self, num_tokens: int, width: int = 96) -> Any:
        """Addresses of as many blocks as the tokens need, then zeros."""
        table = np.zeros(width, np.int64)
        for index in range(self.layout.num_blocks(num_tokens)):
            table[index] = self._free.pop()
        return table


class Sequences:
    """Some sequences on one decoder, each with a block table, computed in any pieces."""

    def __init__(self, module: Any, num_threads: int = 2, max_rows: int = 512, **blocks: int):
        self.blocks = Blocks(module, **blocks)
        self.decoder = NativeDecoder(
            module, self.blocks.layout, max_rows, MAX_MODEL_LEN, num_threads
        )
        self.tables: list[Any] = []

    def add(self, num_tokens: int) -> int:
        self.tables.append(self.blocks.table(num_tokens))
        return len(self.tables) - 1

    def compute(
        self, *parts: tuple[int, int, Sequence[int]], num_threads: int | None = None
    ) -> torch.Tensor:
        """Logits of all rows; a part is a sequence, its next position, and tokens."""
        ids = [token for _, _, tokens in parts for token in tokens]
        positions = [start + i for _, start, tokens in parts for i in range(len(tokens))]
        tables = [sequence for sequence, _, tokens in parts for _ in tokens]
        logits = torch.full((len(ids), self.decoder.vocab_size), float("nan"))
        self.decoder.forward(
            int32(ids),
            int32(positions),
            int32(tables),
            np.stack(self.tables),
            np.arange(len(ids), dtype=np.int32),
            logits,
            num_threads,
        )
        return logits


def int32(values: Sequence[int]) -> Any:
    return np.array(values, np.int32)


def alone(module: Any, token_ids: Sequence[int], **settings: int) -> torch.Tensor:
    """Logits of every row, all rows in one call."""
    sequences = Sequences(module, **settings)
    return sequences.compute((sequences.add(len(token_ids)), 0, token_ids))


def logits_of(module: Any, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = module(torch.tensor([token_ids])).logits[0].float()
    return logits


def typical(errors: torch.Tensor) -> float:
    """The root mean square of the median row: a few tokens blow any rounding up a hundredfold."""
    return float(errors.square().mean(-1).sqrt().median())


def assert_as_good(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """`ours` is about as far from `exact` as `theirs`. Where the greedy choices differ, the logits
    of the two tokens are no further apart than twice what rounding moved a logit of `theirs`."""
    assert typical(ours - exact) <= 1.3 * typical(theirs - exact)
    moved = (theirs - exact).abs().max(-1).values
    chosen = theirs.gather(1, ours.argmax(-1, keepdim=True))[:, 0]
    assert bool((theirs.max(-1).values - chosen <= 2 * moved).all())


# --- the same numbers as transformers


@cache
def theirs_and_exact(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `prompt(77)`, for all sets of kernels."""
    token_ids = prompt(77)
    return logits_of(model_of(family), token_ids), logits_of(in_fp32(family), token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_good_as_those_of_transformers(family: str) -> None:
    module = model_of(family)
    assert supports(module, torch.bfloat16) is None
    assert_as_good(alone(module, prompt(77)), *theirs_and_exact(family))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Any:
    checkpoint = open_checkpoint(smollm2_gguf, "bfloat16")
    config = json.loads(checkpoint.metadata()["config"])
    module = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(config), dtype=torch.bfloat16
    )
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for tensor in checkpoint.tensors():
            checkpoint.copy_into(tensor.name, parameters[tensor.name].data, lambda _: None)
    return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class Continued:
    """What transformers makes of some texts, in bf16, and the exact logits of that."""

    texts: list[list[int]]
    theirs: torch.Tensor
    exact: torch.Tensor


@pytest.fixture(scope="module")
def continued(smollm2: Any) -> Continued:
    """The same for all sets of kernels."""
    texts = [
        [504, 3575, 282, 4649, 314, 7042, 30, 657, 314, 260, 3575, 282, 260, 2784, 281, 2753],
        [19556, 28, 905, 314, 1194, 1028, 1535, 30],
        [1604, 597, 260, 1848, 28, 338],
        [504, 808, 282, 260, 4095],
    ]
    with torch.inference_mode():
        greedily: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
        whole = [smollm2.generate(torch.tensor([t]), **greedily)[0].tolist() for t in texts]
    theirs = torch.cat([logits_of(smollm2, text) for text in whole])
    smollm2.float()
    exact = torch.cat([logits_of(smollm2, text) for text in whole])
    smollm2.bfloat16()
    return Continued(whole, theirs, exact)


@pytest.mark.this_process  # minutes where each instruction is emulated
def test_a_real_model_continues_a_text_as_transformers_does(
    kernels: str, smollm2: Any, continued: Continued
) -> None:
    if kernels == EMULATED and not LONG:
        pytest.skip("tiles in plain C++ take as long as all other sets: in the long run")
    ours = torch.cat([alone(smollm2, text) for text in continued.texts])
    assert_as_good(ours, continued.theirs, continued.exact)
    agree = (ours.argmax(-1) == continued.theirs.argmax(-1)).float()
    assert float(agree.mean()) >= 0.9


@cache
def little_but_attention(window: int | None) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """One layer whose output projection is the identity and whose MLP gives nothing; of
    `prompt(1200)` transformers' logits in bf16 and those in fp64."""
    changes = {**SIZES, "hidden_size": 128, "num_hidden_layers": 1, "sliding_window": window}
    changes["max_position_embeddings"] = MAX_MODEL_LEN
    module = reference_model("mistral", torch.bfloat16, **changes)
    module.model.layers[0].self_attn.o_proj.weight.data = torch.eye(128, dtype=torch.bfloat16)
    module.model.layers[0].mlp.down_proj.weight.data.zero_()
    exact = copy.deepcopy(module).double()
    return module, logits_of(module, prompt(1200)), logits_of(exact, prompt(1200))


@pytest.mark.parametrize("window", [None, 300])
def test_long_attention_is_that_of_fp64(window: int | None) -> None:
    """The rows that count have keys in three partitions."""
    module, theirs, exact = little_but_attention(window)
    ours = alone(module, prompt(1200), max_rows=1200)
    assert_as_good(ours[1024:], theirs[1024:], exact[1024:])


# --- the same bits however it is cut up


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_chunks(family: str) -> None:
    module, token_ids = model_of(family), prompt(90)
    whole = alone(module, token_ids)
    for sizes in ([1] * 90, [16, 1, 33, 40], [64, 26], [5] * 18):
        sequences = Sequences(module)
        sequence, start, pieces = sequences.add(90), 0, []
        for size in sizes:
            pieces.append(sequences.compute((sequence, start, token_ids[start : start + size])))
            start += size
        assert torch.equal(torch.cat(pieces), whole)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_depend_on_the_own_sequence_alone(data: st.DataObject) -> None:
    """Sequences of any lengths, in any chunks, in any company, by any number of threads."""
    family = data.draw(st.sampled_from(["llama", "gemma3 odd", "qwen3_moe odd", "gpt_neox"]))
    module = model_of(family)
    sequences = Sequences(module, num_threads=3, max_rows=200)
    texts = [
        prompt(length, seed=length)
        for length in data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=6))
    ]
    numbers = [sequences.add(len(text)) for text in texts]
    done = [0] * len(texts)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        parts, room = [], 200
        for index in data.draw(st.permutations(range(len(texts)))):
            left = len(texts[index]) - done[index]
            count = data.draw(st.integers(0, min(left, room)))
            if not parts and left:
                count = max(count, 1)
            if count:
                piece = texts[index][done[index] : done[index] + count]
                parts.append((index, (numbers[index], done[index], piece)))
                done[index] += count
                room -= count
        if not parts:
            continue
        num_threads = data.draw(st.integers(1, 3))
        logits = sequences.compute(*(part for _, part in parts), num_threads=num_threads)
        for index, (_, _, piece) in parts:
            found[index].append(logits[: len(piece)])
            logits = logits[len(piece) :]
    for text, pieces in zip(texts, found, strict=True):
        assert torch.equal(torch.cat(pieces), alone(module, text))


@pytest.mark.parametrize("num_rows", [2, 7, 16, 17, 40])
def test_bits_do_not_depend_on_other_rows(num_rows: int) -> None:
    """Decoding rows at positions of all lengths, among them a chunk of a prompt."""
    module = model_of("qwen3")
    sequences = Sequences(module, block_size=32)
    texts = [prompt(10 + 23 * (index % 9), seed=index) for index in range(num_rows)]
    numbers = [sequences.add(len(text) + 1) for text in texts]
    for number, text in zip(numbers, texts, strict=True):
        sequences.compute((number, 0, text))
    together = sequences.compute(*((n, len(t), [7]) for n, t in zip(numbers, texts, strict=True)))
    chunk = sequences.add(64)
    mixed = sequences.compute(
        (chunk, 0, prompt(50)), *((n, len(t), [7]) for n, t in zip(numbers, texts, strict=True))
    )
    for index, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        single = sequences.compute((number, len(text), [7]))[0]
        assert torch.equal(together[index], single)
        assert torch.equal(mixed[50 + index], single)
    assert torch.equal(mixed[:50], alone(module, prompt(50), block_size=32))


@pytest.mark.parametrize("num_threads", [1, 3, 5])
def test_bits_do_not_depend_on_threads(num_threads: int) -> None:
    """The last rows are decoded one by one: long contexts are split over the threads there."""
    module, token_ids = model_of("llama"), prompt(1100)
    whole = alone(module, token_ids, max_rows=1100)
    sequences = Sequences(module, num_threads=num_threads)
    sequence = sequences.add(1100)
    for start in range(0, 1090, 109):
        piece = sequences.compute((sequence, start, token_ids[start : start + 109]))
        assert torch.equal(piece, whole[start : start + 109])
    for at in range(1090, 1100):
        assert torch.equal(sequences.compute((sequence, at, token_ids[at : at + 1]))[0], whole[at])


def test_each_call_may_be_done_by_another_number_of_threads() -> None:
    module, token_ids = model_of("llama"), prompt(120)
    whole = alone(module, token_ids)
    sequences = Sequences(module, num_threads=4)
    table = sequences.blocks.table(120)[None]
    logits = torch.empty(1, VOCAB_SIZE)
    for at, token in enumerate(token_ids):
        for num_threads in (at % 4 + 1, 1 + 3 * (at % 2)):
            sequences.decoder.forward(
                int32([token]),
                int32([at]),
                int32([0]),
                table,
                int32([0]),
                logits,
                num_threads=num_threads,
            )
            assert torch.equal(logits[0], whole[at])
    with pytest.raises(ValueError, match="num_threads must be 1 to 4"):
        sequences.decoder.forward(
            int32([1]), int32([0]), int32([0]), table, int32([]), num_threads=5
        )


def test_only_the_rows_asked_for_are_written() -> None:
    module, token_ids = model_of("llama"), prompt(60)
    whole = alone(module, token_ids)
    sequences = Sequences(module)
    table = sequences.blocks.table(60)[None]
    rows, positions = int32([59, 3, 17]), np.arange(60, dtype=np.int32)
    logits = torch.full((4, VOCAB_SIZE), -1.0)
    zeros = np.zeros(60, np.int32)
    sequences.decoder.forward(int32(token_ids), positions, zeros, table, rows, logits[:3])
    assert torch.equal(logits[:3], whole[[59, 3, 17]])
    assert bool((logits[3] == -1).all())
    sequences.decoder.forward(int32(token_ids), positions, zeros, table, int32([]))


# --- some of the layers


@pytest.mark.parametrize("family", ["llama", "gemma3 odd", "gpt_neox", "phi3 odd", "qwen3_moe"])
def test_layers_one_by_one_with_weights_elsewhere_give_the_same_bits(family: str) -> None:
    """All layers' weights come to the same place, one layer after the other."""
    module, token_ids = model_of(family), prompt(70)
    whole = alone(module, token_ids)
    sequences = Sequences(module)
    decoder = sequences.decoder
    table = sequences.blocks.table(70)[None]
    for start, stop in ((0, 40), (40, 69), (69, 70)):
        rows = stop - start
        hidden = torch.full((rows, decoder.hidden_stride), float("nan"), dtype=torch.bfloat16)
        logits = torch.empty(rows, decoder.vocab_size)
        for layer in decoder.layers:
            slot = {
                name: torch.full((tensor.numel() + 3,), float("nan"), dtype=torch.bfloat16)[3:]
                for name, tensor in layer.parameters.items()
            }  # at addresses that are odd multiples of 2
            placed = layer.at(
                {name: slot[name].view(tensor.shape) for name, tensor in layer.parameters.items()}
            )
            for name, tensor in layer.parameters.items():
                placed.parameters[name].copy_(tensor)
            last = layer.index + 1 == len(decoder.layers)
            decoder.forward(
                int32(token_ids[start:stop]),
                np.arange(start, stop, dtype=np.int32),
                np.zeros(rows, np.int32),
                table,
                np.arange(rows if last else 0, dtype=np.int32),
                logits if last else None,
                layers=[placed],
                hidden=hidden,
            )
        assert torch.equal(logits, whole[start:stop])


@pytest.mark.parametrize("family", ["llama", "phi odd", "starcoder2 odd", "mistral"])
def test_columns_of_wider_matrices_are_read_where_they_lie(family: str) -> None:
    """Beside them there is nothing that may be taken for a number."""
    token_ids = prompt(70)
    module = copy.deepcopy(model_of(family))
    for linear in module.modules():
        if isinstance(linear, torch.nn.Linear):
            rows, columns = linear.weight.shape
            wide = torch.full((rows, columns + 37), float("nan"), dtype=torch.bfloat16)
            weight = wide[:, 19 : 19 + columns].copy_(linear.weight)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            assert not linear.weight.is_contiguous()
    got = Sequences(module)
    expected = Sequences(model_of(family))
    for count in (1, 3, 5, 20, 70):  # other numbers of rows are multiplied in other ways
        parts = [
            sequences.compute((sequences.add(count), 0, token_ids[:count]))
            for sequences in (got, expected)
        ]
        assert torch.equal(*parts)


def test_layers_that_do_not_fit_are_refused() -> None:
    sequences = Sequences(model_of("llama"), max_rows=8)
    decoder = sequences.decoder
    table = sequences.blocks.table(20)[None]
    hidden = torch.zeros(2, decoder.hidden_stride, dtype=torch.bfloat16)

    def compute(layers: Any, hidden: Any, logit_rows: Any = ()) -> None:
        two = int32([0, 1]), int32([0, 1]), int32([0, 0])
        decoder.forward(*two, table, int32(logit_rows), layers=layers, hidden=hidden)

    for match, layers, stream, logit_rows in (
        ("follow one on another", [], hidden, ()),
        ("follow one on another", decoder.layers[::-1], hidden, ()),
        ("without a residual stream", decoder.layers[:1], None, ()),
        ("before the last layer", decoder.layers[:1], hidden, (1,)),
        ("hidden must be", decoder.layers[:1], hidden.float(), ()),
        ("hidden must be", decoder.layers[:1], hidden[:1], ()),
    ):
        with pytest.raises(ValueError, match=match):
            compute(layers, stream, logit_rows)
    parameters = dict(decoder.layers[0].parameters)
    name, weight = "self_attn.o_proj.weight", parameters["self_attn.o_proj.weight"]
    for wrong in (weight.float(), weight[:, 1:], weight.t().contiguous().t()):
        with pytest.raises(ValueError, match=name):
            decoder.layers[0].at({**parameters, name: wrong})
    del parameters[name]
    with pytest.raises(ValueError, match=name):
        decoder.layers[0].at(parameters)


# --- processes and threads


@pytest.mark.this_process
def test_a_forked_child_starts_its_own_threads() -> None:
    module, token_ids = model_of("llama"), prompt(40)
    sequences = Sequences(module, num_threads=3)
    sequence = sequences.add(41)
    before = sequences.compute((sequence, 0, token_ids))
    child = os.fork()
    if child == 0:
        same = torch.equal(sequences.compute((sequence, 0, token_ids)), before)
        sequences.decoder.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(sequences.compute((sequence, 0, token_ids)), before)


def thread_times() -> dict[str, int]:
    """Processor time of each thread of this process, in ns."""
    times = {}
    for path in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            times[path.name] = int((path / "schedstat").read_text().split()[0])
    return times


@pytest.mark.this_process
def test_idle_threads_sleep_and_closed_ones_are_gone() -> None:
    known = set(thread_times())
    sequences = Sequences(model_of("llama"), num_threads=3)
    assert not thread_times().keys() - known  # none before the first call; others may end
    sequences.compute((sequences.add(4), 0, prompt(4)))
    own = set(thread_times()) - known
    assert len(own) == 2
    deadline = time.monotonic() + 300
    states = set()
    while states != {"S"}:
        assert time.monotonic() < deadline, states
        stats = (Path(f"/proc/self/task/{one}/stat").read_text() for one in own)
        states = {text.rpartition(")")[2].split()[0] for text in stats}
    asleep = thread_times()
    spin_until = time.thread_time() + 0.2
    while time.thread_time() < spin_until:
        pass
    assert {one: thread_times()[one] for one in own} == {one: asleep[one] for one in own}
    sequences.decoder.close()
    sequences.decoder.close()
    assert not thread_times().keys() - known
    with pytest.raises(ValueError, match="closed"):
        sequences.compute((0, 0, [5]))


# --- what it refuses


def test_reasons_are_given() -> None:
    module = model_of("llama")
    assert "float32" in str(supports(module, torch.float32))
    assert supports(torch.nn.Linear(2, 2), torch.bfloat16) is not None


def test_what_a_family_does_not_have_is_refused() -> None:
    def changed(**changes: Any) -> Any:
        return reference_model("llama", torch.bfloat16, **{**SIZES, **changes})

    assert "heads of 288" in str(supports(changed(head_dim=288), torch.bfloat16))
    assert "activation" in str(supports(changed(hidden_act="tanh"), torch.bfloat16))
    assert "float32" in str(supports(model_of("llama", torch.float32), torch.bfloat16))
    extra = changed()
    extra.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "sinks" in str(supports(extra, torch.bfloat16))
    strided = changed()
    weight = strided.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert "laid out" in str(supports(strided, torch.bfloat16))


def test_a_wrong_argument_is_refused_before_anything_is_computed() -> None:
    sequences = Sequences(model_of("llama"), max_rows=8)
    table = sequences.blocks.table(20)[None]
    right: dict[str, Any] = {
        "token_ids": int32([5, 6]),
        "positions": int32([0, 1]),
        "tables": int32([0, 0]),
        "addresses": table,
        "logit_rows": int32([1]),
        "logits_out": torch.zeros(1, VOCAB_SIZE),
    }
    wrong: list[tuple[str, Any]] = [
        ("token_ids", int32([5, VOCAB_SIZE])),
        ("token_ids", int32([-1, 5])),
        ("token_ids", np.array([5, 6])),
        ("token_ids", np.zeros(9, np.int32)),
        ("positions", int32([0])),
        ("positions", int32([0, MAX_MODEL_LEN])),
        ("positions", int32([-1, 0])),
        ("positions", int32([31, 32])),  # beyond the blocks that have an address
        ("tables", int32([0, 1])),
        ("tables", int32([0, -1])),
        ("addresses", table[0]),
        ("addresses", table[:, :0].copy()),
        ("addresses", table + 8),
        ("addresses", np.zeros_like(table)),
        ("addresses", -table),
        ("addresses", np.asfortranarray(np.stack([table[0], table[0]]))),
        ("logit_rows", int32([2])),
        ("logit_rows", int32([-1])),
        ("logit_rows", int32([0, 0, 1])),
        ("logits_out", torch.zeros(2, VOCAB_SIZE)),
        ("logits_out", torch.zeros(1, VOCAB_SIZE, dtype=torch.bfloat16)),
        ("logits_out", torch.zeros(1, 2 * VOCAB_SIZE)[:, ::2]),
        ("logits_out", None),
    ]
    for name, value in wrong:
        with pytest.raises(ValueError, match=r"must|differ|beyond|address|rows"):
            sequences.decoder.forward(**{**right, name: value})
    assert bool((right["logits_out"] == 0).all())
    sequences.decoder.forward(**right)
    assert bool((right["logits_out"] != 0).any())


def test_a_wrong_setting_is_refused() -> None:
    module = model_of("llama")
    layout = Blocks(module).layout
    for wrong in ((0, 8, 1), (8, 0, 1), (8, 8, 0), (8, 8, 1000)):
        with pytest.raises(ValueError, match="positive"):
            NativeDecoder(module, layout, *wrong)
    with pytest.raises(NotNative, match="multiple of 16"):
        NativeDecoder(module, KVLayout(layout.layers, torch.bfloat16, 8), 8, 8, 1)
    with pytest.raises(ValueError, match="layers"):
        NativeDecoder(module, KVLayout(layout.layers[:1], torch.bfloat16), 8, 8, 1)
