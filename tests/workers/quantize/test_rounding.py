"""The arithmetic of rounding: whoever computes it, and however a tensor is cut, the same bits; and
the numbers of it, beside compressed-tensors and beside what Gaussian weights allow."""

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workers.model.native.library import Unavailable
from workers.quantize.kernels import SETS
from workers.quantize.native import NativeRounding
from workers.quantize.reference import NumpyRounding, loaded
from workers.quantize.scheme import Scheme
from workers.quantize.tile import Rounding, Tile

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def scheme(
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    candidates: int = 1,
    a8: bool = False,
) -> Scheme:
    return Scheme("any", bits, a8, group, symmetric, candidates)


SCHEMES = [
    scheme(4, 32),
    scheme(4, 128, symmetric=False),
    scheme(8),
    scheme(8, a8=True),
    scheme(8, symmetric=False),
    scheme(4, 64, candidates=20),
    scheme(4, 32, symmetric=False, candidates=20),
    scheme(8, candidates=20),
]


def native() -> list[Rounding]:
    found: list[Rounding] = []
    for name in SETS:
        try:
            found.append(NativeRounding(name))
        except Unavailable as reason:
            pytest.skip(f"{name}: {reason}")
    return found


def as_bytes(values: torch.Tensor) -> Any:
    return values.contiguous().view(torch.uint8).numpy().reshape(-1)


def tile_of(values: torch.Tensor, how: Scheme, begin: int = 0, end: int | None = None) -> Tile:
    rows, columns = values[:, begin:end].shape
    dtype = next(name for name, one in FLOATS.items() if one == values.dtype)
    groups = rows * (columns // (how.group_size or columns))
    return Tile(
        *(how, dtype, rows, columns, as_bytes(values[:, begin:end])),
        np.full(rows * how.row_bytes(columns), 0xAA, np.uint8),
        np.full(groups * values.itemsize, 0xAA, np.uint8),
        np.full(0 if how.symmetric else groups, 0xAA, np.uint8),
    )


def results(tile: Tile) -> tuple[bytes, ...]:
    return tile.levels.tobytes(), tile.scales.tobytes(), tile.zero_points.tobytes()


def rounded(values: torch.Tensor, how: Scheme, by: Rounding | None = None) -> Tile:
    tile = tile_of(values, how)
    assert (by or NumpyRounding()).rows(tile) == -1
    return tile


def dequantized(tile: Tile) -> torch.Tensor:
    """By the words of the format, with the unpacking of compressed-tensors."""
    how, shape = tile.scheme, torch.Size([tile.num_rows, tile.num_columns])
    if how.is_packed:
        words = torch.from_numpy(tile.levels.view(np.int32)).view(tile.num_rows, -1)
        levels = unpack_from_int32(words, how.num_bits, shape).float()
    else:
        levels = torch.from_numpy(tile.levels.view(np.int8)).view(shape).float()
    scales = torch.from_numpy(loaded(tile.scales, tile.dtype)).view(tile.num_rows, -1, 1)
    grouped = levels.view(tile.num_rows, -1, tile.group_size)
    if not how.symmetric:
        zero = torch.from_numpy(tile.zero_points.view(np.int8)).view(tile.num_rows, -1, 1)
        grouped = grouped - zero.float()
    return (grouped * scales).view(shape)


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def hard_values(dtype: torch.dtype) -> torch.Tensor:
    """A row each of what is not like other weights: nothing, constants, outliers, the smallest and
    the largest numbers there are."""
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    rows = gaussian(14, 256).to(dtype)
    rows[0] = 0
    rows[1] = 0.5
    rows[2] = -0.5
    rows[3, 7] = 1000
    rows[4] = most
    rows[5] = -most
    rows[6, ::2], rows[6, 1::2] = most, -most
    rows[7] = least
    rows[8] = least / 4
    rows[9] = gaussian(1, 256).abs()[0].to(dtype) + 1
    rows[10] = -0.0
    rows[11] = (torch.arange(256) * least / 64).to(dtype)
    rows[12, 128:] = 0
    rows[13] = torch.where(torch.arange(256) % 2 == 0, most, least).to(dtype)
    return rows


@pytest.mark.parametrize("dtype", list(FLOATS.values()), ids=str)
@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_all_sets_have_the_bits_of_the_reference(how: Scheme, dtype: torch.dtype) -> None:
    for values in (gaussian(9, 640, dtype), hard_values(dtype)):
        expected = results(rounded(values, how))
        for one in native():
            assert results(rounded(values, how, one)) == expected, one.name


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    hnp.arrays(
        np.float16, (2, 128), elements=st.floats(-65504, 65504, width=16, allow_subnormal=True)
    ),
)
def test_all_sets_agree_on_whatever_numbers(how: Scheme, values: Any) -> None:
    expected = results(rounded(torch.from_numpy(values), how))
    for one in native():
        assert results(rounded(torch.from_numpy(values), how, one)) == expected, one.name


