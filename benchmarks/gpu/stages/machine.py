"""What the machine is: driver, what the device can do, who sees it under which name, what a fork
survives."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.stage import MIB, NotRun, Stage, main

from allocator import DeviceUsage, device_usage
from allocator.backends.cuda_driver import DriverError, allocation_properties, call, find, load

_PACKAGES = ("torch", "transformers", "cuda-bindings", "nvidia-ml-py", "pyzmq", "msgspec")
_ATTRIBUTES = (
    "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
    "HANDLE_TYPE_FABRIC_SUPPORTED",
    "MULTICAST_SUPPORTED",
    "GPU_DIRECT_RDMA_SUPPORTED",
    "UNIFIED_ADDRESSING",
    "COMPUTE_CAPABILITY_MAJOR",
    "COMPUTE_CAPABILITY_MINOR",
    "MULTIPROCESSOR_COUNT",
    "COMPUTE_MODE",
)
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_FORKED = """
import os, sys
from workers.process import forkserver
forkserver._preload(sys.argv[2], "auto", None)
if "transformers.models.llama.modeling_llama" not in sys.modules:
    sys.exit("the architecture was not preloaded")
pid = os.fork()
if pid == 0:
    from allocator.backends.cuda_driver import current, find
    found = find(sys.argv[1])
    with current(found.ordinal):
        print(found.name, flush=True)
    if len(sys.argv) > 3:
        import torch
        print(torch.ones(3, device=sys.argv[1]).sum().item(), flush=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run(stage: Stage) -> None:
    stage.figure("python", platform.python_version())
    stage.figure("kernel", platform.release())
    stage.figure("packages", {name: _version(name) for name in _PACKAGES})
    with stage.part("memory"):
        _memory(stage)
    with stage.part("the driver"):
        _driver(stage)
    with stage.part("NVML"):
        _nvml(stage)
    with stage.part("torch names the same device"):
        _torch(stage)
    with stage.part("a fork of what has imported torch and transformers uses the device"):
        _fork(stage)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory(stage: Stage) -> None:
    """Of the host: what sleeps there, and what copies start from, must fit."""
    stage.figure("num_cores", os.cpu_count())
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    stage.figure("host_memory_bytes", sizes["MemTotal"])
    stage.figure("host_memory_available_bytes", sizes["MemAvailable"])
    status = os.statvfs("/dev/shm")
    stage.figure("shm_bytes", status.f_blocks * status.f_frsize)


def _driver(stage: Stage) -> None:
    begun = time.perf_counter()
    driver = load()
    stage.figure("driver_start_ms", round((time.perf_counter() - begun) * 1000, 1))
    device = find(stage.device)
    stage.figure("cuda_version", call(driver.cuDriverGetVersion))
    stage.figure("device", device.name)
    stage.figure("model", device.model)
    stage.figure("total_bytes", device.total_bytes)
    properties = allocation_properties(driver, device.ordinal)
    kinds = driver.CUmemAllocationGranularity_flags
    for name in ("MINIMUM", "RECOMMENDED"):
        kind = getattr(kinds, f"CU_MEM_ALLOC_GRANULARITY_{name}")
        granularity = call(driver.cuMemGetAllocationGranularity, properties, kind)
        stage.figure(f"granularity_{name.lower()}_bytes", granularity)
    stage.figure(
        "attributes", {name: _attribute(driver, device.ordinal, name) for name in _ATTRIBUTES}
    )


def _attribute(driver: Any, ordinal: int, name: str) -> int | None:
    number = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
    try:
        return None if number is None else int(call(driver.cuDeviceGetAttribute, number, ordinal))
    except DriverError:
        return None


def _nvml(stage: Stage) -> None:
    usage: DeviceUsage = device_usage(find(stage.device).name)
    stage.figure("driver", usage.driver)
    stage.figure("compute_mode", usage.compute_mode)
    stage.figure("mig", usage.mig)
    stage.figure("used_bytes_at_the_start", usage.used_bytes)
    stage.figure("reserved_bytes", usage.reserved_bytes)
    program = "import time; from allocator.backends.cuda_driver import current\nwith current(0): "
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", program + "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    begun = time.perf_counter()
    child.stdout.readline()
    stage.figure("process_with_context_ms", round((time.perf_counter() - begun) * 1000, 1))
    with_one = device_usage(find(stage.device).name)
    child.communicate(b"\n")
    stage.figure("context_bytes", with_one.used_bytes - usage.used_bytes)
    stage.figure("context_bytes_by_process", with_one.processes.get(child.pid))
    stage.claim(
        "the driver tells processes apart by the pids that we know",
        stage.small or child.pid in with_one.processes,
        num_processes=len(with_one.processes),
    )


def _torch(stage: Stage) -> None:
    if not stage.on_gpu:
        raise NotRun("no GPU for torch")
    import torch

    properties = torch.cuda.get_device_properties(0)
    stage.claim(
        "torch and the driver give the device one UUID",
        find(stage.device).name == f"cuda:GPU-{properties.uuid}",
        torch=str(properties.uuid),
        driver=find(stage.device).name,
    )
    stage.claim(
        "torch and the driver agree on the device's memory",
        abs(properties.total_memory - find(stage.device).total_bytes) < 64 * MIB,
        torch=properties.total_memory,
        driver=find(stage.device).total_bytes,
    )
    before = torch.cuda.mem_get_info()[0]
    kept = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    torch.cuda.synchronize()
    stage.figure("first_product_takes_bytes", before - torch.cuda.mem_get_info()[0])
    del kept


def _fork(stage: Stage) -> None:
    model = stage.folder / "llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(_CONFIG))
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    more = ["torch"] if stage.on_gpu else []
    ended = subprocess.run(
        [sys.executable, "-P", "-c", _FORKED, stage.device, str(model), *more],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    stage.claim(
        "importing torch and transformers leaves CUDA alone, so what is forked can use it",
        ended.returncode == 0,
        said=(ended.stdout + ended.stderr)[-500:],
    )


if __name__ == "__main__":
    main(run)
