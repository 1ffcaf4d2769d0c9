"""The first rank's word to the others: what to build, and what to compute in each pass.

Owns the links' use on this side, and what the other ranks know of its tables. Invariants: a pass is
told before it is computed, to all ranks, in one order; of blocks only what is new is told; after an
error all ranks have made the same sums, or the instance ends (`RanksLost`). Does not know the
scheduler, or how ranks sum.
"""

import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn, TypeVar

import msgspec
import numpy as np
import torch

from allocator import Block, Lease
from allocator.messages import Handle
from workers.errors import RankError, RanksLost
from workers.kv.block import KVBlock
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.process.rank_link import Link
from workers.process.rank_messages import (
    COMMON,
    Begin,
    Compute,
    Failed,
    FromRank,
    Mapped,
    PartOfStep,
    Prepared,
    Rest,
    Step,
    ToRank,
    Undone,
    decode_from_rank,
    encode,
)

_UNDONE_S: Final = 10.0
"""How long the others may take to meet the error of a pass that this rank has met."""

R = TypeVar("R", Mapped, Prepared)


class Lead:
    """Of the first rank. One thread calls it."""

    def __init__(
        self, links: Sequence[Link], timeout_s: float, threads_now: Callable[[], int]
    ) -> None:
        """`threads_now` says with how many threads each rank computes a pass."""
        self._links = links
        self._timeout_s = timeout_s
        self._threads_now = threads_now
        self._tables: dict[int, tuple[BlockTable, int, int]] = {}
        """Table's identity → table, its number, and how many of its blocks were told."""
        self._num_tables = 0
        self._pools: dict[int, tuple[torch.Tensor, int]] = {}
        """Storage's identity → storage, and the pool's number."""

    # --- the start

    def begin(self, begin: Begin, group: Lease) -> None:
        """All others begin, and are about to join; `group` is the lease of `begin.group`. Raises
        RankError, also for one that can't."""
        storage = group.window()
        self._pools[id(storage)] = storage, 1
        self._tell(begin)
        self._expect(Mapped, self._timeout_s)

    def prepared(self, timeout_s: float) -> list[Prepared]:
        """What each of them has. Raises RankError, also for one that can't have its part."""
        return self._expect(Prepared, timeout_s)

    def compute(self, *, natively: bool) -> None:
        """All others compute in that way. Raises RankError."""
        self._tell(Compute(natively=natively))

    # --- passes

    @contextmanager
    def passes(self, batch: Batch) -> Iterator[None]:
        """The others make the pass that is made inside. Raises RanksLost; what is raised inside
        goes on where all ranks have met it."""
        try:
            self._tell(self._step(batch))
            yield
        except RankError as error:
            raise RanksLost(str(error), error.rank) from error
        except Exception as error:
            self._await_undone(error)
            raise

    def rest(self) -> None:
        """No pass follows for now. Raises RanksLost."""
        try:
            self._tell(Rest(gone=self._gone()))
        except RankError as error:
            raise RanksLost(str(error), error.rank) from error

    def check(self) -> None:
        """Between passes no rank has anything to say. Raises RanksLost where one has ended."""
        readable, _, _ = select.select(self._links, [], [], 0)
        for link in readable:
            try:
                answer = self._hear(link, self._timeout_s)
            except RankError as error:
                raise RanksLost(str(error), error.rank) from error
            self._disagree(link, answer)

    # --- steps

    def _tell(self, message: ToRank) -> None:
        frame = encode(message)
        for link in self._links:
            link.send(frame, self._timeout_s)

    def _expect(self, kind: type[R], timeout_s: float) -> list[R]:
        """One from each. Raises RankError."""
        found: list[R] = []
        for link in self._links:
            answer = self._hear(link, timeout_s)
            if not isinstance(answer, kind):
                said = answer.message if isinstance(answer, Failed) else type(answer).__name__
                raise RankError(f"rank {link.rank}: {said}", link.rank)
            found.append(answer)
        return found

    def _hear(self, link: Link, timeout_s: float) -> FromRank:
        try:
            return decode_from_rank(link.receive(timeout_s))
        except msgspec.DecodeError as error:
            raise RankError(f"rank {link.rank} says what is no message: {error}") from error

    def _await_undone(self, error: Exception) -> None:
        """Where every rank met an error of its own between the same two sums, all are as they were
        before the pass: none can come past a sum that another did not make."""
        for link in self._links:
            try:
                answer = self._hear(link, _UNDONE_S)
            except RankError as lost:
                text = f"{lost}, while this one met {type(error).__name__}: {error}"
                raise RanksLost(text, lost.rank) from error
            if not isinstance(answer, Undone):
                self._disagree(link, answer)

    def _disagree(self, link: Link, answer: FromRank) -> NoReturn:
        said = getattr(answer, "message", type(answer).__name__)
        raise RanksLost(f"rank {link.rank} met what others did not: {said}", link.rank)

    def _step(self, batch: Batch) -> Step:
        gone = self._gone()
        pools: list[Handle] = []
        parts = tuple(self._part(part, pools) for part in batch.parts)
        return Step(gone=gone, pools=tuple(pools), parts=parts, num_threads=self._threads_now())

    def _gone(self) -> tuple[int, ...]:
        """Tables whose blocks were let go."""
        over = [key for key, (table, _, _) in self._tables.items() if not table.blocks]
        return tuple(self._tables.pop(key)[1] for key in over)

    def _part(self, part: Part, pools: list[Handle]) -> PartOfStep:
        table = part.table
        _, number, told = self._tables.get(id(table), (table, self._num_tables, 0))
        if number == self._num_tables:
            self._num_tables += 1
        new = [self._place(block, pools) for block in table.blocks[told:]]
        self._tables[id(table)] = table, number, len(table.blocks)
        return PartOfStep(
            table=number,
            num_tokens=table.num_tokens,
            first_block=told,
            blocks=np.array(new, dtype=np.int64).tobytes(),
            token_ids=np.array(part.token_ids, dtype=np.int32).tobytes(),
            num_logits=part.num_logits,
        )

    def _place(self, block: KVBlock, pools: list[Handle]) -> tuple[int, int, bool]:
        held = block.held
        if held is None:
            return COMMON, block.offset, True
        known = self._pools.get(id(block.storage))
        if known is None:
            known = block.storage, len(self._pools) + 1
            self._pools[id(block.storage)] = known
            pools.append(held.pool)
        return known[1], block.offset, not isinstance(held, Block)
