"""Quantized keys and values in the pool: how many tokens it then holds, and what an open section of
a sequence takes beside them."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.daemon_process import DaemonProcess
from workers.kv.cache import KVCache
from workers.kv.layout import FULL, SECTION, KVLayer, KVLayout
from workers.kv.prefix import root_digest
from workers.kv.source import PoolSource, PrivateSource
from workers.kv.table import BlockTable

HOST = torch.device("cpu")
SMOLLM2 = (KVLayer(3, 64),) * 30
GEMMA3 = (KVLayer(1, 256),) * 18
LLAMA3 = (KVLayer(8, 128),) * 32


def layout(bits: int, layers: tuple[KVLayer, ...] = SMOLLM2) -> KVLayout:
    return KVLayout.on(HOST, layers, torch.bfloat16, bits=bits)


# --- layout


@pytest.mark.parametrize("layers", [SMOLLM2, GEMMA3, LLAMA3], ids=["smollm2", "gemma3", "llama3"])
@pytest.mark.parametrize(("bits", "least"), [(8, 1.9), (4, 3.3)])
def test_a_token_takes_less_also_in_whole_granules(
    layers: tuple[KVLayer, ...], bits: int, least: float
) -> None:
    plain, quantized = layout(FULL, layers), layout(bits, layers)
    assert quantized.block_size % SECTION == 0
    assert plain.bytes_per_token / quantized.bytes_per_token >= least
    per_token = [one.block_bytes / one.block_size for one in (plain, quantized)]
    assert per_token[0] / per_token[1] >= least


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "layers", [SMOLLM2, GEMMA3, (KVLayer(8, 128),), (KVLayer(2, 20), KVLayer(5, 80))]
)
def test_each_layer_of_an_open_section_has_a_place_of_its_own(
    bits: int, layers: tuple[KVLayer, ...]
) -> None:
    made = layout(bits, layers)
    ends = dict.fromkeys(range(made.num_open_blocks), 0)
    for (index, offset), layer in zip(made.open_places, layers, strict=True):
        assert offset == ends[index]
        assert offset % 64 == 0
        ends[index] = -(-(offset + 4 * layer.num_heads * layer.head_dim * SECTION) // 64) * 64
        assert ends[index] <= made.block_bytes
    assert all(ends.values())


def test_ranks_have_places_of_their_own_in_an_open_section() -> None:
    of_ranks = ((KVLayer(2, 64),) * 3, (KVLayer(1, 64),) * 3)
    places = [
        KVLayout.on(HOST, layers, torch.bfloat16, of_ranks, rank, 8).open_places
        for rank, layers in enumerate(of_ranks)
    ]
    assert len(set(places[0] + places[1])) == 6


def test_other_bits_are_other_blocks() -> None:
    size = layout(4).block_size
    layouts = [KVLayout(SMOLLM2, torch.bfloat16, size, bits=bits) for bits in (FULL, 8, 4)]
    assert len({root_digest("w", one) for one in layouts}) == 3


# --- tables


def test_a_pass_has_the_section_it_begins_in_and_the_one_it_ends_in() -> None:
    made = layout(8)
    source = PrivateSource(made, limit_bytes=1 << 30)
    table = BlockTable(made)

    def compute(num_new: int, num_kept: int | None = None) -> list[list[bool]]:
        end = table.num_tokens + num_new
        blocks = source.lease(table.num_missing(end))
        source.release(table.grow(end, blocks))
        assert table.num_missing(end) == 0
        assert len(table.held) == source.num_blocks
        assert len({block.address for block in table.held}) == len(table.held)
        found: list[list[bool]] = (table.open_addresses(num_new) != 0).all(-1)[None].tolist()
        before = table.num_tokens
        table.commit(num_new)
        table.rewind(before + (num_new if num_kept is None else num_kept))
        return found

    first = made.num_open_blocks
    assert compute(40) == [[False, True]]
    assert len(table.held) == 2 + first
    assert compute(3) == [[True, True]]
    assert compute(60) == [[True, True]]  # to 103, in the fourth section
    assert len(table.held) == 4 + 2 * first
    assert compute(1) == [[True, True]]
    assert len(table.held) == 4 + first  # what it began in has gone
    assert compute(30, num_kept=1) == [[True, True]]  # to 134, of which one is kept
    assert compute(1) == [[True, True]]
    assert compute(22) == [[True, True]]  # to 128
    assert compute(1, num_kept=0) == [[True, True]]  # in one section
    assert compute(33) == [[False, True]]
    source.release(table.clear())
    assert source.num_blocks == 0


# --- in the pool


@pytest.fixture
def caches(
    start_daemon: Callable[..., DaemonProcess],
) -> Iterator[Callable[[int], KVCache]]:
    daemon = start_daemon("--memory-limit", "96MiB")
    with daemon.connect() as client:
        yield lambda bits: KVCache(layout(bits), PoolSource(client, layout(bits)), weights="w")


def test_the_same_pool_holds_more_tokens(caches: Callable[[int], KVCache]) -> None:
    """Sequences until there is no room: at once, so that nothing is shared."""

    def held(bits: int) -> int:
        kv = caches(bits)
        cache = kv.open([])
        step, length = kv.layout.block_size, 0
        while kv.grow(cache, length + step):
            length += step
            cache.table.rewind(length)
            kv.check()
        kv.close(cache)
        kv.check()
        kv.trim()
        assert kv.num_bytes == 0
        return length

    plain, of_8_bits, of_4_bits = held(FULL), held(8), held(4)
    assert of_8_bits >= 1.9 * plain
    assert of_4_bits >= 3.3 * plain


def test_what_is_open_is_never_sealed(caches: Callable[[int], KVCache]) -> None:
    kv = caches(8)
    size, tokens = kv.layout.block_size, list(range(100))
    cache = kv.open(tokens)
    assert kv.grow(cache, 100)
    cache.table.commit(100)
    assert kv.seal(cache, tokens)
    sealed = [block for block in cache.table.held if block.is_sealed]
    assert sealed == cache.table.blocks[: 100 // size]
    kv.close(cache, tokens)
    again = kv.open(tokens)
    assert again.num_cached == 99 // size * size
    assert again.table.blocks == again.table.held
    kv.close(again)
    assert kv.num_used == 0
