"""The allocator's room: bytes, and who holds them. This is all that other rooms may use of it.

Importing it is cheap: neither torch nor a device's library is loaded before it is needed.
"""

from allocator.backends import Mapping, file_handle
from allocator.backends.capacity import headroom_bytes, memory_bounds, shared_memory_bound
from allocator.backends.limits import (
    address_space_failure,
    check_limits,
    file_size_failure,
)
from allocator.backends.segments import AbandonedRun, abandoned_runs, remove_abandoned
from allocator.client import Client, connect
from allocator.daemon_settings import parse_bytes
from allocator.digests import Digest
from allocator.errors import (
    AllocatorBusy,
    AllocatorError,
    AllocatorGone,
    AlreadyRunning,
    DiskFull,
    DoubleFree,
    FingerprintMismatch,
    ForeignExtent,
    InvalidMessage,
    NotWriter,
    OutOfDeviceMemory,
    QuotaExceeded,
    RoomTaken,
    RuntimeDirError,
    StaleGeneration,
    Unauthorized,
    UnknownWeightSet,
    WaitTimeout,
    WeightSetBusy,
)
from allocator.leases import Block, Lease
from allocator.messages import ALIGNMENT, Manifest, Statistics, TensorEntry, manifest_bytes
from allocator.process_identity import ProcessIdentity
from allocator.room import Room
from allocator.runtime_dir import RuntimeDir
from allocator.weights import WeightSetReader, WeightSetWriter

__all__ = [
    "ALIGNMENT",
    "AbandonedRun",
    "AllocatorBusy",
    "AllocatorError",
    "AllocatorGone",
    "AlreadyRunning",
    "Block",
    "Client",
    "Digest",
    "DiskFull",
    "DoubleFree",
    "FingerprintMismatch",
    "ForeignExtent",
    "InvalidMessage",
    "Lease",
    "Manifest",
    "Mapping",
    "NotWriter",
    "OutOfDeviceMemory",
    "ProcessIdentity",
    "QuotaExceeded",
    "Room",
    "RoomTaken",
    "RuntimeDir",
    "RuntimeDirError",
    "StaleGeneration",
    "Statistics",
    "TensorEntry",
    "Unauthorized",
    "UnknownWeightSet",
    "WaitTimeout",
    "WeightSetBusy",
    "WeightSetReader",
    "WeightSetWriter",
    "abandoned_runs",
    "address_space_failure",
    "check_limits",
    "connect",
    "file_handle",
    "file_size_failure",
    "headroom_bytes",
    "manifest_bytes",
    "memory_bounds",
    "parse_bytes",
    "remove_abandoned",
    "shared_memory_bound",
]
