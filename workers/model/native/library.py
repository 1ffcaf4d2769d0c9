"""The compiled kernels: one library for each instruction set, and their C structures.

Owns the handles of the libraries. Invariants: one is loaded only on a processor that has every
instruction it was compiled for, and after the kernel has granted its registers; the structures are
those of description.h, and their sizes are compared. Knows no model.

`setup.py` says how they are compiled.
"""

import ctypes
import functools
import os
import platform
import sysconfig
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

VARIABLE: Final = "ONECOPY_CPU_KERNELS"
"""Environment variable that names the set where no option does."""

SETS: Final = ("amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "portable")
"""The best first."""

MACHINES: Final = {
    "amx": "x86_64",
    "avx512_bf16": "x86_64",
    "avx512": "x86_64",
    "avx2": "x86_64",
    "neon_bf16": "aarch64",
}
"""Set → what it is compiled for; any that is not here for every machine."""

_AVX2: Final = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_AVX512: Final = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_FLAGS: Final = {
    "amx": _AVX512 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"},
    "avx512_bf16": _AVX512 | {"avx512_bf16", "avx512_vnni"},
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon_bf16": frozenset({"asimd", "bf16"}),
    "portable": frozenset[str](),
}
"""What a set needs, in /proc/cpuinfo's words."""

OPERATIONS: Final = (
    "norm",
    "qkv",
    "rotate",
    "attend",
    "output",
    "gate_up",
    "down",
    "logits",
    "wait",
)
"""What the first thread's time is counted by, in this order."""


class Unavailable(Exception):
    """The message says why there are no kernels here."""


class NotThisProcessor(Unavailable):
    """It has not the instructions."""


class Matrix(ctypes.Structure):
    """Row-major [num_rows, width of the linear], rows `stride` elements apart or, where that is 0,
    one behind the other; format 0 is bf16, and others are those of `workers.packed_format`, of
    which it may be a part of one tile's columns, behind those that are `skipped`."""

    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("num_rows", c_int64),
        ("format", c_int32),
        ("stride", c_int32),
        ("skipped", c_int32),
    ]


class Linear(ctypes.Structure):
    """Up to three matrices of one input."""

    _fields_: ClassVar = [
        ("matrices", Matrix * 3),
        ("num_matrices", c_int32),
        ("width", c_int32),
        ("num_outputs", c_int32),
    ]


class Norm(ctypes.Structure):
    """`kind` is one of `NormKind`."""

    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("kind", c_int32),
    ]


class Attention(ctypes.Structure):
    """`scale` and `softcap` are times log2(e)."""

    _fields_: ClassVar = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int32),
        ("sees_all", c_int32),
        ("layer_offset", c_int64),
        ("open_offset", c_int64),
        ("open_block", c_int32),
        ("kept_bits", c_int32),
        ("query", c_int32),
        ("query_step", c_int32),
        ("key", c_int32),
        ("key_step", c_int32),
        ("value", c_int32),
        ("value_step", c_int32),
    ]


class Experts(ctypes.Structure):
    """No experts where `num_experts` is 0."""

    _fields_: ClassVar = [
        ("router", Linear),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("intermediate", c_int32),
        ("normalizes", c_int32),
        ("rounds_weights", c_int32),
    ]


