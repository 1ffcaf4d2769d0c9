"""Which layers of a checkpoint are offloaded: by what was asked for, and what there is room for.

Owns the way from a checkpoint and settings to that list. Reads headers only. Does not know how
layers are read or computed.
"""

import json
import logging
from collections.abc import Mapping, Sequence
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


def choose(
    checkpoint: Checkpoint, settings: EngineSettings, on_written: OnWritten = lambda *_: None
) -> OffloadedLayers | None:
    """What is to be offloaded, None for nothing; layers that must be converted for that are written
    to a file first. Raises InvalidSetting where that can't be done, or what stays is more than it
    may be; UnsupportedCheckpoint, CheckpointError, DiskFull."""
    budget = settings.device_memory
    if settings.offload in ("none", "0") or (settings.offload == "auto" and budget is None):
        _check_fits(checkpoint.tensors(), budget)
        return None
    if settings.offload == "auto" and _num_bytes(checkpoint.tensors()) <= (budget or 0):
        return None
    _check_can_be(checkpoint, settings)
    if budget is not None and _num_bytes(checkpoint.tensors()) <= budget:
        log.warning(
            "--offload %s makes this model slower, and all of it fits: --device-memory is %d MiB",
            settings.offload,
            budget // _MIB,
        )
    tensors = {one.name: one for one in checkpoint.tensors()}
    names = _names(checkpoint, list(tensors.values()))
    found = find_layers(checkpoint, names, range(len(names)), converted_file(checkpoint, "all"))
    sizes = _sizes(tensors, found)
    chosen = offloaded_layers(sizes, settings.offload, settings.offload_depth, budget)
    if not chosen:
        return None
    file = converted_file(checkpoint, ",".join(map(str, chosen)))
    gone = write_converted(checkpoint, find_layers(checkpoint, names, chosen, file), on_written)
    layouts = [slot_layout(layer.tensors) for layer in gone.layers]
    log.info(
        "%d of %d layers are offloaded: %d MiB of weights stay, %d MiB are read in each pass, "
        "through slots of %d MiB",
        len(chosen),
        len(names),
        (sizes.others + sum(sizes.layers) - sum(sizes.layers[i] for i in chosen)) // _MIB,
        sum(read.num_bytes for layout in layouts for read in layout.reads) // _MIB,
        memory_bytes(layouts, settings.offload_depth) // _MIB,
    )
    return gone


def _check_can_be(checkpoint: Checkpoint, settings: EngineSettings) -> None:
    if not settings.device.startswith("host"):
        raise InvalidSetting(
            f"--offload reads layers into the host's memory, and --device is {settings.device}: "
            "models on a GPU must fit there"
        )
    if settings.map_files:
        raise InvalidSetting("--map-files leaves to the kernel what --offload does: give up one")
    if task_of(checkpoint.metadata()) == "embed":
        raise InvalidSetting("a model that embeds is not offloaded: leave out --offload")


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


def _check_fits(tensors: Sequence[SourceTensor], budget_bytes: int | None) -> None:
    needed = _num_bytes(tensors)
    if budget_bytes is not None and needed > budget_bytes:
        raise InvalidSetting(
            f"--device-memory is {budget_bytes // _MIB:,} MiB, but this model's weights take "
            f"{-(-needed // _MIB):,} MiB: leave --offload to auto, or give it more"
        )
