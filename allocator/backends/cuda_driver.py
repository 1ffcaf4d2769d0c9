"""The CUDA driver: its calls with errors as exceptions, its devices by UUID, contexts in client
processes.

Owns the step from `cuda.bindings` to this room, and the primary contexts that this process retains.
Invariants: importing this module loads nothing of CUDA; a device is named by its UUID, since
ordinals differ between processes (CUDA_VISIBLE_DEVICES); only `current` ever makes a context, and
it leaves the thread's own as it was.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from allocator.errors import DeviceError, InvalidSetting

_UUID_PREFIX: Final = "GPU-"
_NAME_BYTES: Final = 256
_NOT_FOR_US: Final = ("CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA_ERROR_INVALID_DEVICE")


class DriverError(DeviceError):
    """A call of the driver failed. `result` is its name for the reason, "CUDA_ERROR_…"."""

    def __init__(self, function: str, result: str):
        super().__init__(f"{function}: {result}")
        self.result = result


@dataclass(frozen=True)
class CUDADevice:
    """A GPU that this process can see, at `ordinal` here. `name` is "cuda:GPU-<UUID>" and means the
    same in every process; `model` is for people."""

    ordinal: int
    name: str
    model: str
    total_bytes: int
    granularity: int


_loaded: tuple[int, Any] | None = None
"""In which process, and the bindings."""


def load() -> Any:
    """`cuda.bindings.driver`, initialised in this process. Raises InvalidSetting with the fix."""
    global _loaded  # the driver, too, has one state a process
    if _loaded is None or _loaded[0] != os.getpid():
        _loaded = os.getpid(), _load()
    return _loaded[1]


def _load() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise InvalidSetting(
            "a device cuda:N needs the package cuda-bindings: install onecopy with its extra, "
            "`pip install 'onecopy[cuda]'`"
        ) from error
    try:
        (result,) = driver.cuInit(0)
    except RuntimeError as error:  # what the bindings raise where they find no libcuda.so.1
        raise InvalidSetting(
            "a device cuda:N needs NVIDIA's driver, and libcuda.so.1 can't be loaded: install the "
            "driver, or start the container with `--gpus all`"
        ) from error
    if result.name == "CUDA_ERROR_NOT_INITIALIZED":
        raise InvalidSetting(
            "CUDA was used before this process was forked, and does not survive that: fork first"
        )
    if result.value:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if mask is None else f", and that CUDA_VISIBLE_DEVICES={mask!r} does not hide it"
        raise InvalidSetting(
            f"NVIDIA's driver finds no GPU ({result.name}): see that `nvidia-smi` lists one{hint}"
        )
    return driver


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """What the driver's function returns beside its result: nothing, one value or a tuple. Raises
    DriverError."""
    result, *values = function(*arguments)
    if result.value:
        raise DriverError(function.__name__, result.name)
    return values[0] if len(values) == 1 else tuple(values) or None


def find(wanted: str) -> CUDADevice:
    """The device "cuda:N" (of this process's count) or "cuda:GPU-<UUID>" ("cuda" is the first).
    Raises InvalidSetting where there is none, or one that can't share memory as we do."""
    driver = load()
    _, _, which = wanted.partition(":")
    names = [_name(driver, ordinal) for ordinal in range(call(driver.cuDeviceGetCount))]
    if wanted in names:
        ordinal = names.index(wanted)
    elif wanted == "cuda" or which.isdecimal():
        ordinal = int(which or "0")
    else:
        ordinal = len(names)
    if ordinal >= len(names):
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if mask is None else f"; CUDA_VISIBLE_DEVICES={mask!r} may hide it"
        raise InvalidSetting(f"there is no device {wanted!r}, only {', '.join(names)}{hint}")
    device = call(driver.cuDeviceGet, ordinal)
    _require_sharing(driver, device, names[ordinal])
    model: bytes = call(driver.cuDeviceGetName, _NAME_BYTES, device)
    return CUDADevice(
        ordinal=ordinal,
        name=names[ordinal],
        model=model.partition(b"\0")[0].decode().strip(),
        total_bytes=call(driver.cuDeviceTotalMem, device),
        granularity=call(
            driver.cuMemGetAllocationGranularity,
            allocation_properties(driver, ordinal),
            driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        ),
    )


def allocation_properties(driver: Any, ordinal: int) -> Any:
    """Memory of this device that can be exported as a file descriptor."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = descriptor_type(driver)
    properties.location = location(driver, ordinal)
    return properties


def descriptor_type(driver: Any) -> Any:
    """The one kind of handle that we export and import."""
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def location(driver: Any, ordinal: int) -> Any:
    """This device, as the driver names a place of memory."""
    place = driver.CUmemLocation()
    place.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    place.id = ordinal
    return place


_contexts: dict[int, Any] = {}
_contexts_lock = threading.RLock()  # a finalizer may run while its thread holds it


@contextlib.contextmanager
def current(ordinal: int) -> Iterator[Any]:
    """The driver, with the device's primary context current on this thread; afterwards the thread
    has again what it had. The primary context is the one that torch uses, too, and it is pushed and
    popped, because setting it would change torch's current device under its feet. Retained once a
    process and never released: the process's end does that. For clients only."""
    driver = load()
    with _contexts_lock:
        if ordinal not in _contexts:
            _contexts[ordinal] = _context(driver, ordinal)
    call(driver.cuCtxPushCurrent, _contexts[ordinal])
    try:
        yield driver
    finally:
        call(driver.cuCtxPopCurrent)


def fault(device: str) -> str | None:
    """See `allocator.backends.device_fault`. An error that spoils a context is what every call in
    it fails with from then on, so the plainest one tells."""
    try:
        with current(find(device).ordinal) as driver:
            call(driver.cuCtxSynchronize)
    except (DriverError, InvalidSetting) as error:
        return str(error)
    return None


def _context(driver: Any, ordinal: int) -> Any:
    device = call(driver.cuDeviceGet, ordinal)
    try:
        return call(driver.cuDevicePrimaryCtxRetain, device)
    except DriverError as error:
        if error.result not in _NOT_FOR_US:
            raise
        raise InvalidSetting(
            f"{_name(driver, ordinal)} lets this process not compute ({error.result}): its compute "
            "mode is prohibited, or exclusive and another process uses it. As root: "
            "`nvidia-smi -c DEFAULT`, or run NVIDIA's MPS daemon"
        ) from error


def _name(driver: Any, ordinal: int) -> str:
    # From CUDA 13 on the plain name is the second version, which tells slices of one GPU apart.
    get_uuid = getattr(driver, "cuDeviceGetUuid_v2", driver.cuDeviceGetUuid)
    identity = call(get_uuid, call(driver.cuDeviceGet, ordinal))
    return f"cuda:{_UUID_PREFIX}{uuid.UUID(bytes=bytes(identity.bytes)[:16])}"


def _require_sharing(driver: Any, device: Any, name: str) -> None:
    attributes = driver.CUdevice_attribute
    for attribute, what in (
        (
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            "virtual memory management",
        ),
        (
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            "memory exported as file descriptors",
        ),
    ):
        try:
            supported = call(driver.cuDeviceGetAttribute, attribute, device)
        except DriverError:  # a driver that is older than the attribute
            supported = 0
        if not supported:
            raise InvalidSetting(
                f"{name} does not support {what}, which sharing its memory needs (a driver older "
                "than 450, WSL, or a virtual GPU without unified memory): use the device host"
            )
