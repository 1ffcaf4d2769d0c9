"""An instance's engine, put together: weights attached and placed, model bound, cache, ranks.

Owns the order of that, and what of the settings each part is made by. Invariant: what has to end
before the session is in the given resources, whichever step failed. Does not know the server, which
is told how far it is by the given functions.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allocator import (
    Client,
    RuntimeDir,
    UnknownWeightSet,
    device_fault,
)
from workers.checkpoint import (
    AttachedWeights,
    attach,
    attach_served,
)
from workers.config.context_length import max_positions
from workers.config.encoder_settings import task_of
from workers.engine.embed import EmbeddingEngine
from workers.engine.generate import GenerationEngine
from workers.engine.protocol import Engine
from workers.errors import InvalidSetting
from workers.kv.cache import KVCache
from workers.kv.source import PoolSource
from workers.messages import (
    InstanceSpec,
    ModelFacts,
)
from workers.model.decoder import build_model
from workers.model.encoder import build_embedding_model
from workers.model.native import Unavailable, load
from workers.packed_format import decoded
from workers.placement.all_reduce import AllReduce
from workers.placement.choice import choose
from workers.placement.kept import check_kept, require_kept
from workers.placement.packing import open_as_served
from workers.placement.place import place
from workers.placement.rank_sums import num_summed
from workers.placement.series_choice import check_series
from workers.process.cores import SharedCores
from workers.process.first_rank import FirstRank, patience_s
from workers.process.node_pinning import Pinning
from workers.process.rank_processes import RankProcesses
from workers.skeleton.decoder import skeleton
from workers.weight_format import float_dtype

log = logging.getLogger("onecopy.instance")


@dataclass(frozen=True, slots=True)
class Assembled:
    """An engine that can serve, and what is to be said of it."""

    engine: Engine
    facts: ModelFacts
    weights: AttachedWeights
    """Kept so that what is attached stays mapped, also the segment of mapped files, of which no
    tensor is a view: `onecopy verify` looks for it."""
    kernels: str | None
    warm_up: Callable[[], None]
    """A first pass."""
    ranks: FirstRank | None = None
    """Where several compute it."""


class Assembly:
    """Of one instance, once."""

    def __init__(
        self,
        spec: InstanceSpec,
        memory: Client,
        resources: contextlib.ExitStack,
        processes: RankProcesses | None,
        works_on: Callable[[Sequence[str]], None],
        loading: Callable[[int, int, int], None],
        ended: Callable[[str], None],
        pinning: Pinning | None = None,
    ) -> None:
        """`loading` is told (written bytes, all bytes, pid of the writer), `ended` the name of each
        phase that is over. With `pinning` ranks are on nodes of their own."""
        self._pinning = pinning
        self._spec = spec
        self._settings = spec.settings
        self._memory = memory
        self._resources = resources
        self._processes = processes
        self._works_on = works_on
        self._loading = loading
        self._ended = ended
        self._ranks: FirstRank | None = None
        self.cores: SharedCores | None = None
        """Where instances share them."""

    def assemble(self) -> Assembled:
        """Raises WorkerError, AllocatorError, and whatever an architecture raises."""
        spec, settings, memory = self._spec, self._settings, self._memory
        torch.set_num_threads(self._threads()[0])
        weights, eos_token_ids = self._attach()
        dtype = weights.dtype or float_dtype(weights.tensors)
        self._ended("weights")
        if settings.threads is None:
            cores = RuntimeDir.open(spec.runtime_dir, create=False).cores
            num_cores = None if self._pinning is None else self._pinning.num_cores
            self.cores = SharedCores(cores, os.getpid(), num_cores)
        if task_of(weights.metadata) == "embed":
            return self._assemble_embedding(weights, dtype)
        config = json.loads(weights.metadata["config"])
        placement = place(memory, weights, settings.offload_depth, self._resources)
        self._check_kernels()
        group = self._form_ranks(weights, config, dtype)
        cut_by = group if settings.tensor_parallel_size > 1 else None
        packed = decoded(weights.metadata)
        model = build_model(
            config, placement, dtype, eos_token_ids, cut_by, packed, settings.kv_bits
        )
        if group is not None and cut_by is None:
            model.divide_by(group)
        limit = model.geometry.max_model_len
        max_model_len = self._max_model_len(limit, limit)
        model.workspace_bytes = settings.attention_workspace
        most, now = self._threads()
        reason = model.accelerate(
            settings.most_rows, max_model_len, most, now, settings.cpu_kernels
        )
        require_kept(settings, dtype, reason)
        layout = model.geometry.kv_layout
        own_memory = None
        if self._ranks is not None:
            reason = self._ranks.agree(model, reason)
            own_memory = self._ranks.source(layout)
        self._ended("model")
        if weights.loaded:  # who loads a model finds out whether it can be computed at all
            self._log_kernels(model.geometry.architecture, model.kernels, reason)
            model.warm_up(own_memory)
            self._ended("first_forward")
        kv = KVCache(
            layout,
            PoolSource(memory, layout),
            weights=weights.identity(model.kernels),
            device=model.device,
            prefix_caching=settings.prefix_caching,
            private=own_memory,
        )
        engine = GenerationEngine(
            model,
            max_model_len,
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            kv,
            settings.num_speculative_tokens,
            Path(spec.tokenizer) if spec.tokenizer else None,
            attention_span=model.geometry.attention_span,
            device_fault=functools.partial(device_fault, memory.device),
            works_on=self._works_on,
        )
        facts = model.geometry.facts(max_model_len)
        warm_up = functools.partial(model.warm_up, own_memory)
        return Assembled(engine, facts, weights, model.kernels, warm_up, self._ranks)

    def _check_ranks(self, metadata: Mapping[str, str]) -> None:
        """Raises InvalidSetting where several can't compute this model."""
        size = self._settings.num_ranks
        if size > 1 and task_of(metadata) == "embed":
            raise InvalidSetting(
                f"{self._settings.ranks_asked_by} is {size}, and a model that embeds has one rank: "
                f"leave it out; --instances {size} serves as many requests, from one copy of the "
                "weights"
            )

    def _form_ranks(
        self, weights: AttachedWeights, config: dict[str, Any], dtype: torch.dtype
    ) -> AllReduce | None:
        """Those that compute the model together; None for one."""
        if self._processes is None:
            return None
        module = skeleton(config, dtype)
        limit = max_positions(module.config)
        patience = patience_s(self._spec.hang_timeout_s)
        self._ranks = FirstRank(self._processes, *self._threads(), patience)
        self._resources.callback(self._ranks.close)
        return self._ranks.form(
            self._memory,
            weights,
            self._settings,
            num_summed(self._settings, module),
            self._max_model_len(limit, limit),
        )

    def _attach(self) -> tuple[AttachedWeights, tuple[int, ...] | None]:
        """The set that is served, wherever it is, and the tokens that end an answer; what was
        evicted, or lost with an allocator, is loaded anew, if the files are still those that it was
        made from."""
        spec = self._spec
        if spec.weight_set:
            try:
                return attach_served(
                    self._memory, spec.weight_set, self._loading
                ), spec.eos_token_ids
            except UnknownWeightSet:
                log.info("%s is not in memory any more", spec.weight_set)
        checkpoint = open_as_served(spec.model, self._settings)
        self._check_ranks(checkpoint.metadata())
        check_series(checkpoint, self._settings)
        check_kept(checkpoint, self._settings)
        ends = spec.eos_token_ids if spec.weight_set else checkpoint.eos_token_ids()
        weights = attach(
            self._memory,
            checkpoint,
            self._loading,
            map_files=self._settings.map_files,
            offloaded=choose(checkpoint, self._settings, self._converting),
            only=spec.weight_set,
        )
        return weights, ends

    def _assemble_embedding(self, weights: AttachedWeights, dtype: torch.dtype) -> Assembled:
        model = build_embedding_model(weights.metadata, weights.tensors, dtype)
        max_model_len = self._max_model_len(model.max_model_len, model.advised_max_model_len)
        self._check_kernels()
        most, now = self._threads()
        most_rows = max(self._settings.max_num_batched_tokens, max_model_len)
        reason = model.accelerate(most_rows, max_model_len, most, now, self._settings.cpu_kernels)
        self._ended("model")
        if weights.loaded:
            self._log_kernels(type(model.module).__name__, model.kernels, reason)
            model.warm_up()
            self._ended("first_forward")
        threads_now = None if self.cores is None else self.cores.fair_part
        engine = EmbeddingEngine(
            model,
            max_model_len,
            self._settings.max_num_batched_tokens,
            threads_now=threads_now,
            device_fault=functools.partial(device_fault, self._memory.device),
            works_on=self._works_on,
        )
        facts = model.facts(max_model_len)
        return Assembled(engine, facts, weights, model.kernels, model.warm_up)

    def _max_model_len(self, limit: int, default: int) -> int:
        """As it was asked for. Raises InvalidSetting beyond the model's `limit`."""
        asked = self._settings.max_model_len or default
        if asked > limit:
            raise InvalidSetting(
                f"--max-model-len is {asked}, but this model was made for {limit} tokens"
            )
        return asked

    def _threads(self) -> tuple[int, Callable[[], int] | None]:
        """The most that a step may use on each rank, and what says how many now."""
        size, cores = self._settings.num_ranks, self.cores
        if cores is None:
            return max(1, self._spec.num_threads // size), None
        if self._pinning is not None:
            size = self._pinning.ranks_a_node
        if size == 1:
            return cores.num_cores, cores.fair_part
        return max(1, cores.num_cores // size), lambda: max(1, cores.fair_part() // size)

    def _log_kernels(self, architecture: str, kernels: str | None, reason: str | None) -> None:
        how = f"by transformers: {reason}" if reason else f"by kernels for {kernels}"
        log.info("%s is computed %s", architecture, how)

    def _check_kernels(self) -> None:
        """Raises InvalidSetting where those asked for can't be used here."""
        wanted = self._settings.cpu_kernels
        try:
            if wanted != "auto":
                load(wanted)
        except Unavailable as reason:
            raise InvalidSetting(f"--cpu-kernels {wanted}: {reason}") from reason

    def _converting(self, num_bytes: int, total_bytes: int) -> None:
        self._loading(num_bytes, total_bytes, os.getpid())
