"""A further rank's process: it builds its part of the model, and makes the passes it is told of.

Owns this process's part of the instance, from its fork to its exit. Invariants: it computes what
the first rank does, in the same order, and nothing else; it has no session: what it maps, the first
rank holds; it never outlives the first rank. Has no sockets but the link, no scheduler, no sampler.
"""

import contextlib
import json
import logging
from typing import Final

import msgspec
import numpy as np
import torch

from allocator import AllocatorError, PoolView, WeightSetView
from workers.errors import RankEnded, RankError, RankTimedOut, WorkerError, unexpected
from workers.kv.common import CommonMemory
from workers.model.batch import Batch, Part
from workers.model.decoder import Model, build_model
from workers.packed_format import decoded
from workers.placement.all_reduce import AllReduce
from workers.placement.resident import Resident
from workers.process import linux
from workers.process.rank_link import Link
from workers.process.rank_messages import (
    Begin,
    Compute,
    Failed,
    Mapped,
    PartOfStep,
    Prepared,
    Rest,
    Step,
    ToRank,
    Undone,
    decode_to_rank,
    encode,
)
from workers.process.rank_mirror import Mirror
from workers.weight_format import float_dtype

log = logging.getLogger("onecopy.instance")

_SEND_S: Final = 60.0
_VERDICT_S: Final = 5.0
"""How long the first rank may take to go on after an error of a pass here. It has met the same by
then, or waits for this rank in a sum: then it is let go."""


def follow(rank: int, num_ranks: int, link: Link, common: CommonMemory) -> int:
    """A rank's whole life. Returns its exit status."""
    try:
        follower = _begun(rank, num_ranks, link, common)
        if follower is None:
            return 1
        with contextlib.closing(follower):
            follower.run()
    except RankError as error:
        if isinstance(error, RankEnded) and error.rank == 0:
            return 0
        log.warning("rank %d ends: %s", rank, error)
    return 1


def _begun(rank: int, num_ranks: int, link: Link, common: CommonMemory) -> "_Follower | None":
    """None where it can't have its part, which it says. Raises RankError."""
    begin = _hear(link)
    if not isinstance(begin, Begin):
        raise RankError(f"the first rank begins by {type(begin).__name__}", 0)
    try:
        return _Follower(rank, num_ranks, link, common, begin)
    except RankError:
        raise
    except (WorkerError, AllocatorError) as error:
        failed = Failed(code=error.code, message=str(error))
    except Exception as error:
        log.exception("rank %d can't have its part of the model", rank)
        failed = Failed(code="internal", message=unexpected(error))
    link.send(encode(failed), _SEND_S)
    return None


class _Follower:
    def __init__(
        self, rank: int, num_ranks: int, link: Link, common: CommonMemory, begin: Begin
    ) -> None:
        self._link = link
        self._num_threads = begin.num_threads
        torch.set_num_threads(begin.module_threads)
        pool = PoolView(begin.pool)
        pool.map(begin.group, writable=True)
        first, num_bytes = begin.group.offset, begin.group.num_bytes
        memory = pool.window()[first : first + num_bytes]
        link.send(encode(Mapped()), _SEND_S)
        self._group = AllReduce(memory, rank, num_ranks, begin.timeout_s)
        self._weights = WeightSetView(begin.weights)
        self._model, reason = self._built(begin)
        self._mirror = Mirror(self._model.geometry.kv_layout, common, pool)
        link.send(encode(Prepared(kernels=self._model.kernels or "", reason=reason)), _SEND_S)

    def _built(self, begin: Begin) -> tuple[Model, str]:
        tensors, metadata = self._weights.tensors(), self._weights.manifest.metadata
        named = getattr(torch, metadata.get("dtype", ""), None)
        dtype = named if isinstance(named, torch.dtype) else float_dtype(tensors)
        config = json.loads(metadata["config"])
        cut_by = self._group if begin.divides == "model" else None
        packed = decoded(metadata)
        model = build_model(config, Resident(tensors), dtype, ranks=cut_by, packed=packed)
        if cut_by is None:
            model.divide_by(self._group)
        model.workspace_bytes = begin.attention_workspace
        reason = model.accelerate(
            begin.max_rows,
            begin.max_model_len,
            begin.num_threads,
            lambda: self._num_threads,
            begin.kernels,
        )
        return model, reason or ""

    def run(self) -> None:
        """Until the first rank has ended, or this one can't go on. Raises RankError."""
        while True:
            message = _hear(self._link)
            match message:
                case Compute(natively=natively):
                    if not natively:
                        self._model.compute_by_modules()
                case Step():
                    self._make(message)
                case Rest(gone=gone):
                    self._mirror.drop(gone)
                    linux.trim_heap()
                case Begin():
                    raise RankError("the first rank begins a second time", 0)

    def close(self) -> None:
        """The others need not wait for this rank."""
        self._group.close()
        self._mirror.close()

    def _make(self, step: Step) -> None:
        self._num_threads = step.num_threads
        self._mirror.drop(step.gone)
        for pool in step.pools:
            self._mirror.add_pool(pool)
        batch = Batch.of([self._part(part) for part in step.parts])
        try:
            self._model.forward(batch)
        except RankError:
            raise
        except Exception as error:
            log.exception("a pass of rank %d failed", self._group.rank)
            self._link.send(encode(Undone(message=unexpected(error))), _SEND_S)
            self._await_word(error)

    def _await_word(self, error: Exception) -> None:
        """Raises RankError where the first rank does not go on: it must not wait for this one."""
        if not self._link.has_more(_VERDICT_S):
            raise RankTimedOut("the first rank did not meet the error of this one", 0) from error

    def _part(self, part: PartOfStep) -> Part:
        token_ids = np.frombuffer(part.token_ids, dtype=np.int32).tolist()
        return Part(self._mirror.table(part), token_ids, part.num_logits)


def _hear(link: Link) -> ToRank:
    try:
        return decode_to_rank(link.receive())
    except msgspec.DecodeError as error:
        raise RankError(f"the first rank says what is no message: {error}", 0) from error
