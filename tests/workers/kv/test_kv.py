"""Blocks of keys and values: their layout, their names, whose they are, and what others find.

Every test of `KVCache` runs against a real allocator. What is written for a token depends on all
tokens up to it, as keys and values do, so that a block that is found for the wrong tokens shows.
"""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from allocator import Client, RuntimeDir
from tests.daemon_process import TIMEOUT_S, DaemonProcess
from tests.leaks import wait_until
from workers.errors import OutOfKVMemory
from workers.kv.block import KVBlock
from workers.kv.cache import CacheStatistics, KVCache, SequenceCache
from workers.kv.layout import KVLayer, KVLayout
from workers.kv.prefix import extend_chain, root_digest
from workers.kv.source import PoolSource, PrivateSource
from workers.kv.table import BlockTable

LAYOUT = KVLayout((KVLayer(3, 64), KVLayer(2, 16)), torch.bfloat16)
SIZE = LAYOUT.block_size
GRANULE = 64 << 10

StartDaemon = Callable[..., DaemonProcess]


# --- layout


def test_sizes_follow_from_the_layout() -> None:
    assert LAYOUT.bytes_per_token == 2 * (3 * 64 + 2 * 16) * 2
    assert LAYOUT.layer_offsets == (0, 2 * 3 * 16 * 64 * 2)
    assert LAYOUT.block_bytes == GRANULE
    assert [LAYOUT.num_blocks(n) for n in (0, 1, 16, 17, 160)] == [0, 1, 1, 2, 10]
    assert [LAYOUT.num_bytes(n) for n in (0, 16, 17)] == [0, GRANULE, 2 * GRANULE]


def test_layers_begin_at_multiples_of_64_bytes_and_blocks_at_whole_granules() -> None:
    layers = (KVLayer(1, 3), KVLayer(3, 5), KVLayer(8, 1000), KVLayer(1, 1))
    layout = KVLayout(layers, torch.bfloat16, block_size=3)
    ends = [
        begin + layout.layer_bytes(layer)
        for begin, layer in zip(layout.layer_offsets, layers, strict=True)
    ]
    assert layout.layer_bytes(layers[1]) == 2 * 3 * 3 * 5 * 2
    assert layout.layer_offsets[0] == 0
    for end, begin in zip(ends, (*layout.layer_offsets[1:], layout.block_bytes), strict=True):
        assert 0 <= begin - end < (64 if begin < layout.block_bytes else GRANULE)
        assert begin % 64 == 0
    assert layout.block_bytes % GRANULE == 0


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "block_size"),
    [(24, 8, 32), (30, 3, 80), (80, 8, 16), (2, 1, 128)],
)
def test_blocks_fill_the_pieces_that_a_gpu_has_memory_in(
    num_layers: int, num_heads: int, block_size: int
) -> None:
    layers = (KVLayer(num_heads, 64),) * num_layers
    layout = KVLayout.on(torch.device("cuda", 0), layers, torch.bfloat16)
    assert layout.block_size == block_size
    assert layout.block_bytes % (2 << 20) == 0
    used = layout.bytes_per_token * block_size
    assert layout.block_bytes // 2 <= used <= layout.block_bytes or block_size == 128
    assert KVLayout.on(torch.device("cpu"), layers, torch.bfloat16).block_size == 16
    assert KVLayout.on(torch.device("cpu"), layers, torch.bfloat16).granule == GRANULE


# --- tables


def rows(layer: int, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = LAYOUT.layers[layer]
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, 1, shape.num_heads, num_tokens, shape.head_dim, generator=generator)
    keys, values = both.to(LAYOUT.dtype)
    return keys, values