@pytest.mark.parametrize("columns", [256, 1000, 1031])
@pytest.mark.parametrize("how", [one for one in SCHEMES if one.group_size is None], ids=str)
def test_a_row_in_parts_has_the_bits_of_the_whole(how: Scheme, columns: int) -> None:
    values = gaussian(1, columns, torch.bfloat16)
    expected = rounded(values, how)
    for by in (NumpyRounding(), *native()):
        row, parts = by.parts(), [(at, min(at + 256, columns)) for at in range(0, columns, 256)]
        tiles = [tile_of(values, how, *part) for part in parts]
        assert [row.fold(tile) for tile in tiles] == [-1] * len(tiles)
        if how.num_candidates > 1:
            for tile in tiles:
                row.compare(tile)
        for tile in tiles:
            row.write(tile)
        assert b"".join(tile.levels.tobytes() for tile in tiles) == expected.levels.tobytes()
        assert {results(tile)[1:] for tile in tiles} == {results(expected)[1:]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", list(FLOATS.values()), ids=str)
def test_what_is_no_number_is_found(dtype: torch.dtype, bad: float) -> None:
    values = gaussian(5, 256, dtype)
    values[3, 77] = bad
    for how in SCHEMES:
        for by in (NumpyRounding(), *native()):
            assert by.rows(tile_of(values, how)) == 3 * 256 + 77
            if how.group_size is None:
                assert by.parts().fold(tile_of(values[3:4], how)) == 77


@pytest.mark.parametrize("dtype", list(FLOATS.values()), ids=str)
@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_hard_groups_stay_finite_and_near(how: Scheme, dtype: torch.dtype) -> None:
    values = hard_values(dtype)
    found = dequantized(rounded(values, how))
    assert found.to(dtype).isfinite().all(), "also in the dtype that the model has"
    groups = values.float().view(len(values), -1, how.group_size or 256)
    wide = groups.clamp(min=0).amax(-1) / 2 - groups.clamp(max=0).amin(-1) / 2
    if how.symmetric:
        wide = groups.abs().amax(-1)
    # A level is a range's part; the range's end may lie a level off, and a search cuts off half.
    steps = 1 if how.num_candidates == 1 else 1 << (how.num_bits - 1)
    limit = wide / (1 << (how.num_bits - 1)) * 1.07 * steps + torch.finfo(dtype).smallest_normal
    off = (found - values.float()).abs().view(groups.shape).amax(-1)
    assert (off <= limit).all()
    assert (found[0] == 0).all()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 128, True), (4, 32, False), (8, None, True)]
)
def test_levels_are_those_of_compressed_tensors(
    bits: int, group: int | None, symmetric: bool
) -> None:
    """Given the scales, and in fp32: it would divide in the weights' own dtype."""
    values = gaussian(64, 512, torch.bfloat16)
    tile = rounded(values, scheme(bits, group, symmetric))
    scales = torch.from_numpy(loaded(tile.scales, "BF16")).view(64, -1)
    zero = None if symmetric else torch.from_numpy(tile.zero_points.view(np.int8)).view(64, -1)
    strategy = "channel" if group is None else "group"
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    theirs = quantize(values.float(), scales, zero, arguments, torch.int8)
    words = torch.from_numpy(tile.levels.view(np.int32)).view(64, -1)
    assert torch.equal(unpack_from_int32(words, bits, values.shape), theirs)


@pytest.mark.parametrize(
    ("how", "limit"),
    [
        (scheme(8), 0.010),
        (scheme(8, 128), 0.008),
        (scheme(4, 128), 0.13),
        (scheme(4, 32), 0.11),
        (scheme(4, 128, candidates=20), 0.115),
        (scheme(4, 128, symmetric=False), 0.13),
    ],
    ids=str,
)
def test_outputs_of_gaussian_weights_are_near(how: Scheme, limit: float) -> None:
    values, inputs = gaussian(1024, 1024), gaussian(64, 1024)
    expected = inputs @ values.T
    error = (
        inputs @ dequantized(rounded(values, how, (native() or [None])[0])).T - expected
    ).norm()
    assert error / expected.norm() <= limit


def test_outputs_with_rounded_activations_are_near() -> None:
    values, inputs = gaussian(1024, 1024), gaussian(64, 1024)
    expected = inputs @ values.T
    steps = inputs.abs().amax(1, keepdim=True) / 127.5
    coarse = (inputs / steps).round().clamp(-128, 127) * steps
    error = (coarse @ dequantized(rounded(values, scheme(8, a8=True))).T - expected).norm()
    assert error / expected.norm() <= 0.014


def test_a_search_never_loses_more() -> None:
    values = gaussian(32, 512)
    values[:, ::97] *= 20
    plain, searched = (dequantized(rounded(values, scheme(4, 64, candidates=n))) for n in (1, 20))
    losses = [((one - values) ** 2).view(32, -1, 64).double().sum(-1) for one in (plain, searched)]
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all()
    assert losses[1].sum() < losses[0].sum() * 0.97
