"""Ranks of one instance without a server: what they compute, and what ends them.

Owns their making for these tests: processes forked from the test's, on a real allocator.
"""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from allocator import Client
from tests.daemon_process import DaemonProcess
from tests.workers.engine.engines import PROMPTS, expected, only, reference, request, run, tokens
from tests.workers.model.tiny_families import save
from workers.checkpoint import attach, open_checkpoint
from workers.engine.generate import GenerationEngine
from workers.errors import RankEnded, RankError, RanksLost, RankTimedOut
from workers.kv.cache import KVCache
from workers.kv.layout import KVLayer, KVLayout
from workers.kv.prefix import root_digest
from workers.kv.source import PoolSource, PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.decoder import build_model
from workers.model.divided import division
from workers.model.native.decoder import num_summed
from workers.placement.resident import Resident
from workers.process.first_rank import FirstRank, patience_s
from workers.process.rank_follow import follow
from workers.process.rank_link import Link
from workers.process.rank_messages import MAX_FRAME_BYTES, PartOfStep, Step, encode
from workers.process.rank_processes import RankProcesses
from workers.settings import checked

BLOCK_BYTES = 64 << 10
MAX_LEN = 128


def work(rank: int, link: Link, memory: object, num_ranks: int) -> int:
    torch.set_num_threads(1)
    return follow(rank, num_ranks, link, memory)  # type: ignore[arg-type]


class Ranks:
    """The tiny llama on several ranks, of which this process is the first."""

    def __init__(
        self,
        num_ranks: int,
        memory: Client,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 512,
        divides: str = "tensor",
    ) -> None:
        self.memory = memory
        self.processes = RankProcesses("t", num_ranks, (), partial(work, num_ranks=num_ranks))
        self.first = FirstRank(self.processes, 1, None)
        options = {"max_num_batched_tokens": max_rows - 4, "max_num_seqs": 4}
        settings = checked({f"{divides}_parallel_size": num_ranks, **options})
        capacity = num_summed(max_rows, 64) if divides == "tensor" else 100
        weights = attach(memory, open_checkpoint(save(reference("llama", dtype), folder)))
        group = self.first.form(memory, weights, settings, capacity, MAX_LEN)
        config = json.loads(weights.metadata["config"])
        cut_by = group if divides == "tensor" else None
        self.model = build_model(config, Resident(weights.tensors), dtype, ranks=cut_by)
        if cut_by is None:
            self.model.divide_by(group)
        reason = self.model.accelerate(max_rows, MAX_LEN, 1)
        self.reason = self.first.agree(self.model, reason)
        self.layout = self.model.geometry.kv_layout

    def engine(self, *, pool: bool = True, num_batched: int = 256) -> GenerationEngine:
        kv = KVCache(
            self.layout,
            PoolSource(self.memory, self.layout) if pool else None,
            weights="llama",
            private=self.first.source(self.layout),
        )
        return GenerationEngine(
            self.model, MAX_LEN, max_num_batched_tokens=num_batched, kv=kv, num_speculative_tokens=2
        )


Make = Callable[..., Ranks]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Ranks that have ended when the test is over."""
    made: list[Ranks] = []

    def start(num_ranks: int, memory: Client, **changes: object) -> Ranks:
        made.append(Ranks(num_ranks, memory, tmp_path / str(len(made)), **changes))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for one in made:
        one.first.close()
    made.clear()  # `start` may outlive this, and with it what ranks map


DIVIDES = pytest.mark.parametrize("divides", ["tensor", "data"])


@DIVIDES
def test_sequences_give_way_and_come_back_on_three_ranks(
    start_daemon: Callable[..., DaemonProcess], make: Make, divides: str
) -> None:
    """Room for six blocks beside weights and sums: all ranks' parts are in one."""
    daemon = start_daemon("--memory-limit", str(18 * BLOCK_BYTES))
    with daemon.connect() as memory:
        ranks = make(3, memory, max_rows=64, divides=divides)
        engine = ranks.engine(num_batched=16)
        outputs = run(engine, *(request(str(i), one) for i, one in enumerate(PROMPTS)))
        assert [tokens(outputs[str(i)]) for i in range(len(PROMPTS))] == expected("llama")
        assert engine.report(()).num_preempted > 0
        again = run(engine, request("again", [*PROMPTS[4], 7]))["again"]
        assert again[0].num_cached >= 32
        memory.check_integrity()
        ranks.first.close()