@pytest.mark.parametrize(
    "order", [range(8), range(7, -1, -1), [0, 2, 4, 6, 1, 3, 5, 7], [3, 4, 5, 0, 1, 7, 2, 6]]
)
def test_what_is_written_across_blocks_is_read_back(order: Sequence[int]) -> None:
    blocks = adjacent_blocks(8)
    table = BlockTable(LAYOUT, [blocks[index] for index in order])
    whole = [rows(layer, 100, seed=layer) for layer in (0, 1)]
    done = 0
    for count in (1, 5, 10, 33, 16, 15, 20):
        for layer, (keys, values) in enumerate(whole):
            part = slice(done, done + count)
            table.write(layer, keys[:, :, part], values[:, :, part])
        done += count
        table.commit(count)
        for layer, sides in enumerate(whole):
            for start in (0, done // 2, done - 1):
                got = table.read(layer, start, done)
                assert all(
                    torch.equal(one, side[:, :, start:done])
                    for one, side in zip(got, sides, strict=True)
                )
    assert (done, table.num_tokens, table.capacity) == (100, 100, 128)
    assert table.addresses.tolist() == [block.address for block in table.blocks]


def adjacent_blocks(count: int) -> list[KVBlock]:
    storage = torch.full((count * LAYOUT.block_bytes,), 255, dtype=torch.uint8)  # NaN where unset
    return [KVBlock(storage, index * LAYOUT.block_bytes, None) for index in range(count)]


def test_blocks_of_different_storages_are_one_sequence_too() -> None:
    table = BlockTable(LAYOUT, [*adjacent_blocks(2), *PrivateSource(LAYOUT).lease(2)])
    keys, values = rows(0, 64, seed=9)
    table.write(0, keys, values)
    assert torch.equal(table.read(0, 3, 64)[1], values[:, :, 3:])


def test_a_pass_without_commit_has_not_happened() -> None:
    table = BlockTable(LAYOUT, PrivateSource(LAYOUT).lease(2))
    first, wrong, right = (rows(0, count, seed=count) for count in (14, 9, 3))
    table.write(0, *first)
    table.commit(14)
    table.write(0, *wrong)
    assert table.num_tokens == 14
    table.write(0, *right)
    assert torch.equal(table.read(0, 0, 17)[0], torch.cat([first[0], right[0]], dim=2))


def test_a_trial_that_was_wrong_is_written_over() -> None:
    table = BlockTable(LAYOUT, PrivateSource(LAYOUT).lease(2))
    trial, other = rows(0, 20, seed=1), rows(0, 5, seed=2)
    table.write(0, *trial)
    table.commit(20)
    table.rewind(15)
    table.write(0, *other)
    assert torch.equal(table.read(0, 0, 20)[1], torch.cat([trial[1][:, :, :15], other[1]], dim=2))


def test_beyond_the_capacity_nothing_is_written() -> None:
    table = BlockTable(LAYOUT, PrivateSource(LAYOUT).lease(1))
    table.write(0, *rows(0, 16, seed=1))
    with pytest.raises(OutOfKVMemory, match="17 tokens do not fit into blocks for 16"):
        table.write(0, *rows(0, 17, seed=1))


# --- names


def chain(token_ids: Sequence[int], root: bytes) -> list[bytes]:
    found: list[bytes] = []
    extend_chain(found, root, token_ids, SIZE)
    return found


def test_a_digest_names_all_that_keys_and_values_depend_on() -> None:
    other_layout = KVLayout(LAYOUT.layers[:1], LAYOUT.dtype)
    roots = [
        root_digest("w", LAYOUT),
        root_digest("v", LAYOUT),
        root_digest("w", other_layout),
        root_digest("w", KVLayout(LAYOUT.layers, torch.float16)),
        root_digest("w", KVLayout(LAYOUT.layers, LAYOUT.dtype, 32)),
        root_digest("w", LAYOUT, salt="s"),
        root_digest("w', 's", LAYOUT),
    ]
    tokens = list(range(32))
    digests = [one for root in roots for one in chain(tokens, root)]
    assert len(set(digests)) == len(digests) == 2 * len(roots)
    assert root_digest("w", LAYOUT) == roots[0]


def test_a_chain_goes_on_where_it_was_and_tells_every_earlier_token() -> None:
    root = root_digest("w", LAYOUT)
    tokens = list(range(100))
    whole = chain(tokens, root)
    assert len(whole) == 6
    parts: list[bytes] = []
    for stop in (5, 16, 40, 95, 96, 100):
        extend_chain(parts, root, tokens[:stop], SIZE)
        assert parts == whole[: stop // SIZE]
    changed = chain([*tokens[:20], 7, *tokens[21:]], root)
    assert changed[0] == whole[0]
    assert not set(changed[1:]) & set(whole)


# --- one instance and its allocator


class Instance:
    """A cache of its own session, and sequences in it that hold what their tokens say."""

    def __init__(self, client: Client, weights: str = "w", **options: bool) -> None:
        self.client = client
        self.kv = KVCache(LAYOUT, PoolSource(client, LAYOUT), weights=weights, **options)
        self.tokens: dict[SequenceCache, list[int]] = {}

    def open(self, token_ids: Sequence[int], salt: str = "") -> SequenceCache:
        cache = self.kv.open(token_ids, salt)
        self.tokens[cache] = list(token_ids)
        assert cache.num_cached <= max(0, len(token_ids) - 1)
        self.verify(cache, salt)
        return cache

    def compute(self, cache: SequenceCache, salt: str = "") -> bool:
        """All of its tokens, if there is room."""
        table, token_ids = cache.table, self.tokens[cache]
        if not self.kv.grow(cache, len(token_ids)):
            return False
        start = table.num_tokens
        for layer, shape in enumerate(LAYOUT.layers):
            keys = contents(token_ids, salt)[start:, None].expand(-1, shape.head_dim)
            keys = keys.expand(1, shape.num_heads, -1, -1)
            table.write(layer, keys, -keys)
        table.commit(len(token_ids) - start)
        return True

    def run(self, token_ids: Sequence[int], salt: str = "") -> int:
        """A whole sequence. Returns how many tokens were found."""
        cache = self.open(token_ids, salt)
        assert self.compute(cache, salt), self.kv.problem
        self.close(cache)
        return cache.num_cached

    def close(self, cache: SequenceCache, *, keep: bool = True) -> None:
        token_ids = self.tokens.pop(cache)
        self.kv.close(cache, token_ids if keep else None)
        self.kv.check()

    def verify(self, cache: SequenceCache, salt: str = "") -> None:
        """All that it holds is what its tokens say."""
        length = cache.table.num_tokens
        if not length:
            return
        expected = contents(self.tokens[cache][:length], salt)
        for layer, shape in enumerate(LAYOUT.layers):
            keys, values = cache.table.read(layer, 0, length)
            same = expected[:, None].expand(-1, shape.head_dim).expand_as(keys)
            assert torch.equal(keys, same)
            assert torch.equal(values, -same)

    @property
    def statistics(self) -> CacheStatistics:
        return self.kv.statistics()


def contents(token_ids: Sequence[int], salt: str) -> torch.Tensor:
    """One number for each token, [num_tokens], that tells it from any other beginning."""
    running = hashlib.sha256(salt.encode())
    found = []
    for token in token_ids:
        running.update(token.to_bytes(4, "little"))
        found.append(running.digest()[0] + 1)
    return torch.tensor(found, dtype=LAYOUT.dtype)


@pytest.fixture
def instance(daemon: DaemonProcess) -> Iterator[Instance]:
    with daemon.connect() as client:
        yield Instance(client)


@pytest.fixture
def other(daemon: DaemonProcess) -> Iterator[Instance]:
    with daemon.connect() as client:
        yield Instance(client)


def tokens(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def held(client: Client) -> tuple[int, int, int]:
    """(leased, cached, evictable) blocks of the whole pool, after its own check of everything."""
    client.check_integrity()
    pool = client.statistics().pool
    found = (pool.leased_bytes, pool.cached_bytes, pool.evictable_bytes)
    assert all(num_bytes % LAYOUT.block_bytes == 0 for num_bytes in found)
    leased, cached, evictable = (num_bytes // LAYOUT.block_bytes for num_bytes in found)
    return leased, cached, evictable


def test_blocks_are_leased_sealed_and_given_back(instance: Instance) -> None:
    kv, client = instance.kv, instance.client
    cache = instance.open(tokens(40))
    assert kv.grow(cache, 40)
    assert (kv.num_used, kv.statistics().num_free, held(client)) == (3, 5, (8, 0, 0))
    assert kv.num_bytes == 8 * LAYOUT.block_bytes
    assert kv.grow(cache, 40)  # which it has already
    assert kv.num_used == 3
    instance.compute(cache)
    assert kv.seal(cache, tokens(40))
    assert held(client) == (6, 2, 0)
    instance.close(cache)
    assert held(client) == (0, 2, 2)
    assert (kv.num_used, kv.num_bytes) == (0, 0)


def test_blocks_of_one_lease_are_read_in_one_piece(instance: Instance) -> None:
    cache = instance.open(tokens(128))
    instance.compute(cache)
    assert len(list(cache.table._runs(0, 8))) == 1


def test_some_free_blocks_are_kept_while_sequences_run(instance: Instance) -> None:
    kv = instance.kv
    stays, leaves = instance.open(tokens(16)), instance.open(tokens(64 * SIZE, 1000))
    assert kv.grow(stays, 16)
    assert kv.grow(leaves, 64 * SIZE)
    instance.close(leaves, keep=False)
    assert (kv.num_used, kv.statistics().num_free) == (1, 32)
    kv.trim()
    assert held(instance.client) == (1, 0, 0)
    instance.close(stays)
    assert held(instance.client) == (0, 0, 0)


def test_another_instance_maps_the_very_bytes(instance: Instance, other: Instance) -> None:
    mine = instance.open(tokens(40))
    instance.compute(mine)
    assert instance.kv.seal(mine, tokens(40))
    theirs = other.open(tokens(40))
    assert theirs.num_cached == 32
    offsets = [[block.offset for block in cache.table.blocks[:2]] for cache in (mine, theirs)]
    assert offsets[0] == offsets[1]
    assert all(block.is_sealed for block in theirs.table.blocks)
    assert (other.statistics.prompt_tokens, other.statistics.hit_tokens) == (40, 32)
    other.compute(theirs)
    other.verify(theirs)
    instance.close(mine)
    assert held(other.client) == (8, 2, 0)  # pinned by the other one
    other.close(theirs)
    assert held(other.client) == (0, 2, 2)


def test_the_last_token_is_always_computed(instance: Instance) -> None:
    assert [instance.run(tokens(32)) for _ in range(2)] == [0, 16]
    assert instance.run(tokens(33)) == 32
    assert instance.run([]) == 0


@pytest.mark.parametrize("salts", [("", "a"), ("a", ""), ("a", "b")])
def test_a_salt_hides_what_was_computed(
    instance: Instance, other: Instance, salts: tuple[str, str]
) -> None:
    assert instance.run(tokens(40), salts[0]) == 0
    assert other.run(tokens(40), salts[1]) == 0
    assert other.run(tokens(40), salts[0]) == 32


def test_other_weights_find_nothing(instance: Instance, other: Instance) -> None:
    instance.run(tokens(40))
    assert Instance(other.client, weights="others").run(tokens(40)) == 0


def test_what_two_compute_at_once_is_kept_once(instance: Instance, other: Instance) -> None:
    caches = [one.open(tokens(40)) for one in (instance, other)]
    for one, cache in zip((instance, other), caches, strict=True):
        one.compute(cache)
        assert one.kv.seal(cache, tokens(40))
        one.verify(cache)
    assert held(other.client) == (8 - 2 + 8, 2, 0)
    for one, cache in zip((instance, other), caches, strict=True):
        one.close(cache)
    assert held(other.client) == (0, 2, 2)


def test_without_prefix_caching_nothing_stays(daemon: DaemonProcess) -> None:
    with daemon.connect() as client:
        instance = Instance(client, prefix_caching=False)
        assert [instance.run(tokens(40)) for _ in range(2)] == [0, 0]
        assert instance.statistics.prompt_tokens == 0
        assert held(client) == (0, 0, 0)


# --- a pool that is full


@pytest.fixture
def small(start_daemon: StartDaemon) -> DaemonProcess:
    """An allocator with room for 16 blocks."""
    return start_daemon("--memory-limit", str(16 * GRANULE))


def test_without_room_nothing_changes_and_the_reason_is_known(small: DaemonProcess) -> None:
    with small.connect() as client:
        instance = Instance(client)
        cache = instance.open(tokens(200))
        assert instance.kv.grow(cache, 9 * SIZE)
        assert not instance.kv.grow(cache, 17 * SIZE)
        assert "the limit is 1.0 MB, and 0.6 MB of it are in use" in instance.kv.problem
        instance.kv.check()
        assert (instance.kv.num_used, instance.statistics.num_free) == (9, 0)
        assert instance.kv.grow(cache, 16 * SIZE)  # fewer than are leased ahead
        assert held(client) == (16, 0, 0)
        with pytest.raises(OutOfKVMemory):
            PoolSource(client, LAYOUT).lease(1)
        instance.close(cache, keep=False)


def test_cached_blocks_go_before_room_is_refused(small: DaemonProcess) -> None:
    with small.connect() as client:
        instance = Instance(client)
        instance.run(tokens(7 * SIZE))
        instance.run(tokens(7 * SIZE, 1000))
        assert held(client) == (0, 14, 14)
        cache = instance.open(tokens(200, 2000))
        assert instance.kv.grow(cache, 16 * SIZE)
        assert held(client) == (16, 0, 0)
        instance.close(cache, keep=False)


def test_of_what_is_kept_the_end_goes_first(small: DaemonProcess) -> None:
    """Without its beginning a block is never found."""
    with small.connect() as client:
        instance = Instance(client)
        instance.run(tokens(10 * SIZE))
        instance.run(tokens(8 * SIZE, 1000))  # for which two of the ten had to go
        assert held(client) == (0, 16, 16)
        assert instance.open(tokens(10 * SIZE + 1)).num_cached == 8 * SIZE
        for cache in list(instance.tokens):
            instance.close(cache)


def test_any_number_of_blocks_is_leased_at_once_or_none(
    small: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.kv.source.MAX_BATCH", 4)
    with small.connect() as client:
        pool = PoolSource(client, LAYOUT)
        blocks = pool.lease(11)
        assert len({block.address for block in blocks}) == 11
        with pytest.raises(OutOfKVMemory):
            pool.lease(6)
        assert held(client) == (11, 0, 0)
        pool.release(blocks)
        assert held(client) == (0, 0, 0)


def test_what_a_sequence_maps_is_not_evicted(small: DaemonProcess) -> None:
    with small.connect() as client:
        instance = Instance(client)
        instance.run(tokens(8 * SIZE))
        finds = instance.open(tokens(8 * SIZE))
        needs = instance.open(tokens(9 * SIZE, 1000))
        assert finds.num_cached == 7 * SIZE
        assert not instance.kv.grow(needs, 10 * SIZE)
        assert instance.kv.grow(needs, 9 * SIZE)
        instance.verify(finds)
        instance.close(finds)
        instance.close(needs, keep=False)


def test_who_holds_more_than_its_part_is_told_while_another_lacks_room(
    small: DaemonProcess,
) -> None:
    with small.connect() as first, small.connect() as second:
        rich, poor = Instance(first), Instance(second)
        caches = [rich.open(tokens(SIZE, 1000 * n)) for n in range(2)]
        assert rich.kv.grow(caches[0], 10 * SIZE)
        assert rich.kv.grow(caches[1], 6 * SIZE)
        assert rich.kv.surplus() == (0, 0)
        needs = poor.open(tokens(SIZE))
        assert not poor.kv.grow(needs, SIZE)
        assert rich.kv.surplus() == (8, 0)
        rich.close(caches[1], keep=False)
        assert rich.statistics.num_free == 6
        assert rich.kv.surplus() == (2, 0)  # the free ones are counted, and given back
        assert rich.statistics.num_free == 0
        assert poor.kv.grow(needs, 4 * SIZE)
        poor.close(needs, keep=False)
        rich.close(caches[0], keep=False)


# --- an allocator that ends


def test_without_an_allocator_blocks_are_private_and_all_comes_back_with_the_next(
    daemon: DaemonProcess, start_daemon: StartDaemon
) -> None:
    with daemon.connect() as client:
        instance = Instance(client)
        kv = instance.kv
        instance.run(tokens(32, 5000))
        before = instance.open(tokens(100))
        instance.compute(before)
        daemon.kill()
        instance.verify(before)
        alone = instance.open(tokens(100, 1000))
        assert instance.compute(alone)
        assert kv.statistics().num_private > 0
        assert instance.open(tokens(33, 5000)).num_cached == 0
        assert kv.seal(before, tokens(100))
        assert kv.seal(alone, tokens(100, 1000))
        kv.check()
        for cache in list(instance.tokens)[1:]:
            instance.verify(cache)
            instance.close(cache)
        start_daemon()
        assert instance.run(tokens(33, 5000)) == 32
        instance.verify(before)
        assert kv.seal(before, tokens(100))
        assert instance.open(tokens(100)).num_cached == 96
        for cache in list(instance.tokens):
            instance.close(cache)
        assert held(client)[0] == 0
        assert kv.statistics() == CacheStatistics(0, 0, 0, *kv_lookups(kv))


def kv_lookups(kv: KVCache) -> tuple[int, int]:
    found = kv.statistics()
    return found.prompt_tokens, found.hit_tokens


def test_private_memory_has_an_end(daemon: DaemonProcess, start_daemon: StartDaemon) -> None:
    with daemon.connect() as client:
        kv = KVCache(LAYOUT, PoolSource(client, LAYOUT), private_limit_bytes=3 * LAYOUT.block_bytes)
        daemon.kill()
        cache = kv.open([1])
        assert not kv.grow(cache, 4 * SIZE)
        assert "holds 0 KV blocks of its own of at most 3: start an allocator" in kv.problem
        assert kv.grow(cache, 3 * SIZE)
        kv.close(cache)
        kv.check()
        assert kv.statistics().num_private == 0
        start_daemon()  # to clear away what the killed one left


class Stopped:
    """A daemon that takes no request any more: whoever asks waits until it is killed."""

    def __init__(self, daemon: DaemonProcess, client: Client) -> None:
        self._daemon, self._client = daemon, client
        os.kill(daemon.pid, signal.SIGSTOP)

    def kill_during(self, action: Callable[[], object]) -> list[object]:
        """What `action` returned, which asked something that was never answered."""
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.append(action()))
        thread.start()
        wait_until(lambda: self._client._connection._is_behind, "the request is on its way")
        self._daemon.kill()
        thread.join(TIMEOUT_S)
        return results


def test_an_allocator_that_ends_over_a_put_takes_the_blocks_of_that_sequence_alone(
    daemon: DaemonProcess, start_daemon: StartDaemon
) -> None:
    with daemon.connect() as client:
        instance = Instance(client)
        lost, stays = instance.open(tokens(40)), instance.open(tokens(40, 1000))
        for cache in (lost, stays):
            instance.compute(cache)
        stopped = Stopped(daemon, client)
        assert stopped.kill_during(lambda: instance.kv.seal(lost, tokens(40))) == [False]
        instance.verify(stays)
        instance.close(lost)  # as the engine's schedule does, with its tokens
        assert instance.kv.seal(stays, tokens(40, 1000))  # nobody answers: nothing is lost
        start_daemon()
        again = instance.open(tokens(40))
        assert again.num_cached == 0
        assert instance.compute(again)
        instance.verify(again)
        for cache in (again, stays):
            instance.close(cache)
        assert held(client) == (0, 4, 4)


def test_an_allocator_that_ends_over_a_close_leaks_nothing(
    daemon: DaemonProcess, start_daemon: StartDaemon
) -> None:
    with daemon.connect() as client:
        instance = Instance(client)
        cache = instance.open(tokens(40))
        instance.compute(cache)
        assert Stopped(daemon, client).kill_during(lambda: instance.close(cache)) == [None]
        assert instance.kv.num_bytes == 0
        start_daemon()
        assert instance.run(tokens(40)) == 0
        assert held(client) == (0, 2, 2)


def test_an_allocator_that_knows_nothing_of_the_session_leaves_what_is_held(
    daemon: DaemonProcess,
    start_daemon: StartDaemon,
    runtime_dir: RuntimeDir,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its pool is another: the same offset means other memory there."""
    with daemon.connect() as client:
        instance = Instance(client)
        old = instance.open(tokens(40))
        instance.compute(old)
        assert instance.kv.seal(old, tokens(40))
        daemon.kill()
        runtime_dir.journal.unlink()
        successor = start_daemon()
        instance.kv.trim()
        new = instance.open(tokens(40, 1000))
        assert instance.compute(new)
        third = old.table.blocks[2]
        assert third.held.extent == new.table.blocks[2].held.extent
        more = instance.tokens[old] = tokens(60)
        assert instance.compute(old)
        assert instance.kv.seal(old, more)
        assert not third.is_sealed
        with successor.connect() as second:
            theirs = Instance(second)
            theirs.run(tokens(40))
            theirs.run(tokens(60))
        assert instance.kv.seal(new, tokens(40, 1000))
        for cache in (old, new):
            instance.verify(cache)
            instance.close(cache)
        assert held(client)[0] == 0
        assert instance.run(tokens(41, 1000)) == 32
    assert "not accepted" in caplog.text  # what the old pool's leases are to the new one
    caplog.clear()  # its records refer to the old pool


# --- everything at random


class Sharing(RuleBasedStateMachine):
    """Two instances that open, grow, seal, close and trim, and an allocator that is killed."""

    START: StartDaemon
    DAEMONS: list[DaemonProcess]

    def __init__(self) -> None:
        super().__init__()
        self.daemon = self.START("--memory-limit", str(40 * GRANULE))
        self.instances = [Instance(self.daemon.connect()) for _ in range(2)]
        self.salts: dict[SequenceCache, str] = {}

    @property
    def open_ones(self) -> list[tuple[Instance, SequenceCache]]:
        return [(one, cache) for one in self.instances for cache in one.tokens]

    @rule(
        which=st.integers(0, 1),
        length=st.integers(1, 120),
        first=st.sampled_from([0, 1000]),
        own=st.integers(0, 40),
        salt=st.sampled_from(["", "s"]),
    )
    def open(self, which: int, length: int, first: int, own: int, salt: str) -> None:
        token_ids = [*tokens(length, first), *tokens(own, 5000 + 100 * len(self.salts))]
        cache = self.instances[which].open(token_ids, salt)
        self.salts[cache] = salt

    @precondition(lambda self: self.open_ones)
    @rule(data=st.data(), more=st.integers(0, 40))
    def compute(self, data: st.DataObject, more: int) -> None:
        one, cache = data.draw(st.sampled_from(self.open_ones))
        one.tokens[cache] += tokens(more, 7000)
        if not one.compute(cache, self.salts[cache]):
            assert one.kv.problem
            del one.tokens[cache][cache.table.num_tokens :]

    @precondition(lambda self: self.open_ones)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        one, cache = data.draw(st.sampled_from(self.open_ones))
        assert one.kv.seal(cache, one.tokens[cache])

    @precondition(lambda self: self.open_ones)
    @rule(data=st.data(), keep=st.booleans())
    def close(self, data: st.DataObject, keep: bool) -> None:
        one, cache = data.draw(st.sampled_from(self.open_ones))
        one.close(cache, keep=keep)

    @rule(which=st.integers(0, 1))
    def trim(self, which: int) -> None:
        self.instances[which].kv.trim()

    @rule(which=st.integers(0, 1))
    def share(self, which: int) -> None:
        assert self.instances[which].kv.surplus()[0] >= 0

    @rule(patience=st.integers(0, 3))
    def kill(self, patience: int) -> None:
        """Not every time, since the next one takes as long to start as a hundred other steps."""
        if patience == 0:
            self.daemon.kill()
        elif patience == 1 and self.daemon.process.poll() is not None:
            self.start()

    def start(self) -> None:
        self.daemon = self.START("--memory-limit", str(40 * GRANULE))

    @invariant()
    def all_is_accounted_for(self) -> None:
        for one in self.instances:
            one.kv.check()
        for one, cache in self.open_ones:
            one.verify(cache, self.salts[cache])
        if self.daemon.process.poll() is None:
            for one in self.instances:
                one.client.pool_share()  # which lets a new allocator hear of what was given up
            with self.daemon.connect() as looking:
                leased, cached, evictable = held(looking)
            writable = 0
            pinned: set[int] = set()
            for one in self.instances:
                blocks = [b for cache in one.tokens for b in cache.table.blocks] + one.kv._free
                writable += sum(not b.is_sealed and not b.is_private for b in blocks)
                pinned |= {b.offset for b in blocks if b.is_sealed}
            assert (leased, cached - evictable) == (writable, len(pinned))

    def teardown(self) -> None:
        if self.daemon.process.poll() is not None:
            self.start()
        for one, cache in self.open_ones:
            one.close(cache)
        for one in self.instances:
            one.kv.trim()
            assert one.kv.num_bytes == 0
        self.all_is_accounted_for()
        for one in self.instances:
            one.client.close()
        self.daemon.stop()


def test_at_random(start_daemon: StartDaemon) -> None:
    Sharing.START = staticmethod(start_daemon)
    Sharing.TestCase.settings = settings(
        max_examples=5,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Sharing.TestCase("runTest").runTest()
