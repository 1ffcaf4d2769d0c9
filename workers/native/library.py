"""The compiled kernels: where they are, whether this machine runs them, and their C structures.

Owns the one handle of the library. Invariant: it is loaded only on a processor that has every
instruction it was compiled for, and after the kernel has granted the AMX registers. The structures
are those of decoder.cpp and linear.h, and their sizes are compared. Knows no model.

Rebuild after a change: `python -c "import setuptools; setuptools.setup()" build_ext --inplace`.
"""

import ctypes
import functools
import os
import sysconfig
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, ClassVar, Final

_FILE: Final = Path(__file__).with_name(f"_decoder{sysconfig.get_config_var('EXT_SUFFIX')}")
_FLAGS: Final = frozenset(
    {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    | {"avx512_bf16", "avx512vbmi", "avx512_vnni", "avx512_fp16", "avx2", "fma", "bmi1", "bmi2"}
)

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


class Matrix(ctypes.Structure):
    """Row-major bf16 [num_rows, width of the linear]."""

    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p), ("num_rows", c_int64)]


class Linear(ctypes.Structure):
    """Up to three matrices of one input."""

    _fields_: ClassVar = [
        ("matrices", Matrix * 3),
        ("num_matrices", c_int32),
        ("width", c_int32),
        ("num_outputs", c_int32),
    ]


class Norm(ctypes.Structure):
    """A null weight: no norm."""

    _fields_: ClassVar = [("weight", c_void_p), ("eps", c_float), ("plus_one", c_int32)]


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
        ("layer_offset", c_int64),
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
    ]


class Decoder(ctypes.Structure):
    """DecoderSpec."""

    _fields_: ClassVar = [
        ("layers", POINTER(Layer)),
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("activation", c_int32),
        ("embedding", c_void_p),
        ("embedding_scale", c_float),
        ("final_norm", Norm),
        ("head", Linear),
        ("logit_softcap", c_float),
        ("rope_cos", c_void_p * 2),
        ("rope_sin", c_void_p * 2),
        ("rotary_dim", c_int32),
        ("max_rows", c_int32),
        ("max_model_len", c_int32),
        ("num_threads", c_int32),
    ]


class Call(ctypes.Structure):
    """Call."""

    _fields_: ClassVar = [
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("tables", c_void_p),
        ("addresses", c_void_p),
        ("logit_rows", c_void_p),
        ("logits", c_void_p),
        ("greedy", c_void_p),
        ("num_rows", c_int32),
        ("max_blocks", c_int32),
        ("num_logit_rows", c_int32),
        ("num_threads", c_int32),
    ]


@functools.cache
def load() -> Any:
    """The library. Raises Unavailable."""
    if not _FILE.exists():
        raise Unavailable("the native decoder was not compiled when onecopy was installed")
    missing = _FLAGS - _cpu_flags()
    if missing:
        raise Unavailable(f"the processor lacks {', '.join(sorted(missing))}")
    library = ctypes.CDLL(str(_FILE))
    for name, structure in (("layer", Layer), ("decoder", Decoder), ("call", Call)):
        if getattr(library, f"onecopy_size_of_{name}")() != ctypes.sizeof(structure):
            raise Unavailable(f"{_FILE.name} was compiled from other sources: build it again")
    error = library.onecopy_request_amx()
    if error:
        raise Unavailable(f"the kernel does not grant AMX: {os.strerror(error)}")
    for name, result, arguments in (
        ("create", c_void_p, [POINTER(Decoder)]),
        ("workspace_bytes", c_int64, [c_void_p]),
        ("forward", c_int32, [c_void_p, POINTER(Call)]),
        ("cycles", None, [c_void_p, POINTER(c_uint64)]),
        ("destroy", None, [c_void_p]),
    ):
        function = getattr(library, f"onecopy_decoder_{name}")
        function.restype = result
        function.argtypes = arguments
    return library


def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split())
    return frozenset()