@DIVIDES
def test_without_a_pool_ranks_use_what_they_have_in_common(
    memory: Client, make: Make, divides: str
) -> None:
    ranks = make(2, memory, divides=divides)
    engine = ranks.engine(pool=False)
    for _ in range(2):
        outputs = run(engine, *(request(str(i), one) for i, one in enumerate(PROMPTS)))
        assert [tokens(outputs[str(i)]) for i in range(len(PROMPTS))] == expected("llama")


@DIVIDES
def test_what_ranks_refuse_is_the_requests_matter(
    memory: Client, make: Make, divides: str, caplog: pytest.LogCaptureFixture
) -> None:
    """More rows than the kernels were made for: of one sequence, so that where sequences are
    divided one rank refuses them, and the other hears of it."""
    ranks = make(2, memory, dtype=torch.bfloat16, max_rows=8, divides=divides)
    assert (ranks.reason, ranks.model.kernels is None) == (None, False)
    engine = ranks.engine()
    assert only(engine, request("long", PROMPTS[4]))[1:] == (
        "error",
        "the forward pass failed: 40 rows: at most 8",
    )
    outputs = run(engine, request("long", PROMPTS[4]), request("short", PROMPTS[1]))
    assert [outputs[name][-1].finish_reason for name in ("long", "short")] == ["error", "length"]
    caplog.clear()  # the traceback has what ranks map


def test_a_signal_to_all_processes_ends_no_rank(memory: Client, make: Make) -> None:
    ranks = make(2, memory)
    for pid in ranks.processes.pids:
        os.kill(pid, signal.SIGTERM)
    assert only(ranks.engine(), request("a", PROMPTS[2]))[0] == expected("llama")[2]


def test_a_rank_that_is_killed_ends_what_all_compute(memory: Client, make: Make) -> None:
    ranks = make(3, memory)
    engine = ranks.engine()
    engine.add(request("a", PROMPTS[4]))
    engine.step()
    os.kill(ranks.processes.pids[1], signal.SIGKILL)
    with pytest.raises(RanksLost, match="rank 2 of 3") as lost:
        run(engine)
    assert ranks.processes.status(lost.value.rank) == -signal.SIGKILL
    with pytest.raises(RanksLost, match="rank 2 of 3 has ended"):
        ranks.first.check()
    ranks.first.close()
    assert ranks.processes.status(2) == -signal.SIGKILL
    assert ranks.processes.status(0) is None


def test_a_rank_that_is_told_what_can_not_be_ends(memory: Client, make: Make) -> None:
    ranks = make(2, memory)
    part = PartOfStep(table=0, num_tokens=0, first_block=7, blocks=b"", token_ids=b"", num_logits=0)
    step = Step(gone=(), pools=(), parts=(part,), num_threads=1)
    ranks.processes.links[0].send(encode(step), 60.0)
    with pytest.raises(RanksLost):
        only(ranks.engine(), request("a", PROMPTS[4]))
    assert ranks.processes.status(1, 60.0) == 1


def test_an_error_of_the_first_rank_alone_ends_what_all_compute(memory: Client, make: Make) -> None:
    ranks = make(2, memory)
    table = BlockTable(ranks.layout, ranks.first.source(ranks.layout).lease(1))
    batch = Batch.of([Part(table, [5], 1)])
    with (
        pytest.raises(RanksLost, match="while this one met ValueError: only here"),
        ranks.first.passes(batch),
    ):
        raise ValueError("only here")


def test_a_rank_is_waited_for_longer_than_one_may_be_stopped() -> None:
    assert patience_s(3.0) == 63.0
    assert patience_s(600.0) == 660.0
    assert patience_s(0.0) == patience_s(1e12) > 1e6  # for ever, as a socket knows it
    first, other = Link.pair(1, 2)
    other.send(b"x", patience_s(0.0))
    assert first.receive(patience_s(0.0)) == b"x"
    first.close()
    other.close()


