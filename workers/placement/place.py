"""From attached weights to a placement of them: where an instance decides between the kinds.

Owns what a placement needs of a process: memory for slots, open files, threads that read. Does not
know which layers are offloaded, or why: the weight set says so.
"""

from contextlib import ExitStack

from allocator import Client
from workers.checkpoint import AttachedWeights
from workers.checkpoint.offloaded import OffloadedLayers
from workers.model.stretch import Placement
from workers.placement.layer_slots import LayerSlots, memory_bytes
from workers.placement.offloaded import Offloaded
from workers.placement.reader import Reader
from workers.placement.resident import Resident
from workers.placement.slots import slot_layout


def place(memory: Client, weights: AttachedWeights, depth: int, resources: ExitStack) -> Placement:
    """A placement that `resources` end before the session does; offloaded layers are read `depth`
    ahead. Raises CheckpointChanged, OutOfDeviceMemory, QuotaExceeded."""
    offloaded = weights.offloaded
    if offloaded is None:
        return Resident(weights.tensors)
    return Offloaded(weights.tensors, offloaded, _slots(memory, offloaded, depth, resources))


def _slots(
    memory: Client, offloaded: OffloadedLayers, depth: int, resources: ExitStack
) -> LayerSlots:
    layouts = [slot_layout(layer.tensors) for layer in offloaded.layers]
    lease = memory.lease(memory_bytes(layouts, depth))
    reader = resources.enter_context(Reader())
    for file in offloaded.files:
        reader.open(file.check())
    return LayerSlots(layouts, depth, lease.tensor(), reader)
