"""Which layers of a checkpoint are offloaded: by what was asked for, and what there is room for.

Owns the way from a checkpoint and settings to that list. Reads headers only. Does not know how
layers are read or computed.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from allocator import ALIGNMENT
from workers.checkpoint.converted import OnWritten, converted_file, write_converted
from workers.checkpoint.formats.checkpoint import Checkpoint, SourceTensor
from workers.checkpoint.offloaded import OffloadedLayer, OffloadedLayers, find_layers
from workers.config.encoder_settings import task_of
from workers.errors import InvalidSetting
from workers.placement.budget import Sizes, offloaded_layers
from workers.placement.layer_slots import memory_bytes
from workers.placement.slots import slot_layout
from workers.settings import EngineSettings
from workers.skeleton.decoder import LayerNames, names_of_layers, skeleton
from workers.weight_format import float_dtype

log = logging.getLogger("onecopy.instance")

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Proposal:
    """Which layers of a checkpoint go."""

    layers: OffloadedLayers
    """Files that layers must be converted into may not be there yet."""
    num_layers: int
    """Of the model."""
    staying_bytes: int
    """Of all tensors that are in memory at any time."""
    slots_bytes: int
    """Of the slots of one instance."""
    pass_bytes: int
    """What is read in each pass."""


def choose(
    checkpoint: Checkpoint, settings: EngineSettings, on_written: OnWritten = lambda *_: None
) -> OffloadedLayers | None:
    """What is to be offloaded, None for nothing; layers that must be converted for that are written
    to a file first. Raises as `propose` does, DiskFull and CacheNotWritable."""
    proposal = propose(checkpoint, settings)
    if proposal is None:
        return None
    if settings.offload != "auto" and _all_fits(checkpoint, settings):
        log.warning(
            "--offload %s makes this model slower, and all of it would fit in --device-memory",
            settings.offload,
        )
    log.info(
        "%d of %d layers are offloaded: %d MiB of weights stay, %d MiB are read in each pass, "
        "through slots of %d MiB",
        len(proposal.layers.layers),
        proposal.num_layers,
        proposal.staying_bytes // _MIB,
        proposal.pass_bytes // _MIB,
        proposal.slots_bytes // _MIB,
    )
    return write_converted(checkpoint, proposal.layers, on_written)


def propose(checkpoint: Checkpoint, settings: EngineSettings) -> Proposal | None:
    """What would be offloaded, None for nothing. Raises InvalidSetting where that can't be done, or
    what stays is more than it may be; UnsupportedCheckpoint, CheckpointError."""
    budget = settings.device_memory
    if settings.offload in ("none", "0") or (settings.offload == "auto" and budget is None):
        if budget is not None:
            _check_fits(checkpoint.tensors(), budget)
        return None
    if settings.offload == "auto" and _all_fits(checkpoint, settings):
        return None
    _check_can_be(checkpoint, settings)
    tensors = {one.name: one for one in checkpoint.tensors()}
    names = _names(checkpoint, list(tensors.values()))
    found = find_layers(checkpoint, names, range(len(names)), converted_file(checkpoint, "all"))
    sizes = _sizes(tensors, found)
    chosen = offloaded_layers(sizes, settings.offload, settings.offload_depth, budget)
    if not chosen:
        return None
    file = converted_file(checkpoint, ",".join(map(str, chosen)))
    layers = find_layers(checkpoint, names, chosen, file)
    layouts = [slot_layout(layer.tensors) for layer in layers.layers]
    return Proposal(
        layers=layers,
        num_layers=len(names),
        staying_bytes=sizes.others + sum(sizes.layers) - sum(sizes.layers[i] for i in chosen),
        slots_bytes=memory_bytes(layouts, settings.offload_depth),
        pass_bytes=sum(read.num_bytes for layout in layouts for read in layout.reads),
    )


def largest_slot_bytes(checkpoint: Checkpoint, settings: EngineSettings) -> int:
    """What a slot takes in which any layer has room; 0 where no layer can be read alone. Raises
    InvalidSetting where layers can't be offloaded with these settings, UnsupportedCheckpoint,
    CheckpointError."""
    if settings.offload in ("none", "0"):
        raise InvalidSetting(f"--offload is {settings.offload}: leave it to auto")
    _check_can_be(checkpoint, settings)
    tensors = list(checkpoint.tensors())
    names = _names(checkpoint, tensors)
    found = find_layers(checkpoint, names, range(len(names)), converted_file(checkpoint, "all"))
    return max((slot_layout(one.tensors).num_bytes for one in found.layers), default=0)


def _all_fits(checkpoint: Checkpoint, settings: EngineSettings) -> bool:
    budget = settings.device_memory
    return budget is not None and _num_bytes(checkpoint.tensors()) <= budget


def _check_can_be(checkpoint: Checkpoint, settings: EngineSettings) -> None:
    asked = "--device-memory" if settings.offload == "auto" else "--offload"
    if not settings.device.startswith("host"):
        raise InvalidSetting(
            f"{asked} lets layers be read into the host's memory, and --device is "
            f"{settings.device}: a model on a GPU must fit there, so leave out {asked}"
        )
    if settings.num_ranks > 1:
        raise InvalidSetting(
            f"{asked} lets layers be read as they are computed, by one rank: leave out {asked} or "
            f"{settings.ranks_asked_by}"
        )
    if settings.map_files:
        raise InvalidSetting(
            f"--map-files leaves to the kernel what {asked} does: leave out one of them"
        )
    if task_of(checkpoint.metadata()) == "embed":
        raise InvalidSetting(f"a model that embeds is not offloaded: leave out {asked}")


def _names(checkpoint: Checkpoint, tensors: Sequence[SourceTensor]) -> list[LayerNames]:
    """Less the tensors that are not in the checkpoint, such as tied ones."""
    shapes = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in tensors}
    dtype = checkpoint.dtype or float_dtype(shapes)
    module = skeleton(json.loads(checkpoint.metadata()["config"]), dtype)
    return [
        LayerNames(layer.prefix, tuple(n for n in layer.names if layer.prefix + n in shapes))
        for layer in names_of_layers(module)
    ]


def _sizes(tensors: Mapping[str, SourceTensor], found: OffloadedLayers) -> Sizes:
    def staying(layer: OffloadedLayer) -> int:
        return _num_bytes([tensors[layer.prefix + name] for name in layer.tensors])

    layers = tuple(staying(layer) for layer in found.layers)
    slots = tuple(slot_layout(layer.tensors).num_bytes for layer in found.layers)
    return Sizes(layers, slots, _num_bytes(list(tensors.values())) - sum(layers))


def _num_bytes(tensors: Sequence[SourceTensor]) -> int:
    """As they lie in a segment."""
    return sum(-(-one.num_bytes // ALIGNMENT) * ALIGNMENT for one in tensors)


def _check_fits(tensors: Sequence[SourceTensor], budget_bytes: int) -> None:
    needed = _num_bytes(tensors)
    if needed > budget_bytes:
        raise InvalidSetting(
            f"--device-memory is {budget_bytes // _MIB:,} MiB, but this model's weights take "
            f"{-(-needed // _MIB):,} MiB: leave --offload to auto, or give it more"
        )
