"""Products with packed weights: against the numbers that they say, and against themselves.

Activations are rounded to 8 bits on the way, so the reference rounds them, too; what is left to
differ are the last bits of fp32 sums.
"""

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.workers.model.native.test_native import (
    Sequences,
    int32,
    logits_of,
    model_of,
    typical,
)
from tests.workers.tiny_models import prompt
from workers.model.native.decoder import supports
from workers.packed_format import ROWS, PackedFormat, decoded, encoded, pack, unpack
from workers.skeleton.packed import PackedLinear, can_be_packed, put_packed, weight_shapes

pytestmark = pytest.mark.usefixtures("kernels")

LAYOUTS = {
    "4 bits": PackedFormat(4, 32, wide=False, minima=False),
    "4 bits with minima": PackedFormat(4, 32, wide=False, minima=True),
    "4 bits, wide, with minima": PackedFormat(4, 32, wide=True, minima=True),
    "4 bits in groups of 96": PackedFormat(4, 96, wide=True, minima=False),
    "8 bits": PackedFormat(8, 32, wide=False, minima=False),
    "8 bits with minima": PackedFormat(8, 32, wide=True, minima=True),
    "8 bits in groups of 16": PackedFormat(8, 16, wide=True, minima=False),
    "8 bits in groups of 96": PackedFormat(8, 96, wide=True, minima=False),
}
FEW = ("4 bits with minima", "8 bits in groups of 16")


def packed(layout: PackedFormat, weights: torch.Tensor) -> torch.Tensor:
    """The nearest that the format can say."""
    groups = weights.float().reshape(len(weights), -1, layout.group)
    if layout.minima:
        minima = groups.amin(-1).to(layout.scale_dtype)
        span = groups.amax(-1) - minima.float()
        most, zero = (15, 0) if layout.bits == 4 else (127, 0)
    else:
        minima, span = None, groups.abs().amax(-1)
        most, zero = 2 ** (layout.bits - 1) - 1, 2 ** (layout.bits - 1)
    scales = (span / most).to(layout.scale_dtype)
    offset = minima.float()[..., None] if minima is not None else 0
    integers = ((groups - offset) / scales.float()[..., None]).round() + zero
    integers = integers.clamp(0, most + zero).to(torch.uint8)
    return pack(layout, integers.view(weights.shape), scales, minima)


@cache
def packed_model(family: str, name: str) -> Any:
    """With the weights that can be packed so."""
    module, layout = copy.deepcopy(model_of(family)), LAYOUTS[name]
    weights = dict(module.named_parameters())
    formats = {
        name: layout
        for name in can_be_packed(module) & weights.keys()
        if weights[name].shape[1] % layout.group == 0
    }
    put_packed(module, formats, torch.bfloat16)
    for name in formats:
        owner = module.get_submodule(name.removesuffix(".weight"))
        owner.weight = nn.Parameter(packed(layout, weights[name]), requires_grad=False)
    if module.config.tie_word_embeddings:
        module.lm_head.weight = module.get_input_embeddings().weight
    module.eval()
    assert weight_shapes(module) == {name: tuple(one.shape) for name, one in weights.items()}
    return module


