"""One instance's process: weights attached, model bound, engine fed from the server's socket.

Owns the instance's life from its fork to its exit. Invariants: it announces itself exactly once,
as ready or as failed; its pulse says what it is at before it is at it; while requests run, messages
are read between steps and never waited for; whatever a request holds, it is answered; after a drain
every accepted request has ended. Does not know text.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import zmq

from allocator import (
    AllocatorError,
    Client,
    RuntimeDir,
    UnknownWeightSet,
    connect,
    device_fault,
)
from workers.checkpoint import (
    AttachedWeights,
    attach,
    attach_served,
)
from workers.config.architecture import architecture_errors
from workers.config.context_length import max_positions
from workers.config.encoder_settings import task_of
from workers.engine.embed import EmbeddingEngine
from workers.engine.generate import GenerationEngine
from workers.engine.protocol import Engine
from workers.errors import InstanceLost, InvalidSetting, RanksLost, WorkerError
from workers.kv.cache import KVCache
from workers.kv.source import PoolSource
from workers.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Abort,
    Drain,
    Embed,
    Embedded,
    FromInstance,
    Generate,
    InstanceSpec,
    Loading,
    ModelFacts,
    Output,
    Ready,
    StartFailed,
    decode_from_instance,
    decode_to_instance,
    encode,
)
from workers.model.decoder import build_model
from workers.model.encoder import build_embedding_model
from workers.model.native import Unavailable, load
from workers.model.native.decoder import num_summed
from workers.packed_format import decoded
from workers.placement.all_reduce import AllReduce
from workers.placement.choice import choose
from workers.placement.packing import open_as_served
from workers.placement.place import place
from workers.placement.series_choice import check_series
from workers.process import linux
from workers.process.cores import SharedCores
from workers.process.first_rank import FirstRank
from workers.process.inbox import named
from workers.process.outbox import frames
from workers.process.pulse import Pulse
from workers.process.rank_processes import RankProcesses, end_as
from workers.skeleton.decoder import skeleton
from workers.weight_format import float_dtype

log = logging.getLogger("onecopy.instance")

_LINGER_MS: Final = 2000
"""How long the last outputs may take to leave at the end."""
_PATIENCE_S: Final = 1.0
"""How long a step may wait for the allocator, once; not at all for one that is silent already."""
_STALLED_MS: Final = 20
"""How long to wait before asking again for KV memory where there was none."""


def run(spec: InstanceSpec, pulse: Pulse, processes: RankProcesses | None = None) -> int:
    """The instance's whole life; `processes` are its further ranks. Returns the process's exit
    status, unless a rank was ended by a signal: then that ends this process, too."""
    ended = None
    try:
        status, lost = _run(spec, pulse, processes)
        if processes is not None and isinstance(lost, RanksLost):
            ended = processes.status(lost.rank)
    finally:
        if processes is not None:
            processes.close()
    end_as(ended)
    return status


def _run(
    spec: InstanceSpec, pulse: Pulse, processes: RankProcesses | None
) -> tuple[int, InstanceLost | None]:
    linux.set_process_name(f"onecopy:{spec.name}")
    context = zmq.Context(io_threads=1)
    server = context.socket(zmq.DEALER)
    server.setsockopt(zmq.LINGER, _LINGER_MS)
    server.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    # Whoever else connects is turned away before a byte is read (SO_PEERCRED).
    server.setsockopt(zmq.IPC_FILTER_PID, spec.server_pid)
    server.bind(spec.engines)
    try:
        return _Instance(spec, server, pulse, processes).run(), None
    except RanksLost as lost:
        log.error("instance %s ends, and its requests go on elsewhere: %s", spec.name, lost)  # noqa: TRY400 - nobody's code is to blame
        return 1, lost
    except InstanceLost as lost:
        log.exception("instance %s ends, and its requests go on elsewhere", spec.name)
        return 1, lost
    finally:
        server.close()
        context.term()


class _Instance:
    def __init__(
        self,
        spec: InstanceSpec,
        server: "zmq.Socket[bytes]",
        pulse: Pulse,
        processes: RankProcesses | None,
    ):
        self._spec = spec
        self._settings = spec.settings
        self._server = server
        self._pulse = pulse
        self._draining = False
        self._phases: dict[str, float] = {}
        self._phase_start = spec.requested_at
        self._cores: SharedCores | None = None
        self._resources = contextlib.ExitStack()
        """What must end before the session."""
        self._weights: AttachedWeights | None = None
        """So that what is attached stays mapped, also the segment of mapped files, of which no
        tensor is a view: `onecopy verify` looks for it."""
        self._processes = processes
        self._ranks: FirstRank | None = None
        self._warm_up: Callable[[], None] | None = None
        """A first pass, where none was made yet."""

    def run(self) -> int:
        self._ended("fork")
        with contextlib.ExitStack() as stack:
            try:
                memory = stack.enter_context(self._connect())
                stack.enter_context(self._resources)
                engine = self._start(memory)
            except (WorkerError, AllocatorError) as error:
                return self._failed(error.code, str(error))
            except Exception as error:
                # The architectures are not our code: whatever they raise is shown to a person.
                log.exception("the instance can't serve %s", self._spec.model)
                return self._failed("internal", f"{type(error).__name__}: {error}")
            memory.hurry(_PATIENCE_S, self._pulse.allocator_silent_since)
            self._serve(engine)
        return 0

    def _failed(self, code: str, message: str) -> int:
        """The exit status of one that can't be ready, which it says."""
        self._send(StartFailed(code=code, message=message[:60_000]))
        return 1

    # --- start

    def _connect(self) -> Client:
        memory = connect(
            RuntimeDir.open(self._spec.runtime_dir, create=False),
            device=self._settings.device,
            model=self._spec.served_model_name[:256],
            label=f"instance {self._spec.name}",
        )
        self._ended("connect")
        return memory

    def _start(self, memory: Client) -> Engine:
        spec, settings = self._spec, self._settings
        torch.set_num_threads(self._threads()[0])
        weights, eos_token_ids = self._attach(memory)
        self._weights = weights
        dtype = weights.dtype or float_dtype(weights.tensors)
        self._ended("weights")
        if settings.threads is None:
            cores = RuntimeDir.open(spec.runtime_dir, create=False).cores
            self._cores = SharedCores(cores, os.getpid())
        if task_of(weights.metadata) == "embed":
            return self._start_embedding(memory, weights, dtype)
        config = json.loads(weights.metadata["config"])
        placement = place(memory, weights, settings.offload_depth, self._resources)
        drafted = settings.max_num_seqs * (1 + settings.num_speculative_tokens)
        most_rows = settings.max_num_batched_tokens + drafted
        self._check_kernels()
        group = self._form_ranks(memory, weights, config, dtype, most_rows)
        cut_by = group if settings.tensor_parallel_size > 1 else None
        packed = decoded(weights.metadata)
        model = build_model(config, placement, dtype, eos_token_ids, cut_by, packed)
        if group is not None and cut_by is None:
            model.divide_by(group)
        limit = model.geometry.max_model_len
        max_model_len = self._max_model_len(limit, limit)
        model.workspace_bytes = settings.attention_workspace
        most, now = self._threads()
        reason = model.accelerate(most_rows, max_model_len, most, now, settings.cpu_kernels)
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
            works_on=self._pulse.works_on,
        )
        facts = model.geometry.facts(max_model_len)
        warm_up = functools.partial(model.warm_up, own_memory)
        self._announce(facts, weights, model.kernels, warm_up)
        return engine

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
        self,
        memory: Client,
        weights: AttachedWeights,
        config: dict[str, Any],
        dtype: torch.dtype,
        max_rows: int,
    ) -> AllReduce | None:
        """Those that compute the model together; None for one."""
        if self._processes is None:
            return None
        module = skeleton(config, dtype)
        limit = max_positions(module.config)
        self._ranks = FirstRank(self._processes, *self._threads())
        self._resources.callback(self._ranks.close)
        return self._ranks.form(
            memory,
            weights,
            self._settings,
            self._num_summed(module, max_rows),
            max_rows,
            self._max_model_len(limit, limit),
        )

    def _num_summed(self, module: Any, max_rows: int) -> int:
        """Numbers that ranks sum at a time."""
        embeddings = module.get_input_embeddings()
        if self._settings.tensor_parallel_size > 1:
            return num_summed(max_rows, embeddings.embedding_dim)
        return int(embeddings.num_embeddings)  # the logits of a row

    def _attach(self, memory: Client) -> tuple[AttachedWeights, tuple[int, ...] | None]:
        """The set that is served, wherever it is, and the tokens that end an answer; what was
        evicted, or lost with an allocator, is loaded anew, if the files are still those that it was
        made from."""
        spec = self._spec
        if spec.weight_set:
            try:
                return attach_served(memory, spec.weight_set, self._loading), spec.eos_token_ids
            except UnknownWeightSet:
                log.info("%s is not in memory any more", spec.weight_set)
        checkpoint = open_as_served(spec.model, self._settings)
        self._check_ranks(checkpoint.metadata())
        check_series(checkpoint, self._settings)
        ends = spec.eos_token_ids if spec.weight_set else checkpoint.eos_token_ids()
        weights = attach(
            memory,
            checkpoint,
            self._loading,
            map_files=self._settings.map_files,
            offloaded=choose(checkpoint, self._settings, self._converting),
            only=spec.weight_set,
        )
        return weights, ends

    def _start_embedding(
        self, memory: Client, weights: AttachedWeights, dtype: torch.dtype
    ) -> EmbeddingEngine:
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
        threads_now = None if self._cores is None else self._cores.fair_part
        engine = EmbeddingEngine(
            model,
            max_model_len,
            self._settings.max_num_batched_tokens,
            threads_now=threads_now,
            device_fault=functools.partial(device_fault, memory.device),
            works_on=self._pulse.works_on,
        )
        self._announce(model.facts(max_model_len), weights, model.kernels, model.warm_up)
        return engine

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
        size, cores = self._settings.num_ranks, self._cores
        if cores is None:
            return max(1, self._spec.num_threads // size), None
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

    def _announce(
        self,
        facts: ModelFacts,
        weights: AttachedWeights,
        kernels: str | None,
        warm_up: Callable[[], None],
    ) -> None:
        linux.trim_heap()
        self._phases["total"] = (time.monotonic() - self._spec.requested_at) * 1000
        ready = Ready(
            version=PROTOCOL_VERSION,
            pid=os.getpid(),
            facts=facts,
            loaded=weights.loaded,
            weight_set=weights.reader.key,
            startup_ms=self._phases,
            metadata=weights.facts,
            cpu_kernels=kernels or "",
            rank_pids=() if self._ranks is None else self._ranks.pids,
        )
        # What the checkpoint says went into it; the server would drop what does not fit, and wait.
        with architecture_errors(f"{facts.architecture} can't be served by this config.json"):
            decode_from_instance(encode(ready))
        self._send(ready)
        if not weights.loaded:
            self._warm_up = warm_up

    def _loading(self, num_bytes: int, total_bytes: int, writer_pid: int) -> None:
        self._send(
            Loading(
                num_bytes=num_bytes,
                total_bytes=total_bytes,
                writer=writer_pid == os.getpid(),
                writer_pid=writer_pid,
            )
        )

    def _converting(self, num_bytes: int, total_bytes: int) -> None:
        self._loading(num_bytes, total_bytes, os.getpid())

    def _ended(self, phase: str) -> None:
        now = time.monotonic()
        self._phases[phase] = (now - self._phase_start) * 1000
        self._phase_start = now

    # --- serve

    def _serve(self, engine: Engine) -> None:
        # A first pass touches every weight, so its length grows with the model: an instance that
        # attached is ready before it, and makes it only if no request is there to do so.
        if self._warm_up is not None and not self._server.poll(0):
            self._warm_up()
            linux.trim_heap()
        poller = zmq.Poller()
        poller.register(self._server, zmq.POLLIN)
        wake_read, wake_write = socket.socketpair()
        with wake_read, wake_write:
            wake_read.setblocking(False)
            wake_write.setblocking(False)
            poller.register(wake_read.fileno(), zmq.POLLIN)
            for link in () if self._ranks is None else self._ranks.links:
                poller.register(link.fileno(), zmq.POLLIN)
            signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, lambda _number, _frame: self._drain())
            try:
                self._loop(engine, poller, wake_read)
            finally:
                signal.set_wakeup_fd(-1)
                engine.close()

    def _loop(self, engine: Engine, poller: zmq.Poller, wake: socket.socket) -> None:
        while engine.has_work or not self._draining:
            had_work = engine.has_work
            wait_ms = _STALLED_MS if engine.is_stalled else 0
            events = dict(poller.poll(wait_ms if had_work else None))
            if wake.fileno() in events:
                wake.recv(4096)
            if self._ranks is not None:
                self._ranks.check()
            if self._server in events:
                self._read(engine)
                self._pulse.end()
            if engine.has_work:
                if self._cores is not None:
                    self._cores.begin()
                self._pulse.begin()
                outputs = engine.step()
                self._report(engine, outputs)
                self._pulse.end()
            elif had_work:  # the last was aborted: no step says so
                self._report(engine, ())

    def _report(self, engine: Engine, outputs: tuple[Output | Embedded, ...]) -> None:
        for frame in frames(engine.report(outputs), engine.abort):
            self._server.send(frame)
        if not engine.has_work:
            if self._cores is not None:
                self._cores.end()
            if self._ranks is not None:
                self._ranks.rest()
            linux.trim_heap()
            self._check(engine)

    def _check(self, engine: Engine) -> None:
        """An idle moment: see that what is held is what is used. A leak is for the log, not a
        reason to end the streams that come next."""
        try:
            engine.check()
        except AssertionError:
            log.exception("the engine's books do not add up")

    def _read(self, engine: Engine) -> None:
        while True:
            try:
                frame = self._server.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._pulse.took(1)
            try:
                message = decode_to_instance(frame)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                log.exception("a message is not one of the protocol's")
                self._refuse(engine, named(frame), f"it can't be read: {error}")
                continue
            match message:
                case Generate() | Embed():
                    self._pulse.begin([message.request_id])
                    engine.add(message)
                case Abort(request_id=request_id):
                    engine.abort(request_id)
                case Drain():
                    self._drain()

    def _refuse(self, engine: Engine, request_id: str, problem: str) -> None:
        """Who sent it waits for an answer."""
        if request_id:
            engine.refuse(request_id, f"the instance can't take the request: {problem}")

    def _drain(self) -> None:
        self._draining = True

    def _send(self, message: FromInstance) -> None:
        self._server.send(encode(message))
