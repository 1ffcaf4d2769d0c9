"""What a model will take on each device, before anything is started: `onecopy plan`.

Owns the sums: how often each figure of the workers' estimate counts, what is private to a process,
and how that compares with a machine. Invariants: nothing is started but a process that reads the
model's headers; `onecopy verify` shows the same sum of a server that was started so and is idle.
Never imports torch; knows nothing of how the figures are shown.

    on one device   the weights, once; the processes of each instance, one a rank, and where there
                    are several, memory for their sums; each sequence's KV cache
    on K devices    each holds one rank of every instance: its share of the weights, once, and of
                    every sequence's KV cache
"""

import bisect
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from pydantic import BaseModel

from allocator import module_command, module_environment
from server.machine.capacity import Machine
from server.models.source import ModelSource
from server.settings import MAX_INSTANCES
from workers import MAX_NUM_SEQS, EngineSettings
from workers.messages import Estimate, OffloadEstimate, decode_estimate

LOADING_PRIVATE_BYTES: Final = 33_000_000
ATTACHED_PRIVATE_BYTES: Final = 26_200_000
"""Private memory of the process that loads, and of one that attaches, after its first pass, as
`onecopy ps` counts it: measured with the demo on two cores of an AMD EPYC. It is the interpreter's
and the libraries', so it hardly depends on the model."""
HEAP_GROWTH_BYTES: Final = 10_000_000
"""What the heap of a process grows by at work, beyond what a step computes with (as measured for
`prefill_bytes`, workers/estimate.py)."""
OTHER_PROCESSES_BYTES: Final = 360_000_000
"""Anonymous memory of the server (78 MB with the demo's tokenizer), the allocator (13 MB) and the
forkserver with what its instances share of it (270 MB): measured once, from smaps_rollup. A
tokenizer with a large vocabulary adds up to some 250 MB."""

_FULL_BLOCKS: Final = 128
"""So many tokens fill whole KV blocks, and are round enough to propose."""


class PlanFailed(Exception):
    """No plan for this model. The message names what to do."""


class Load(BaseModel, frozen=True):
    """What is to be served; lengths in tokens."""

    num_instances: int
    max_num_seqs: int
    """Of each instance."""
    max_model_len: int
    tensor_parallel_size: int
    data_parallel_size: int = 1

    @property
    def num_ranks(self) -> int:
        """Processes of each instance."""
        return self.tensor_parallel_size * self.data_parallel_size


class DevicePlan(BaseModel, frozen=True):
    """What one device will hold, in bytes. Full load is an upper bound: all sequences of all
    instances at their full length, and each process in its largest step."""

    weights_bytes: int
    slots_bytes: int
    """For layers that are offloaded, of all instances."""
    sums_bytes: int
    """Which ranks make together, of all instances."""
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    kv_bytes_at_full_load: int
    private_bytes_at_start: int
    private_bytes_at_full_load: int
    total_bytes_at_start: int
    total_bytes_at_full_load: int


class Room(BaseModel, frozen=True):
    """How much of it a machine could hold, `other_processes_bytes` included, which are there once.

    The largest figures are 0 where not even one fits, and `serve`'s limits where more would."""

    given: bool
    """Whether a person said what there is; else it is what is available on this machine now."""
    memory_bytes: int
    shared_memory_bytes: int
    """What weights and KV cache, which lie in shared memory, may take of it."""
    other_processes_bytes: int
    weights_fit: bool
    fits_at_start: bool
    fits_at_full_load: bool
    max_instances_at_start: int
    max_instances: int
    """At full load, with as many sequences each."""
    max_num_seqs: int
    """At full load, of each of as many instances."""
    max_model_len: int
    """At full load, of as many sequences; at most the one that was planned for."""
    max_kv_tokens: int
    """Of all sequences of as many instances together; 0 for a model that keeps none."""


class Offload(BaseModel, frozen=True):
    """Layers that are read when they are needed. Bytes a second of this machine; 0: not known."""

    num_layers: int
    num_offloaded: int
    slots_bytes: int
    """Of each instance."""
    pass_bytes: int
    """Read in each pass."""
    read_bytes_per_s: int
    memory_bytes_per_s: int

    @property
    def read_s(self) -> float:
        """A pass reads for so long."""
        return self.pass_bytes / self.read_bytes_per_s if self.read_bytes_per_s else 0.0

    def compute_s(self, weights_bytes: int) -> float:
        """A pass for one token that is bound by memory: all weights are read once, those that are
        `weights_bytes` and those in slots."""
        return (weights_bytes + self.pass_bytes) / self.memory_bytes_per_s

    def hidden(self, weights_bytes: int) -> float:
        """What part of reading can be hidden behind computing one token so:
        min(compute, transfer) / transfer."""
        return min(1.0, self.compute_s(weights_bytes) / self.read_s) if self.read_s else 1.0


