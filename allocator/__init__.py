"""The allocator's package: bytes, and who holds them. This is all that others may use of it.

Importing it is cheap: neither torch nor a device's library is loaded before it is needed.
"""

from allocator.backends import Mapping, device_fault, file_handle, kernel_object
from allocator.backends.capacity import headroom_bytes, memory_bounds, shared_memory_bound
from allocator.backends.limits import (
    address_space_failure,
    check_limits,
    file_size_failure,
)
from allocator.backends.numa import node_cpus
from allocator.backends.nvml import DeviceUsage, device_usage, device_usages
from allocator.backends.room import Room
from allocator.backends.runs import AbandonedRun, abandoned_runs, remove_abandoned
from allocator.client.client import Client, connect
from allocator.client.pool import Block, Lease
from allocator.client.views import PoolView, WeightSetView
from allocator.client.weights.weight_set import WeightSetReader, WeightSetWriter
from allocator.daemon.leftovers import Role, remove_leftovers
from allocator.daemon.settings import OPTIONS, cache_folder, option_arguments, parse_bytes
from allocator.digests import Digest
from allocator.errors import (
    AllocatorBusy,
    AllocatorError,
    AllocatorGone,
    AllocatorSilent,
    AlreadyRunning,
    DiskFull,
    DoubleFree,
    FingerprintMismatch,
    ForeignExtent,
    InvalidMessage,
    InvalidSetting,
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
from allocator.messages import ALIGNMENT, Manifest, Statistics, TensorEntry, manifest_bytes
from allocator.processes.identity import ProcessIdentity
from allocator.processes.own_module import module_command, module_environment
from allocator.processes.process_state import ProcessState
from allocator.runtime_dir import Owner, RuntimeDir

__all__ = [
    "ALIGNMENT",
    "OPTIONS",
    "AbandonedRun",
    "AllocatorBusy",
    "AllocatorError",
    "AllocatorGone",
    "AllocatorSilent",
    "AlreadyRunning",
    "Block",
    "Client",
    "DeviceUsage",
    "Digest",
    "DiskFull",
    "DoubleFree",
    "FingerprintMismatch",
    "ForeignExtent",
    "InvalidMessage",
    "InvalidSetting",
    "Lease",
    "Manifest",
    "Mapping",
    "NotWriter",
    "OutOfDeviceMemory",
    "Owner",
    "PoolView",
    "ProcessIdentity",
    "ProcessState",
    "QuotaExceeded",
    "Role",
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
    "WeightSetView",
    "WeightSetWriter",
    "abandoned_runs",
    "address_space_failure",
    "cache_folder",
    "check_limits",
    "connect",
    "device_fault",
    "device_usage",
    "device_usages",
    "file_handle",
    "file_size_failure",
    "headroom_bytes",
    "kernel_object",
    "manifest_bytes",
    "memory_bounds",
    "module_command",
    "module_environment",
    "node_cpus",
    "option_arguments",
    "parse_bytes",
    "remove_abandoned",
    "remove_leftovers",
    "shared_memory_bound",
]
