"""The mapping behind a sequence's keys and values: its size, its name, its end."""

import gc
from pathlib import Path

import pytest
import torch

from workers.errors import OutOfKVMemory
from workers.kv_cache import MAPPING_NAME, KVCache, KVLayer, KVLayout

LAYOUT = KVLayout((KVLayer(3, 64), KVLayer(2, 16)), torch.bfloat16)


def mappings() -> list[int]:
    """Resident bytes of every mapping that holds keys and values in this process."""
    resident = []
    named = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, value = line.partition(":")
        if "-" in field and " " in field:
            named = line.endswith(f"/memfd:{MAPPING_NAME} (deleted)")
        elif named and field == "Rss":
            resident.append(int(value.split()[0]) * 1024)
    return resident


def open_descriptors() -> list[str]:
    """What each file descriptor of this process stands for."""
    links = sorted(Path("/proc/self/fd").iterdir())
    return [str(link.readlink()) for link in links if link.is_symlink()]


def fill(cache: KVCache, layout: KVLayout, num_tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Append random keys to all layers (values: twice the keys) and commit."""
    generator = torch.Generator().manual_seed(seed)
    given = []
    for index, layer in enumerate(layout.layers):
        keys = torch.randn(1, layer.num_heads, num_tokens, layer.head_dim, generator=generator)
        keys = keys.to(layout.dtype)
        cache.append(index, keys, 2 * keys)
        given.append(keys)
    cache.commit(num_tokens)
    return given


def test_sizes_follow_from_the_layout() -> None:
    assert LAYOUT.bytes_per_token == 2 * (3 * 64 + 2 * 16) * 2
    assert LAYOUT.capacity(1) == 128  # 4096 bytes of 32 each, the narrower layer
    assert LAYOUT.capacity(129) == 256
    assert LAYOUT.num_bytes(0) == 0
    assert LAYOUT.num_bytes(1) == 2 * (3 + 2) * 4096
    assert LAYOUT.num_bytes(33) == 2 * (2 * 3 + 2) * 4096


@pytest.mark.parametrize("num_tokens", [1, 32, 33, 200])
def test_memory_in_use_is_what_num_bytes_says(num_tokens: int) -> None:
    assert mappings() == []
    cache = KVCache(LAYOUT, 4096)
    assert sum(mappings()) == cache.num_bytes == 0
    fill(cache, LAYOUT, num_tokens)
    assert mappings() == [cache.num_bytes]
    assert cache.num_bytes > 0


def test_appended_tokens_come_back_as_views_in_order() -> None:
    cache = KVCache(LAYOUT, 100)
    parts = [fill(cache, LAYOUT, count, seed=count) for count in (5, 1, 40)]
    assert cache.num_tokens == 46
    new = torch.ones(1, 2, 1, 16, dtype=torch.bfloat16)
    keys, values = cache.append(1, new, new)
    expected = torch.cat([*(part[1] for part in parts), new], dim=2)
    assert torch.equal(keys, expected)
    assert torch.equal(values[:, :, :46], 2 * expected[:, :, :46])
    again, _ = cache.append(1, new, new)
    assert again.data_ptr() == keys.data_ptr()


def test_a_pass_without_commit_has_not_happened() -> None:
    cache = KVCache(LAYOUT, 100)
    fill(cache, LAYOUT, 3)
    wrong = torch.full((1, 3, 7, 64), 9.0, dtype=torch.bfloat16)
    cache.append(0, wrong, wrong)
    assert cache.num_tokens == 3
    right = torch.ones(1, 3, 1, 64, dtype=torch.bfloat16)
    keys, _ = cache.append(0, right, right)
    assert keys.shape[2] == 4
    assert torch.equal(keys[:, :, 3:], right)


def test_what_does_not_fit_is_refused() -> None:
    cache = KVCache(LAYOUT, 128)
    fill(cache, LAYOUT, 128)
    one = torch.zeros(1, 3, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(OutOfKVMemory, match="129 tokens do not fit"):
        cache.append(0, one, one)
    with pytest.raises(OutOfKVMemory, match="smaller max_model_len"):
        KVCache(LAYOUT, 1 << 44)


def test_closing_unmaps_but_never_under_a_view() -> None:
    cache = KVCache(LAYOUT, 100)
    given = fill(cache, LAYOUT, 10)
    one = torch.zeros(1, 3, 1, 64, dtype=torch.bfloat16)
    keys, values = cache.append(0, one, one)
    cache.close()
    assert cache.num_bytes == 0
    assert len(mappings()) == 1
    assert torch.equal(keys[:, :, :10], given[0])
    del keys, values
    gc.collect()
    assert mappings() == []
    with pytest.raises(OutOfKVMemory, match="closed"):
        cache.append(0, one, one)


def test_no_file_descriptor_stays_open() -> None:
    before = open_descriptors()
    caches = [KVCache(LAYOUT, 100) for _ in range(3)]
    assert open_descriptors() == before
    assert len(mappings()) == len(caches)
