"""What `onecopy doctor` thinks of the processor and of GPUs, by what was read of them. Pure.

Owns these criteria and their advice. Invariant: that of `checks`.
"""

import re
from collections.abc import Mapping
from typing import Final

from server.machine.checks import Check, info, ok, problem, warning
from server.units import size_text

X86_FLAGS: Final = ("amx_bf16", "avx512_bf16", "avx2")
ARM_FLAGS: Final = ("sve", "bf16", "i8mm")


def nvidia(version: str | None, usable: Mapping[str, bool], failure: str | None) -> Check:
    """`version`: /proc/driver/nvidia/version; `usable`: device files, and whether we may read and
    write them; `failure`: why libcuda.so.1 can't be loaded, None where it can."""
    name, gpus = "NVIDIA", [one for one in usable if re.fullmatch(r"/dev/nvidia\d+", one)]
    match = re.search(r"Module.*?\s(\d+(?:\.\d+)+)", version or "")
    driver = f"driver {match[1]}" if match else "no driver shown" if version is None else "a driver"
    if not gpus and version is None:
        return info(name, "no NVIDIA GPU: onecopy runs on host memory")
    if not gpus:
        fix = "in a container start it with `--gpus all`, else as root: `nvidia-modprobe -c 0 -u`"
        return warning(name, f"{driver}, but no /dev/nvidia0", fix)
    seen = f"{driver}, {len(gpus)} GPU{'' if len(gpus) == 1 else 's'}"
    if closed := [one for one in usable if not usable[one]]:
        fix = f"`ls -l {closed[0]}` shows the group to join: as root, `usermod -aG GROUP USER`"
        return warning(name, f"{seen}; {', '.join(closed)} can't be opened", fix)
    if "/dev/nvidia-uvm" not in usable:
        return warning(
            name, f"{seen}, but no /dev/nvidia-uvm", "as root: `nvidia-modprobe -c 0 -u`"
        )
    if failure is not None:
        return warning(
            name,
            f"{seen}; {failure}",
            "install the driver's libcuda.so.1 (Debian: `apt install libcuda1`); "
            "in a container `-e NVIDIA_DRIVER_CAPABILITIES=compute,utility`",
        )
    return ok(name, f"{seen}, libcuda.so.1 loads")


def gpu(name: str, model: str, free_bytes: int, compute_mode: str) -> Check:
    """One GPU as NVML tells of it. Several instances need a context each on it."""
    seen = f"{model}, {size_text(free_bytes)} free"
    if compute_mode == "prohibited":
        fix = f"as root: `nvidia-smi -i {name} -c DEFAULT`"
        return problem("GPU", f"{seen}, but its compute mode lets no program use it", fix)
    if compute_mode.startswith("exclusive"):
        return warning(
            "GPU",
            f"{seen}; its compute mode is {compute_mode}: it takes one process, so one instance",
            f"as root: `nvidia-smi -i {name} -c DEFAULT`, or run NVIDIA's MPS daemon",
        )
    return ok("GPU", seen)


def cpu(cpuinfo: str | None) -> Check:
    """/proc/cpuinfo: which of the instructions that matter for bfloat16 there are."""
    if cpuinfo is None:
        return info("CPU", "/proc/cpuinfo can't be read")
    fields = dict[str, str]()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    known, has = X86_FLAGS, fields.get("flags", "").split()
    if "Features" in fields:
        known, has = ARM_FLAGS, fields["Features"].split()
    parts = [", ".join(flag for flag in known if flag in has)]
    if lacking := [flag for flag in known if flag not in has]:
        parts.append(f"no {', '.join(lacking)}")
    model = f"{fields['model name']}: " if "model name" in fields else ""
    return info("CPU", model + "; ".join(filter(None, parts)))


def cpu_kernels(reasons: Mapping[str, str]) -> Check:
    """`reasons`: the instruction sets that the processor has, the best first, and why the kernels
    for each can't be used all the same, "" where they can."""
    name = "CPU kernels"
    usable = [kernels for kernels, reason in reasons.items() if not reason]
    if not usable:
        return warning(
            name,
            "none: models are computed by transformers, several times slower, and a text may "
            "depend on what else runs",
            "install a C++ compiler (as root: `apt install g++`), then onecopy again",
        )
    missed = [f"not {kernels}: {reason}" for kernels, reason in reasons.items() if reason]
    others = [f"{', '.join(usable[1:])} by --cpu-kernels"] if usable[1:] else []
    return info(name, "; ".join([usable[0], *others, *missed]))