def test_prefixes_are_of_as_many_ranks() -> None:
    part = (KVLayer(1, 16),)
    layouts = [
        KVLayout((KVLayer(2, 16),), torch.float32),
        KVLayout(part, torch.float32),
        KVLayout(part, torch.float32, of_ranks=(part, part)),
        KVLayout(part, torch.float32, of_ranks=(part, part, part)),
    ]
    assert len({root_digest("w", layout) for layout in layouts}) == len(layouts)


def test_parts_of_a_block_lie_one_behind_the_other() -> None:
    small, large = (KVLayer(1, 20),) * 3, (KVLayer(2, 20),) * 3
    whole = KVLayout((KVLayer(3, 20),) * 3, torch.bfloat16)
    ranks = [
        KVLayout(layers, torch.bfloat16, of_ranks=(small, large), rank=rank)
        for rank, layers in enumerate((small, large))
    ]
    assert {one.block_bytes for one in ranks} == {whole.block_bytes}
    assert {one.bytes_per_token for one in ranks} == {whole.bytes_per_token}
    offsets = [*ranks[0].layer_offsets, *ranks[1].layer_offsets]
    assert offsets == sorted(set(offsets))
    assert ranks[1].layer_offsets[0] == 3 * 2 * 20 * 16 * 2
    # What one writes, another does not see.
    blocks = PrivateSource(ranks[0]).lease(1)
    tables = [BlockTable(one, blocks) for one in ranks]
    for number, (table, heads) in enumerate(zip(tables, (1, 2), strict=True), 1):
        for layer in range(3):
            table.write(layer, *(torch.full((1, heads, 16, 20), number, dtype=torch.bfloat16),) * 2)
        table.commit(16)
    for number, table in enumerate(tables, 1):
        for layer in range(3):
            keys, values = table.read(layer, 0, 16)
            assert set(keys.flatten().tolist()) == set(values.flatten().tolist()) == {number}


def test_sequences_are_divided_so_that_all_have_as_much_to_do() -> None:
    assert division([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert division([3, 100, 4, 1], 2) == [1, 0, 1, 1]
    assert division([7], 3) == [0]
    assert division([], 3) == []


# --- links


@pytest.fixture
def link() -> Iterator[tuple[Link, Link]]:
    first, other = Link.pair(1, 2)
    yield first, other
    first.close()
    other.close()


def test_a_frame_comes_whole(link: tuple[Link, Link]) -> None:
    first, other = link
    for frame in (b"", b"a", bytes(100_000)):
        first.send(frame, 60.0)
        assert other.receive(60.0) == frame
    assert not first.has_more(0.0)
    other.send(b"b", 60.0)
    assert first.has_more(60.0)


def test_nobody_waits_longer_than_it_said(link: tuple[Link, Link]) -> None:
    first, other = link
    with pytest.raises(RankTimedOut, match=r"rank 1 of 2 was waited for 0\.01 s"):
        first.receive(0.01)
    with pytest.raises(RankTimedOut, match="rank 1 of 2"):  # it reads nothing
        first.send(bytes(MAX_FRAME_BYTES), 0.01)
    other.close()
    with pytest.raises(RankEnded, match="rank 1 of 2 has ended"):
        first.send(bytes(MAX_FRAME_BYTES), 60.0)
    with pytest.raises(RankEnded):
        first.receive(60.0)


def test_what_is_no_frame_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    link = Link(ours, 1, 2)
    with pytest.raises(RankError, match="a message of"):
        link.send(bytes(MAX_FRAME_BYTES + 1), 60.0)
    theirs.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(RankError, match="a message of 4294967295 bytes"):
        link.receive(60.0)
    theirs.sendall(b"\x05\x00\x00\x00ab")
    theirs.close()
    with pytest.raises(RankEnded):  # in the middle
        link.receive(60.0)
    link.close()