class Layer(ctypes.Structure):
    """LayerSpec."""

    _fields_: ClassVar = [
        ("qkv", Linear),
        ("output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("input_norm", Norm),
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("mlp_output_norm", Norm),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("attention", Attention),
        ("rope", c_int32),
        ("norms_all_heads", c_int32),
        ("residual", c_int32),
        ("experts", Experts),
    ]


class Ranks(ctypes.Structure):
    """Functions and handle of a group that sums; no other ranks where `group` is None."""

    _fields_: ClassVar = [
        ("group", c_void_p),
        ("own_part", c_void_p),
        ("part_of", c_void_p),
        ("publish", c_void_p),
        ("wait", c_void_p),
        ("timeout_ns", c_int64),
        ("num_ranks", c_int32),
    ]


class Decoder(ctypes.Structure):
    """DecoderSpec."""

    _fields_: ClassVar = [
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("activation", c_int32),
        ("packs", c_int32),
        ("kept_bits", c_int32),
        ("embedding", Matrix),
        ("embedding_scale", c_float),
        ("type_embedding", c_void_p),
        ("position_embedding", c_void_p),
        ("embedding_norm", Norm),
        ("residual_scale", c_float),
        ("final_norm", Norm),
        ("head", Linear),
        ("logit_scale", c_float),
        ("logit_softcap", c_float),
        ("rope_cos", c_void_p * 2),
        ("rope_sin", c_void_p * 2),
        ("rotary_dim", c_int32),
        ("rotation", c_int32),
        ("max_rows", c_int32),
        ("max_model_len", c_int32),
        ("num_threads", c_int32),
        ("max_outputs", c_int32),
        ("max_attended", c_int32),
        ("max_head_dim", c_int32),
        ("max_kv_heads", c_int32),
        ("max_experts", c_int32),
        ("max_top_k", c_int32),
        ("expert_intermediate", c_int32),
        ("ranks", Ranks),
    ]


class Call(ctypes.Structure):
    """Call."""

    _fields_: ClassVar = [
        ("layers", POINTER(Layer)),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("tables", c_void_p),
        ("addresses", c_void_p),
        ("open_blocks", c_void_p),
        ("logit_rows", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("num_layers", c_int32),
        ("num_rows", c_int32),
        ("max_blocks", c_int32),
        ("num_logit_rows", c_int32),
        ("num_threads", c_int32),
        ("num_open_blocks", c_int32),
        ("norms_hidden", c_int32),
        ("result", c_int64),
        ("failed_rank", c_int64),
    ]


@dataclass(frozen=True)
class Kernels:
    """One library, loaded. `name` is that of its instruction set."""

    name: str
    library: Any


def load(wanted: str = "auto") -> Kernels:
    """The kernels of that set, or with "auto" those that ONECOPY_CPU_KERNELS names, or the best
    that the machine has. Raises Unavailable."""
    name = wanted if wanted != "auto" else os.environ.get(VARIABLE) or "auto"
    if name == "auto":
        return _best()
    if name not in SETS:
        raise Unavailable(f"there are no kernels {name!r}, only {', '.join(SETS)}")
    return _load(name)


def usable() -> dict[str, Unavailable | None]:
    """Every set → why it can't be used here, None where it can."""
    reasons: dict[str, Unavailable | None] = {}
    for name in SETS:
        try:
            _load(name)
        except Unavailable as reason:
            reasons[name] = reason
        else:
            reasons[name] = None
    return reasons


def _best() -> Kernels:
    reasons = []
    for name in SETS:
        try:
            return _load(name)
        except Unavailable as reason:
            reasons.append(f"{name}: {reason}")
    raise Unavailable("; ".join(reasons))


@functools.cache
def _load(name: str) -> Kernels:
    file = Path(__file__).with_name(f"_decoder_{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
    check_processor(name)
    if not file.exists():
        raise Unavailable("not compiled when onecopy was installed")
    return open_library(name, file)


def check_processor(name: str) -> None:
    """Raises NotThisProcessor where it lacks instructions of that set."""
    machine = platform.machine()
    if MACHINES.get(name, machine) != machine:
        raise NotThisProcessor(f"a set of {MACHINES[name]}, and this is {machine}")
    missing = _FLAGS[name] - _cpu_flags()
    if missing:
        raise NotThisProcessor(f"the processor lacks {', '.join(sorted(missing))}")


def open_library(name: str, file: Path) -> Kernels:
    """A library whose instructions the processor has. Raises Unavailable."""
    library = ctypes.CDLL(str(file))
    for part, structure in (("layer", Layer), ("decoder", Decoder), ("call", Call)):
        if getattr(library, f"onecopy_size_of_{part}")() != ctypes.sizeof(structure):
            raise Unavailable(f"{file.name} was compiled from other sources: build it again")
    error = library.onecopy_request_registers()
    if error:
        raise Unavailable(f"the kernel does not grant its registers: {os.strerror(error)}")
    for function_name, result, arguments in (
        ("create", c_void_p, [POINTER(Decoder)]),
        ("workspace_bytes", c_int64, [c_void_p]),
        ("hidden_stride", c_int64, [c_void_p]),
        ("forward", c_int32, [c_void_p, POINTER(Call)]),
        ("counted", None, [c_void_p, POINTER(c_uint64)]),
        ("destroy", None, [c_void_p]),
    ):
        function = getattr(library, f"onecopy_decoder_{function_name}")
        function.restype = result
        function.argtypes = arguments
    return Kernels(name, library)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """None where the kernel does not say them: the portable set needs none."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in cpuinfo.splitlines():
        if line.startswith(("flags", "Features")):  # of x86-64, of aarch64
            return frozenset(line.split())
    return frozenset()
