"""From attached weights to a placement of them: where an instance decides between the kinds.

Owns what a placement needs of a process: memory for slots, open files, threads that read. Does not
know which layers are offloaded, or why: the weight set says so.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from allocator import Client
from workers.checkpoint import AttachedWeights
from workers.checkpoint.offloaded import OffloadedLayers
from workers.config.model_file import identity_of
from workers.errors import CheckpointNotFound
from workers.model.stretch import Placement
from workers.placement.layer_slots import LayerSlots, memory_bytes
from workers.placement.offloaded import Offloaded
from workers.placement.reader import Reader
from workers.placement.resident import Resident
from workers.placement.slots import slot_layout


def place(memory: Client, weights: AttachedWeights, depth: int, resources: ExitStack) -> Placement:
    """A placement that `resources` end before the session does; offloaded layers are read `depth`
    ahead. Raises CheckpointChanged, CheckpointNotFound, OutOfDeviceMemory, QuotaExceeded."""
    offloaded = weights.offloaded
    if offloaded is None:
        return Resident(weights.tensors)
    layouts = [slot_layout(layer.tensors) for layer in offloaded.layers]
    reader = Reader()
    with ExitStack() as stack:
        stack.callback(reader.close)
        check_files = open_files(reader, offloaded)
        lease = memory.lease(memory_bytes(layouts, depth))
        stack.pop_all()
    slots = LayerSlots(layouts, depth, lease.tensor(), reader)
    resources.callback(slots.close)
    return Offloaded(weights.tensors, offloaded, slots, check_files)


def open_files(reader: Reader, offloaded: OffloadedLayers) -> Callable[[], None]:
    """All files, in order. Returns what raises CheckpointChanged once one of them is not what it
    was; raises it, and CheckpointNotFound."""
    numbers = []
    for file in offloaded.files:
        try:
            numbers.append(reader.open(Path(file.path)))
        except OSError as error:
            raise CheckpointNotFound(
                f"{file.path}, in which offloaded layers are, can't be read ({error.strerror}): "
                "`onecopy reload` finds them anew"
            ) from error

    def check() -> None:
        for number, file in zip(numbers, offloaded.files, strict=True):
            file.check(identity_of(reader.status(number)))

    check()
    return check
