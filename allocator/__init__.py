"""The allocator's room: bytes, and who holds them. This is all that other rooms may use of it.

Importing it is cheap: neither torch nor a device's library is loaded before it is needed.
"""

from allocator.client import Client, WeightSetReader, WeightSetWriter, connect
from allocator.errors import (
    AllocatorError,
    AllocatorGone,
    AlreadyRunning,
    FingerprintMismatch,
    InvalidMessage,
    NotWriter,
    OutOfDeviceMemory,
    RuntimeDirError,
    StaleGeneration,
    Unauthorized,
    UnknownWeightSet,
    WaitTimeout,
    WeightSetBusy,
)
from allocator.messages import ALIGNMENT, Manifest, Statistics, TensorEntry
from allocator.process_identity import ProcessIdentity
from allocator.runtime_dir import RuntimeDir

__all__ = [
    "ALIGNMENT",
    "AllocatorError",
    "AllocatorGone",
    "AlreadyRunning",
    "Client",
    "FingerprintMismatch",
    "InvalidMessage",
    "Manifest",
    "NotWriter",
    "OutOfDeviceMemory",
    "ProcessIdentity",
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
    "connect",
]