class Split(BaseModel, frozen=True):
    """The tensors' bytes, by what tensor parallelism does with them; padding and manifest aside."""

    column_bytes: int
    row_bytes: int
    replicated_bytes: int


class Plan(BaseModel, frozen=True):
    """One model under one load. The private figures are estimates, all others are exact."""

    model: str
    path: Path
    architecture: str
    dtype: str
    num_parameters: int
    num_tensors: int
    load: Load
    loading_private_bytes: int = LOADING_PRIVATE_BYTES
    attached_private_bytes: int = ATTACHED_PRIVATE_BYTES
    busy_private_bytes: int
    """What a process at work takes beyond that, at most."""
    device: DevicePlan
    """Where all ranks are on one device: they view the one copy."""
    room: Room
    split: Split | None = None
    rank_device: DevicePlan | None = None
    """Each device, where every rank has its own."""
    rank_room: Room | None = None
    """Only for a machine that was given: this one is a single device."""
    offload: Offload | None = None


@dataclass(frozen=True)
class _Device:
    """What one device holds whatever the load: the sums as functions of instances and sequences."""

    weights_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    num_ranks: int
    """Of each instance, on this device."""
    prefill_bytes: int
    logits_bytes_per_sequence: int
    slots_bytes: int = 0
    """Of each instance."""
    sums_bytes: int = 0
    """Of each instance."""

    def held(self, num_instances: int) -> int:
        """Shared memory that is held whatever the load."""
        return self.weights_bytes + num_instances * (self.slots_bytes + self.sums_bytes)

    def at_start(self, num_instances: int) -> int:
        """Bytes when all are ready and idle."""
        return self.held(num_instances) + self.private_at_start(num_instances)

    def at_full_load(self, num_instances: int, max_num_seqs: int) -> int:
        """Bytes at most."""
        kv_bytes = num_instances * max_num_seqs * self.kv_bytes_per_sequence
        return self.at_start(num_instances) + kv_bytes + self.busy(num_instances, max_num_seqs)

    def private_at_start(self, num_instances: int) -> int:
        """Of all processes; the first one loads."""
        num_attached = num_instances * self.num_ranks - 1
        return LOADING_PRIVATE_BYTES + num_attached * ATTACHED_PRIVATE_BYTES

    def busy(self, num_instances: int, max_num_seqs: int) -> int:
        """What all processes take beyond that at work."""
        return num_instances * self.num_ranks * self.busy_process(max_num_seqs)

    def busy_process(self, max_num_seqs: int) -> int:
        """A step computes prompts, or logits for all sequences; each is highest at another time."""
        step = max(self.prefill_bytes, max_num_seqs * self.logits_bytes_per_sequence)
        return HEAP_GROWTH_BYTES + step

    def plan(self, load: Load) -> DevicePlan:
        """All figures under one load."""
        instances, sequences = load.num_instances, load.max_num_seqs
        private = self.private_at_start(instances)
        return DevicePlan(
            weights_bytes=self.weights_bytes,
            slots_bytes=instances * self.slots_bytes,
            sums_bytes=instances * self.sums_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token,
            kv_bytes_per_sequence=self.kv_bytes_per_sequence,
            kv_bytes_at_full_load=instances * sequences * self.kv_bytes_per_sequence,
            private_bytes_at_start=private,
            private_bytes_at_full_load=private + self.busy(instances, sequences),
            total_bytes_at_start=self.at_start(instances),
            total_bytes_at_full_load=self.at_full_load(instances, sequences),
        )

    def room(self, load: Load, machine: Machine) -> Room:
        """What of it `machine` could hold."""
        instances, sequences = load.num_instances, load.max_num_seqs
        left = machine.memory_bytes - OTHER_PROCESSES_BYTES
        weights_fit = self.held(1) <= min(machine.shared_memory_bytes, left)

        def starts(count: int) -> bool:
            shared = self.held(count) <= machine.shared_memory_bytes
            return weights_fit and shared and self.at_start(count) <= left

        def holds(num_instances: int, max_num_seqs: int) -> bool:
            kv_bytes = num_instances * max_num_seqs * self.kv_bytes_per_sequence
            shared = self.held(num_instances) + kv_bytes <= machine.shared_memory_bytes
            return shared and self.at_full_load(num_instances, max_num_seqs) <= left

        kv_bytes = instances * sequences * self.kv_bytes_per_sequence
        for_kv = left - self.at_full_load(instances, sequences) + kv_bytes
        for_kv = min(for_kv, machine.shared_memory_bytes - self.held(instances))
        kv_tokens = longest = 0
        if self.kv_bytes_per_token:
            # Blocks are held as a whole, and may take more than their tokens do.
            in_blocks = -(-self.kv_bytes_per_sequence // load.max_model_len)
            per_token = max(self.kv_bytes_per_token, in_blocks)
            kv_tokens = max(0, for_kv // per_token) if weights_fit else 0
            longest = kv_tokens // (instances * sequences) // _FULL_BLOCKS * _FULL_BLOCKS
        elif holds(instances, sequences):  # nothing is kept, so that length is no matter
            longest = load.max_model_len
        return Room(
            given=machine.given,
            memory_bytes=machine.memory_bytes,
            shared_memory_bytes=machine.shared_memory_bytes,
            other_processes_bytes=OTHER_PROCESSES_BYTES,
            weights_fit=weights_fit,
            fits_at_start=starts(instances),
            fits_at_full_load=holds(instances, sequences),
            max_instances_at_start=_largest(MAX_INSTANCES, starts),
            max_instances=_largest(MAX_INSTANCES, lambda n: holds(n, sequences)),
            max_num_seqs=_largest(MAX_NUM_SEQS, lambda n: holds(instances, n)),
            max_model_len=min(longest, load.max_model_len),
            max_kv_tokens=kv_tokens,
        )


def make_plan(model: str, path: Path, estimate: Estimate, load: Load, machine: Machine) -> Plan:
    """The plan that follows from `estimate`, which was made for the same load. Pure."""
    size = load.tensor_parallel_size
    whole = _Device(
        weights_bytes=estimate.segment_bytes,
        kv_bytes_per_token=estimate.kv_bytes_per_token,
        kv_bytes_per_sequence=estimate.kv_bytes_per_sequence,
        num_ranks=load.num_ranks,
        prefill_bytes=estimate.prefill_bytes,
        logits_bytes_per_sequence=estimate.logits_bytes_per_sequence,
        slots_bytes=estimate.offload.slots_bytes if estimate.offload else 0,
        sums_bytes=estimate.sums_bytes,
    )
    split = rank_device = rank_room = None
    if rank := estimate.rank:
        split = Split(
            column_bytes=rank.column_bytes * size,
            row_bytes=rank.row_bytes * size,
            replicated_bytes=rank.replicated_bytes,
        )
        one = _Device(
            weights_bytes=rank.segment_bytes,
            kv_bytes_per_token=rank.kv_bytes_per_token,
            kv_bytes_per_sequence=rank.kv_bytes_per_sequence,
            num_ranks=1,
            prefill_bytes=estimate.prefill_bytes,
            logits_bytes_per_sequence=estimate.logits_bytes_per_sequence,
        )
        rank_device = one.plan(load)
        rank_room = one.room(load, machine) if machine.given else None
    return Plan(
        model=model,
        path=path,
        architecture=estimate.architecture,
        dtype=estimate.dtype,
        num_parameters=estimate.num_parameters,
        num_tensors=estimate.num_tensors,
        load=load,
        busy_private_bytes=whole.busy_process(load.max_num_seqs),
        device=whole.plan(load),
        room=whole.room(load, machine),
        split=split,
        rank_device=rank_device,
        rank_room=rank_room,
        offload=_offload(estimate.offload),
    )


def _offload(found: OffloadEstimate | None) -> Offload | None:
    return None if found is None else Offload(**msgspec.structs.asdict(found))


def read_estimate(source: ModelSource, engine: EngineSettings) -> Estimate:
    """Let a process of the workers' room read the model's headers; seconds, most of them torch's
    import. Raises PlanFailed with its one line."""
    settings = msgspec.json.encode(msgspec.structs.asdict(engine)).decode()
    command = module_command("workers.estimate", str(source.path), "--settings", settings)
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_WAIT_POLICY": "PASSIVE"}
    ended = subprocess.run(  # noqa: S603 - our own interpreter and module
        command,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=module_environment(**quiet),
        check=False,
    )
    words = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if ended.returncode == 1 and words:
        raise PlanFailed(words)
    try:
        return decode_estimate(ended.stdout)
    except msgspec.DecodeError as error:
        raise PlanFailed(
            f"reading {source.path} ended with status {ended.returncode} ({words or error}); "
            f"`{' '.join(command[1:])}` shows more"
        ) from error


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` of which `holds` is true, as it is of all smaller ones."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda number: not holds(number))