def rounded_to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Each 32 of a row with a scale of their own, to the nearest in fp32. Returns fp64."""
    shares = x.float().reshape(*x.shape[:-1], -1, 32)
    largest = shares.abs().amax(-1, keepdim=True)
    most = torch.tensor(127.0)  # a plain number would be multiplied with a reciprocal
    integers = (shares * (most / torch.where(largest > 0, largest, 1))).round()
    return (integers.double() * (largest / most).double()).reshape(x.shape)


@cache
def rounding_model(family: str, name: str) -> Any:
    """The same by transformers' modules, whose linears round what comes in as the kernels do."""
    module = copy.deepcopy(packed_model(family, name))
    for one in module.modules():
        if isinstance(one, PackedLinear):
            one.register_forward_pre_hook(lambda _, x: (rounded_to_8_bits(x[0]).float(),))
            one.register_forward_hook(lambda _, _x, out: out.to(torch.bfloat16))
            if one.bias is not None:
                one.bias = nn.Parameter(one.bias.float(), requires_grad=False)
    return module


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_the_products_that_the_weights_say(name: str) -> None:
    module, layout = packed_model("llama", name), LAYOUTS[name]
    assert supports(module, torch.bfloat16) is None
    sequences = Sequences(module)
    decoder, num_rows = sequences.decoder, 41
    table = sequences.add(num_rows)
    hidden = torch.zeros(num_rows, decoder.hidden_stride, dtype=torch.bfloat16)
    logits = torch.full((num_rows, decoder.vocab_size), float("nan"))
    decoder.forward(
        int32(prompt(num_rows)),
        np.arange(num_rows, dtype=np.int32),
        np.full(num_rows, table, np.int32),
        np.stack(sequences.tables),
        np.arange(num_rows, dtype=np.int32),
        logits,
        hidden=hidden,
        norms_hidden=True,
    )
    taken = rounded_to_8_bits(hidden[:, : module.config.hidden_size])
    weights = unpack(layout, module.lm_head.weight)[: decoder.vocab_size].double()
    expected = taken @ weights.T
    assert bool(((logits - expected).abs() <= 2e-6 * (taken.abs() @ weights.abs().T)).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "phi3"])
def test_a_model_is_as_good_as_its_modules_on_rounded_inputs(family: str, name: str) -> None:
    module = packed_model(family, name)
    exact = logits_of(copy.deepcopy(module).float(), prompt(45))
    sequences = Sequences(module)
    ours = sequences.compute((sequences.add(45), 0, prompt(45)))
    theirs = logits_of(rounding_model(family, name), prompt(45))
    assert typical(ours - exact) <= 1.3 * typical(theirs - exact)


@pytest.mark.parametrize("name", FEW)
def test_a_row_does_not_depend_on_company_pieces_or_threads(name: str) -> None:
    module, token_ids = packed_model("llama", name), prompt(57)
    whole = Sequences(module)
    expected = whole.compute((whole.add(57), 0, token_ids))
    pieces = Sequences(module, num_threads=3)
    first, other = pieces.add(57), pieces.add(40)
    at, found = 0, []
    for count in (1, 7, 16, 17, 3, 13):
        part = (first, at, token_ids[at : at + count])
        beside = (other, 0, prompt(2 + count)) if count % 2 else None
        rows = pieces.compute(*([beside, part] if beside else [part]), num_threads=1 + count % 3)
        found.append(rows[-count:])
        at += count
    assert torch.equal(torch.cat(found), expected)


def test_what_is_not_a_number_stays_so() -> None:
    module = copy.deepcopy(packed_model("llama", "4 bits"))
    module.model.norm.weight.data = torch.full_like(module.model.norm.weight, float("inf"))
    sequences = Sequences(module)
    logits = sequences.compute((sequences.add(3), 0, prompt(3)))
    assert not torch.isfinite(logits).any()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.this_process
def test_strips_say_what_was_packed(name: str) -> None:
    layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(5)
    shape, groups = (37, 2 * layout.group), (37, 2)
    most = 16 if layout.bits == 4 else 128 if layout.minima else 256
    integers = torch.randint(0, most, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randn(groups, generator=generator).to(layout.scale_dtype)
    minima = torch.randn(groups, generator=generator).to(layout.scale_dtype)
    strips = pack(layout, integers, scales, minima if layout.minima else None)
    assert tuple(strips.shape) == layout.shape(*shape)
    wide = scales.float().repeat_interleave(layout.group, 1)
    if layout.minima:
        expected = wide * integers + minima.float().repeat_interleave(layout.group, 1)
    else:
        expected = wide * (integers.float() - 2 ** (layout.bits - 1))
    weights = unpack(layout, strips)
    assert torch.equal(weights[:37], expected)
    assert not weights[37:].any() or layout.minima
    assert len(weights) % ROWS == 0
    assert decoded({"packed": encoded({"some.weight": layout})}) == {"some.weight": layout}
