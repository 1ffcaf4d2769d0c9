"""Checkpoints on disk, well-formed and not, written byte by byte.

Knows the formats independently of the code under test; real libraries check it in the tests.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "llama", "dtype": "float32"}
WIDTHS = {"F32": 4, "BF16": 2, "U8": 1}


def folder(path: Path, **config: Any) -> Path:
    """A model folder that holds only config.json; a value of None leaves the field out."""
    path.mkdir(exist_ok=True)
    merged = {k: v for k, v in {**CONFIG, **config}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(merged))
    return path


def assemble(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file with exactly this header (an object, or raw bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sound() -> bytes:
    """Two tensors, 24 and 8 bytes."""
    header = {"a": entry([2, 3], 0, 24), "b": entry([2], 24, 32), "__metadata__": {"format": "pt"}}
    return assemble(header, np.arange(8, dtype=np.float32).tobytes())


def damaged() -> dict[str, bytes]:
    """What is wrong → the file."""
    good = sound()
    header_bytes = int.from_bytes(good[:8], "little")
    data = bytes(32)
    truncated = {
        f"truncated to {n} bytes": good[:n]
        for n in (0, 1, 7, 8, 9, 8 + header_bytes // 2, 8 + header_bytes - 1, 8 + header_bytes)
    }
    headers: dict[str, Any] = {
        "offsets overlap": {"a": entry([2, 3], 0, 24), "b": entry([4], 16, 32)},
        "offsets are the same": {"a": entry([8], 0, 32), "b": entry([8], 0, 32)},
        "a gap": {"a": entry([4], 0, 16), "b": entry([3], 20, 32)},
        "a gap at the start": {"a": entry([7], 4, 32)},
        "offsets beyond the file": {"a": entry([16], 0, 64)},
        "offsets backwards": {"a": entry([8], 32, 0)},
        "negative offsets": {"a": entry([8], -32, 0)},
        "offsets of 2**70": {"a": entry([8], 1 << 70, (1 << 70) + 32)},
        "one offset": {"a": {**entry([8], 0, 32), "data_offsets": [32]}},
        "offsets that are text": {"a": {**entry([8], 0, 32), "data_offsets": ["0", "32"]}},
        "a size that does not fit": {"a": entry([9], 0, 32)},
        "a negative size": {"a": entry([-8], 0, 32)},
        "two negative sizes": {"a": entry([-2, -4], 0, 32)},
        "a fractional size": {"a": {**entry([8], 0, 32), "shape": [8.5]}},
        "no element, but 2**70 of them": {
            "a": entry([0, 1 << 70], 0, 0),
            "b": entry([8], 0, 32),
        },
        "no element, sizes overflow": {
            "a": entry([1 << 40, 1 << 40, 0], 0, 0),
            "b": entry([8], 0, 32),
        },
        "a thousand dimensions": {"a": entry([1 << 60] * 1000, 0, 32)},
        "an entry that is no object": {"a": [1, 2]},
        "no dtype": {"a": {"shape": [8], "data_offsets": [0, 32]}},
        "a dtype that is a number": {"a": {**entry([8], 0, 32), "dtype": 7}},
        "a header that is an array": [1, 2],
        "a header that is a number": 7,
        "a header that is no JSON": b'{"a": ',
        "a header that is no text": b'{"\xff\xfe": 1}',
        "a header nested deeply": b'{"a":' + b"[" * 100_000,
        "no header": b"",
        "no tensors": {},
    }
    lengths = {
        f"a header of {length} bytes": assemble({"a": entry([8], 0, 32)}, data, length)
        for length in (0, 1, 1 << 20, 100_000_001, (1 << 63) - 1, (1 << 64) - 1)
    }
    extra = {"something behind it": good + b"\0", "a byte short": good[:-1]}
    assembled = {name: assemble(header, data) for name, header in headers.items()}
    assembled["no tensors"] = assemble({})
    return {**truncated, **lengths, **extra, **assembled}


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    """Each dtype, and the shapes that are easily forgotten."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "f64": normal(3, 5).double(),
        "f32": normal(7, 11),
        "f16": normal(13).half(),
        "bf16": normal(5, 3, 2).bfloat16(),
        "f8_e4m3": normal(33).to(torch.float8_e4m3fn),
        "f8_e5m2": normal(9, 2).to(torch.float8_e5m2),
        "i64": torch.arange(-5, 5),
        "i32": torch.arange(6, dtype=torch.int32).view(2, 3),
        "i16": torch.arange(5, dtype=torch.int16),
        "i8": torch.arange(-3, 3, dtype=torch.int8),
        "u8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([[True, False, True]]),
        "scalar": torch.tensor(2.5),
        "scalar_int": torch.tensor(-7),
        "empty": torch.empty(0),
        "empty_2d": torch.empty(4, 0, 3, dtype=torch.bfloat16),
        "one": normal(1, 1, 1),
    }


def folder_of_every_kind(path: Path) -> Path:
    """A model folder with those tensors in one file, whose configuration names no dtype."""
    folder(path, dtype=None)
    save_file(tensors_of_every_kind(), path / "model.safetensors")
    return path


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    architecture: str = "llama",
    num_kv_heads: int = 1,
    matrices: gguf.GGMLQuantizationType | None = None,
    said: Mapping[str, int | float | str] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A Llama of one layer with F32, F16 and Q8_0 blocks and a tokenizer of 100 words. `matrices`
    is the type of all its matrices, `said` further metadata, `tensors` further tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(100)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{n}" for n in range(100)])
    writer.add_token_scores([0.0] * 100)
    writer.add_token_types([1] * 100)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(seed)
    kinds = gguf.GGMLQuantizationType
    for name, shape, kind in [
        ("token_embd", (100, 32), kinds.Q8_0),
        ("output_norm", (32,), kinds.F32),
        ("blk.0.attn_q", (32, 32), kinds.Q8_0),
        ("blk.0.attn_k", (16, 32), kinds.F32),
        ("blk.0.attn_v", (16, 32), kinds.F16),
        ("blk.0.attn_output", (32, 32), kinds.F32),
        ("blk.0.ffn_gate", (64, 32), kinds.Q8_0),
        ("blk.0.ffn_up", (64, 32), kinds.F16),
        ("blk.0.ffn_down", (32, 64), kinds.F32),
        ("blk.0.attn_norm", (32,), kinds.F32),
        ("blk.0.ffn_norm", (32,), kinds.F32),
    ]:
        values = generator.standard_normal(shape).astype(np.float32)
        kind = matrices if matrices is not None and len(shape) > 1 else kind
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name, value in (said or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](name, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous().view(-1).view(torch.uint8).tolist()
        == other.contiguous().view(-1).view(torch.uint8).tolist()
    )
