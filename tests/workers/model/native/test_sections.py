"""Quantized keys and values in the native decoder: what a token sees, by whatever calls it is
computed, and what that takes.

The rule: a token sees its own section of 32 as it is, and all sections before it as they were
rounded. `reference` says the same in fp64.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.quick import usual_or_long
from tests.workers.model.native.test_native import (
    MAX_MODEL_LEN,
    SIZES,
    int32,
    kv_layers,
    model_of,
    prompt,
    typical,
)
from tests.workers.tiny_models import reference_model
from workers.kv.layout import FULL, SECTION, KVLayout
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.native.architecture import NotNative
from workers.model.native.decoder import NativeDecoder
from workers.skeleton.attention_hook import NAME, attention_by

pytestmark = pytest.mark.usefixtures("kernels")
HOST = torch.device("cpu")
FAMILIES = ["llama", "gemma3 odd", "phi3 odd", "qwen3_moe odd", "gemma2"]


class Quantized:
    """Sequences of one decoder, in memory that holds anything before it is written."""

    def __init__(self, module: Any, bits: int, num_threads: int = 2, block_size: int = 0) -> None:
        layers = kv_layers(module)
        self.layout = KVLayout.on(HOST, layers, torch.bfloat16, bits=bits)
        if block_size:
            self.layout = KVLayout(layers, torch.bfloat16, block_size, bits=bits)
        self.decoder = NativeDecoder(module, self.layout, 512, MAX_MODEL_LEN, num_threads)
        self._memory = PrivateSource(self.layout)

    def table(self) -> BlockTable:
        return BlockTable(self.layout)

    def make_room(self, table: BlockTable, num_tokens: int) -> None:
        blocks = self._memory.lease(table.num_missing(num_tokens))
        for block in blocks:  # NaN, if it is bf16
            block.storage[block.offset : block.offset + self.layout.block_bytes].fill_(255)
        self._memory.release(table.grow(num_tokens, blocks))

    def compute(
        self, *parts: tuple[BlockTable, Sequence[int]], num_threads: int | None = None
    ) -> list[torch.Tensor]:
        """Logits of all rows of each part."""
        for table, tokens in parts:
            self.make_room(table, table.num_tokens + len(tokens))
        batch = Batch.of([Part(table, tokens, len(tokens)) for table, tokens in parts])
        logits = torch.full((batch.num_rows, self.decoder.vocab_size), float("nan"))
        tables, addresses = batch.tables()
        self.decoder.forward(
            batch.token_ids,
            batch.positions,
            tables,
            addresses,
            batch.logit_rows,
            logits,
            num_threads,
            open_blocks=batch.open_blocks(),
        )
        batch.commit()
        return list(torch.split(logits, [len(tokens) for _, tokens in parts]))


def whole(module: Any, bits: int, token_ids: Sequence[int]) -> torch.Tensor:
    quantized = Quantized(module, bits)
    return quantized.compute((quantized.table(), token_ids))[0]


# --- what a token sees


def rounded(x: torch.Tensor, dims: int, bits: int) -> torch.Tensor:
    """Of fp32 numbers that bf16 can hold, those of `dims` with one scale; of 4 bits in bf16, which
    is what is multiplied."""
    if bits == 8:
        scale = (x.abs().amax(dims, keepdim=True) / 127).bfloat16().float()
        return (x * (1 / scale)).round().clamp(-127, 127).double() * scale.double()
    least, most = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    scale = ((most - least) / 15).bfloat16().float()
    integers = ((x - least) * (1 / scale)).round().clamp(0, 15)
    return (integers.double() * scale.double() + least.double()).float().bfloat16()


def reference(keys: torch.Tensor, values: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Whole sections [num_heads, num_tokens, head_dim] fp64, quantized if that is asked for."""
    if bits == FULL:
        return [keys, values]
    heads, tokens, dims = keys.shape
    full = tokens // SECTION * SECTION
    sections = keys[:, :full].float().view(heads, -1, SECTION, dims)
    num_parts = max(1, dims // 64) if bits == 4 else 1
    parts = values[:, :full].float().view(heads, full, num_parts, -1)
    both = (rounded(sections, 3 if bits == 8 else 2, bits), rounded(parts, 3, bits))
    return [one.view(heads, full, dims).double() for one in both]


def by_the_rule(bits: int, rule_section: int = SECTION) -> Any:
    """Attention for transformers' modules, in fp64, where a token sees `rule_section` of its own
    tokens' as they are."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        group = query.shape[1] // key.shape[1]
        queries, keys, values = query[0].double(), key[0].double(), value[0].double()
        coarse_keys, coarse_values = reference(keys, values, bits)
        out = torch.empty_like(queries)
        for at in range(queries.shape[1]):
            own = at // rule_section * rule_section
            seen = [
                torch.cat([coarse[:, :own], fine[:, own : at + 1]], 1).repeat_interleave(group, 0)
                for coarse, fine in ((coarse_keys, keys), (coarse_values, values))
            ]
            scores = (queries[:, at, None] * seen[0]).sum(-1) * scaling
            out[:, at] = (scores.softmax(-1)[:, None] @ seen[1])[:, 0]
        return out.transpose(0, 1)[None].to(query.dtype), None

    return attend


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", usual_or_long([64, 20], [32, 64, 128, 20]))
@pytest.mark.this_process
def test_a_token_sees_its_own_section_as_it_is_and_those_before_it_rounded(
    bits: int, head_dim: int
) -> None:
    """One layer that is little but attention; what is left is what rounding to bf16 does, which is
    less than what any other rule would change."""
    changes = {**SIZES, "head_dim": head_dim, "hidden_size": 4 * head_dim, "num_hidden_layers": 1}
    module = reference_model("llama", torch.bfloat16, **changes)
    layer = module.model.layers[0]
    layer.self_attn.o_proj.weight.data = torch.eye(4 * head_dim, dtype=torch.bfloat16)
    layer.mlp.down_proj.weight.data.zero_()
    token_ids = prompt(150)
    ours = whole(module, bits, token_ids)
    unchanged = whole(module, FULL, token_ids)
    module.config._attn_implementation = NAME

    def by(attend: Any) -> torch.Tensor:
        with torch.inference_mode(), attention_by(attend):
            logits: torch.Tensor = module(torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits.float()

    exact, behind = by(by_the_rule(bits)), slice(SECTION, None)
    noise = typical(unchanged[behind] - by(by_the_rule(FULL))[behind])
    error = typical(ours[behind] - exact[behind])
    others = [
        typical(ours[behind] - other[behind])
        for other in (by(by_the_rule(FULL)), by(by_the_rule(bits, 1)))
    ]
    assert torch.equal(ours[:SECTION], unchanged[:SECTION])
    assert error <= 1.1 * noise
    assert min(others) > 1.15 * noise


# --- the same bits however it is computed


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", usual_or_long(["llama", "gemma3 odd"], FAMILIES))
def test_bits_do_not_depend_on_chunks(family: str, bits: int) -> None:
    module, token_ids = model_of(family), prompt(140)
    expected = whole(module, bits, token_ids)
    assert not torch.equal(expected, whole(module, FULL, token_ids))
    for sizes in ([1] * 140, [33, 31, 64, 1, 1, 10], [20] * 7, [127, 13], [32, 32, 32, 32, 12]):
        quantized = Quantized(module, bits, num_threads=3, block_size=32)
        table, start, pieces = quantized.table(), 0, []
        for size in sizes:
            pieces += quantized.compute((table, token_ids[start : start + size]))
            start += size
        assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_one_by_one_give_the_same_bits(bits: int) -> None:
    """As they are computed where some are read from files."""
    module, token_ids = model_of("llama"), prompt(140)
    quantized = Quantized(module, bits, block_size=32)
    decoder, table = quantized.decoder, quantized.table()
    found = []
    for start, stop in ((0, 70), (70, 71), (71, 140)):
        quantized.make_room(table, stop)
        part = token_ids[start:stop]
        batch = Batch.of([Part(table, part, len(part))])
        hidden = torch.empty(len(part), decoder.hidden_stride, dtype=torch.bfloat16)
        logits = torch.empty(len(part), decoder.vocab_size)
        for layer in decoder.layers:
            is_last = layer.index + 1 == len(decoder.layers)
            decoder.forward(
                batch.token_ids,
                batch.positions,
                *batch.tables(),
                batch.logit_rows if is_last else int32([]),
                logits if is_last else None,
                layers=[layer],
                hidden=hidden,
                open_blocks=batch.open_blocks(),
            )
        batch.commit()
        found.append(logits)
    assert torch.equal(torch.cat(found), whole(module, bits, token_ids))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_depend_on_the_own_sequence_alone(data: st.DataObject) -> None:
    """In any chunks and company, by any number of threads, after passes that were given up, and
    after trials that were wrong."""
    bits = data.draw(st.sampled_from([8, 4]))
    module = model_of(data.draw(st.sampled_from(["llama", "gemma3 odd"])))
    quantized = Quantized(module, bits, num_threads=3)
    texts = [
        prompt(length, seed=length)
        for length in data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    ]
    tables = [quantized.table() for _ in texts]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(table.num_tokens < len(text) for table, text in zip(tables, texts, strict=True)):
        parts, kept = [], []
        for index, (table, text) in enumerate(zip(tables, texts, strict=True)):
            left = min(len(text) - table.num_tokens, 90)
            if not left or (parts and data.draw(st.booleans())):
                continue
            trial = data.draw(st.sampled_from([0, 0, 1, 16]))
            count = 1 if trial else left - data.draw(st.integers(0, left - 1))
            tokens = text[table.num_tokens : table.num_tokens + count]
            kept.append((index, table.num_tokens, count))
            parts.append((table, [*tokens, *[7] * trial]))
        for _ in range(data.draw(st.integers(1, 2))):  # the first has not happened
            for index, before, _count in kept:
                tables[index].rewind(before)
            logits = quantized.compute(*parts, num_threads=data.draw(st.integers(1, 3)))
        for (index, before, count), rows in zip(kept, logits, strict=True):
            found[index].append(rows[:count])
            tables[index].rewind(before + count)
    for text, pieces in zip(texts, found, strict=True):
        assert torch.equal(torch.cat(pieces), whole(module, bits, text))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_none(bits: int) -> None:
    """Those behind a section see that something in it went wrong."""
    quantized = Quantized(model_of("llama"), bits)
    module = model_of("llama")
    embedding = module.model.embed_tokens.weight
    kept = embedding[9].clone()
    try:
        with torch.no_grad():
            embedding[9, 0] = float("nan")
        table = quantized.table()
        before = quantized.compute((table, [5] * 20))[0]
        behind = [quantized.compute((table, text))[0] for text in ([9, *[5] * 60], [5] * 40)]
    finally:
        embedding[9] = kept
    assert bool(before.isfinite().all())
    assert all(bool(logits.isnan().all()) for logits in behind)


# --- what it takes


def peak_bytes() -> int:
    """The most memory that this process ever had, since `/proc/self/clear_refs` was told to forget
    it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.this_process
def test_no_more_than_two_sections_of_a_head_are_widened_at_a_time(bits: int) -> None:
    """However long the sequence: all of its keys and values as bf16 would be 5 MB."""
    module = model_of("llama")
    quantized, plain = Quantized(module, bits, 1), Quantized(module, FULL, 1)
    widened = 2 * (64 * 256 + 64) * 2 + 10 * 1024  # keys, values of up to 256 elements, and scales
    fresh = 512 * max(2 * one.num_heads * one.head_dim for one in quantized.layout.layers) * 2
    extra = quantized.decoder.workspace_bytes - plain.decoder.workspace_bytes
    assert 0 < extra <= widened + fresh + 4096
    table, length = quantized.table(), MAX_MODEL_LEN - 1
    for start in range(0, length, 400):
        quantized.compute((table, prompt(length)[start : start + 400]))
    quantized.compute((table, [5]))
    table.rewind(length)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    quantized.compute((table, [5]))
    assert quantized.layout.bits == bits
    assert peak_bytes() - before <= 256 << 10


# --- what it refuses


def test_a_wrong_open_section_is_refused() -> None:
    quantized = Quantized(model_of("llama"), 8, block_size=32)
    table = quantized.table()
    quantized.compute((table, prompt(40)))
    batch = Batch.of([Part(table, [5], 1)])
    tables, addresses = batch.tables()
    right = batch.open_blocks()
    assert right is not None
    rows = (batch.token_ids, batch.positions, tables, addresses, int32([]))
    for wrong in (None, right[:0], right[:, :1], right.astype(np.int32), right + 8, right * 0):
        with pytest.raises(ValueError, match="open"):
            quantized.decoder.forward(*rows, open_blocks=wrong)
    two = (int32([5, 6]), int32([40, 42]), int32([0, 0]), addresses, int32([]))
    with pytest.raises(ValueError, match="follow one on another"):
        quantized.decoder.forward(*two, open_blocks=right)
    with pytest.raises(NotNative, match="multiple of 32"):
        Quantized(model_of("llama"), 8, block_size=16)
    quantized.decoder.forward(*rows, open_blocks=right)
