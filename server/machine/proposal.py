"""Where a model's layers should be on this machine: `onecopy plan`, and `--placement auto`.

Owns the choice, and its reasons. Invariants: what a person has said goes first, and only what was
left open is chosen; what is said to fit does so by the sums of `onecopy plan`, with the processes
at work and one sequence of full length in each instance. Reads headers only, and starts nothing
else. Does not know how layers are read.

    all layers in memory    where they fit so
    layers read in turn     else, as few as the rest allows: weights and an instance's slots get
                            what processes and keys and values leave (`--device-memory`)
    one rank                always: on one host ranks share the cores, and are slower than threads
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from server.machine.capacity import Machine
from server.machine.plan import Load, Plan, PlanFailed, make_plan, read_estimate
from server.models.source import ModelSource
from server.placement import Placement
from server.units import size_text
from workers import EngineSettings, InvalidSetting
from workers.messages import Estimate

_MIB: Final = 1 << 20
_MANIFEST_BYTES_A_TENSOR: Final = 256


@dataclass(frozen=True)
class Proposal:
    """What was asked for, and what should be."""

    asked: Plan
    engine: EngineSettings
    """With the placement."""
    plan: Plan
    """Of that; `asked` where nothing is to be changed, or nothing fits."""
    placement: Placement


def propose(
    source: ModelSource, engine: EngineSettings, num_instances: int, machine: Machine
) -> Proposal:
    """For the model, as it is to be served, on that machine. Takes some seconds. Raises PlanFailed,
    and InvalidSetting where the settings leave nothing to choose."""
    check_open(engine)
    return choose(source, engine, read_estimate(source, engine), num_instances, machine)


def check_open(engine: EngineSettings) -> None:
    """Raises InvalidSetting where a setting says already what would be chosen."""
    if not engine.device.startswith("host"):
        raise InvalidSetting(
            f"--placement auto is for the host's memory, and --device is {engine.device}: a model "
            "on a GPU stays there as a whole, so leave out --placement"
        )
    if engine.map_files:
        raise InvalidSetting(
            "--map-files leaves to the kernel which weights are in memory, and --placement auto "
            "chooses that: leave out one of them"
        )


def choose(
    source: ModelSource,
    engine: EngineSettings,
    estimate: Estimate,
    num_instances: int,
    machine: Machine,
) -> Proposal:
    """The same from the `estimate` that was made with these settings; another is read where layers
    are to go. Raises PlanFailed."""
    choice = _Choice(source, num_instances, machine)
    asked = choice.made(engine, estimate)
    alone = choice.made(engine, estimate, max_num_seqs=1)
    if alone.room.fits_at_full_load:
        return Proposal(asked, engine, asked, _as_asked(engine, asked))
    if (reason := _against_offload(engine, estimate)) is not None:
        nowhere = f"they can't be left on disk: {reason.rstrip('.')}"
        return Proposal(asked, engine, asked, _nowhere(engine, alone, nowhere))
    budget = choice.budget(engine, estimate)
    if engine.device_memory is not None:
        budget = min(budget, engine.device_memory)
    if (chosen := choice.offloading(engine, budget)) is not None:
        engine, plan = chosen
        return Proposal(asked, engine, plan, _offloading(engine, alone, plan))
    nowhere = (
        "with all of them left on disk the rest is still more than the "
        f"{size_text(max(0, budget))} that there is for weights"
    )
    return Proposal(asked, engine, asked, _nowhere(engine, alone, nowhere))


@dataclass(frozen=True)
class _Choice:
    source: ModelSource
    num_instances: int
    machine: Machine

    def made(
        self, engine: EngineSettings, estimate: Estimate, max_num_seqs: int | None = None
    ) -> Plan:
        load = Load(
            num_instances=self.num_instances,
            max_num_seqs=max_num_seqs or engine.max_num_seqs,
            max_model_len=estimate.max_model_len,
            tensor_parallel_size=engine.tensor_parallel_size,
            data_parallel_size=engine.data_parallel_size,
        )
        path: Path = self.source.path
        return make_plan(self.source.name, path, estimate, load, self.machine)

    def budget(self, engine: EngineSettings, estimate: Estimate) -> int:
        """Of the weights that stay and one instance's slots, in whole MiB: what the machine has
        less all else. Not more than 0 where it has too little."""
        resident = replace(estimate, offload=None, segment_bytes=0)
        room = self.made(engine, resident, max_num_seqs=1)
        device = room.device
        left = room.room.memory_bytes - room.room.other_processes_bytes
        for_weights = min(
            left - device.total_bytes_at_full_load,
            room.room.shared_memory_bytes - device.sums_bytes - device.kv_bytes_at_full_load,
        )
        others = (self.num_instances - 1) * (engine.offload_depth + 1) * estimate.slot_bytes
        manifest = _MIB + estimate.num_tensors * _MANIFEST_BYTES_A_TENSOR
        return (for_weights - others - manifest) // _MIB * _MIB

    def offloading(
        self, engine: EngineSettings, budget_bytes: int
    ) -> tuple[EngineSettings, Plan] | None:
        """With as few layers offloaded as that budget for weights allows; None where it is too
        little for all."""
        if budget_bytes < _MIB:
            return None
        chosen = replace(engine, device_memory=budget_bytes)
        try:
            found = read_estimate(self.source, chosen)
        except PlanFailed:  # the same files could be read a moment ago: it is too little
            return None
        alone = self.made(chosen, found, max_num_seqs=1)
        return (chosen, self.made(chosen, found)) if alone.room.fits_at_full_load else None


def _against_offload(engine: EngineSettings, estimate: Estimate) -> str | None:
    """Why no layers can go that stay as it was asked for."""
    if engine.offload not in ("auto", "none", "0"):
        return f"--offload is {engine.offload}: leave it to auto"
    if not estimate.slot_bytes:
        return estimate.stays_because or "none of its layers can be read alone"
    return None


# --- words


def _as_asked(engine: EngineSettings, plan: Plan) -> Placement:
    load, weights = plan.load, size_text(plan.device.weights_bytes)
    num_seqs = load.max_num_seqs if plan.room.fits_at_full_load else max(1, plan.room.max_num_seqs)
    beside = (
        f"beside {num_seqs} sequence{'' if num_seqs == 1 else 's'} of full length in each instance"
    )
    if num_seqs < load.max_num_seqs:
        beside += "; of more, some wait for memory"
    if plan.offload is not None:
        what = f"{_gone(plan)}, as was asked for: the {weights} that stay fit {beside}."
    else:
        what = f"All layers stay in memory: {weights} of weights fit {beside}."
    options = () if engine.device_memory is None else (_device_memory(engine.device_memory),)
    return Placement(options=options, fits=True, reasons=(what, _ranks(engine)))


def _offloading(engine: EngineSettings, alone: Plan, plan: Plan) -> Placement:
    """`alone` is as it was asked for, with one sequence in each instance."""
    budget = engine.device_memory or 0
    weights = plan.device.weights_bytes + (plan.offload.pass_bytes if plan.offload else 0)
    reasons = [
        f"{_gone(plan)}: {size_text(weights)} of weights are more than the {size_text(budget)} "
        f"that the processes and one sequence of {plan.load.max_model_len:,} tokens in each "
        "instance leave.",
        _ranks(engine),
    ]
    if alone.room.max_model_len and alone.offload is None:
        reasons.append(f"`--max-model-len {alone.room.max_model_len}` would keep all in memory.")
    return Placement(options=(_device_memory(budget),), fits=True, reasons=tuple(reasons))


def _nowhere(engine: EngineSettings, alone: Plan, why: str) -> Placement:
    reasons = [
        f"Not all layers fit beside the processes and one sequence of "
        f"{alone.load.max_model_len:,} tokens in each instance ({_missing(alone)}), and {why}.",
        _ranks(engine),
    ]
    fewer = {
        "--max-model-len": alone.room.max_model_len,
        "--instances": alone.room.max_instances,
    }
    would = " or ".join(f"`{option} {number}`" for option, number in fewer.items() if number)
    if would:
        reasons.append(f"It would fit with {would}.")
    return Placement(options=(), fits=False, reasons=tuple(reasons))


def _missing(plan: Plan) -> str:
    device, room = plan.device, plan.room
    left = room.memory_bytes - room.other_processes_bytes
    shared = device.weights_bytes + device.slots_bytes + device.sums_bytes
    shared += device.kv_bytes_at_full_load
    missing = max(device.total_bytes_at_full_load - left, shared - room.shared_memory_bytes)
    return f"{size_text(missing)} are missing"


def _gone(plan: Plan) -> str:
    if plan.offload is None:
        return "All layers stay in memory"
    return (
        f"{plan.offload.num_offloaded} of {plan.offload.num_layers} layers are read from the "
        "model's files when they are computed"
    )


def _ranks(engine: EngineSettings) -> str:
    if engine.num_ranks == 1:
        return "One rank for each instance: on one host ranks share the cores that threads use."
    return f"{engine.num_ranks} ranks for each instance, as {engine.ranks_asked_by} says."


def _device_memory(num_bytes: int) -> str:
    """As the option takes it, exactly."""
    exact = f"{num_bytes // _MIB}MiB" if num_bytes % _MIB == 0 else str(num_bytes)
    return f"--device-memory {exact}"
