"""What NVIDIA's driver says of a GPU's memory, all processes together and one by one.

By way of NVML, which needs no context: asking costs nothing on the device. Invariant: nothing of
NVML is loaded before somebody asks, and what was loaded is let go again.

Processes are told by the pids of NVML's own pid namespace. Where it runs in another one than this
process, as in most containers, the list may be empty though the memory is in use.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from allocator.errors import InvalidSetting

_COMPUTE_MODES: Final = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive"}
_PREFIXES: Final = ("GPU-", "MIG-")


@dataclass(frozen=True)
class DeviceUsage:
    """One GPU, in bytes. `used_bytes` is what processes have, without what the driver keeps for
    itself, `reserved_bytes`."""

    name: str
    """"GPU-<UUID>" """
    model: str
    driver: str
    total_bytes: int
    used_bytes: int
    reserved_bytes: int
    processes: Mapping[int, int | None]
    """pid → bytes, None where the driver does not say; contexts included. Whether memory that was
    imported counts is the driver's choice."""
    compute_mode: str
    mig: bool


def device_usage(device: str) -> DeviceUsage:
    """Of the device "cuda:GPU-<UUID>". Raises InvalidSetting, with the fix, where NVML can't be
    asked or knows no such device."""
    with _library() as nvml:
        return _usage(nvml, _handle(nvml, device))


def device_usages() -> list[DeviceUsage]:
    """Of all GPUs that NVML sees. Raises InvalidSetting."""
    with _library() as nvml:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return [_usage(nvml, handle) for handle in handles]


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """`pynvml`, initialised; its errors come out as InvalidSetting."""
    try:
        import pynvml
    except ImportError as error:
        raise InvalidSetting(
            "the driver's figures need the package nvidia-ml-py: install onecopy with its extra, "
            "`pip install 'onecopy[cuda]'`"
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise InvalidSetting(
            f"NVIDIA's management library can't be used ({error}): see that `nvidia-smi` works; in "
            "a container `-e NVIDIA_DRIVER_CAPABILITIES=compute,utility`"
        ) from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise InvalidSetting(f"NVIDIA's management library does not tell: {error}") from error
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, device: str) -> Any:
    """CUDA gives a slice of a GPU the same kind of name as a whole one; NVML tells them apart."""
    _, _, name = device.partition(":")
    identity = name.removeprefix(_PREFIXES[0])
    for prefix in _PREFIXES:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(prefix + identity)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            continue
    raise InvalidSetting(f"NVML knows no device {device}: see `nvidia-smi -L`")


def _usage(nvml: Any, handle: Any) -> DeviceUsage:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    processes = {
        one.pid: one.usedGpuMemory for one in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    }
    mode = _optional(nvml, nvml.nvmlDeviceGetComputeMode, handle)
    mig = _optional(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return DeviceUsage(
        name=nvml.nvmlDeviceGetUUID(handle),
        model=nvml.nvmlDeviceGetName(handle),
        driver=nvml.nvmlSystemGetDriverVersion(),
        total_bytes=memory.total,
        used_bytes=memory.used,
        reserved_bytes=memory.reserved,
        processes=processes,
        compute_mode=_COMPUTE_MODES.get(mode, "unknown"),
        mig=bool(mig and mig[0]),
    )


def _optional(nvml: Any, ask: Any, handle: Any) -> Any:
    """None where this device has no such thing."""
    try:
        return ask(handle)
    except nvml.NVMLError_NotSupported:
        return None
