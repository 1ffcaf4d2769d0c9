"""The demo model in the forms that other engines read: the same weights, cast once.

    python benchmarks/peers/write_models.py FOLDER
    python benchmarks/peers/write_models.py FOLDER --llama 8,2048,5632,32,4
    python benchmarks/peers/write_models.py FOLDER --qwen3-moe 4

The second makes a Llama with random weights instead, of so many layers, numbers of a hidden state
and of the MLP, heads and key heads; the third so many layers of Qwen3-30B-A3B, and no GGUF. It
writes FOLDER/hf (a Hugging Face folder, bfloat16), FOLDER/bf16.gguf and FOLDER/f16.gguf (vectors
in float32, as llama.cpp's own converter leaves them). 0.8 GB; what is there already is kept. The
demo model is distributed in Q4_1, which onecopy, too, casts to bfloat16 when it loads it.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))
from _checkpoints import LlamaSize, random_llama, random_qwen3_moe

from server.models.source import DEMO, find_model
from server.text.tokenizer_files import tokenizer_folder
from workers.checkpoint import open_checkpoint

_KINDS = {
    "bf16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    "f16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
}
_WRITTEN_ANEW = ("general.architecture", "general.file_type", "general.quantization_version")


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", help="LAYERS,HIDDEN,INNER,HEADS,KEY_HEADS")
    parser.add_argument("--qwen3-moe", type=int, metavar="LAYERS")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    source = find_model(DEMO).path
    if arguments.qwen3_moe:
        _once(folder / "hf", lambda path: random_qwen3_moe(path, arguments.qwen3_moe))
        return
    if arguments.llama:
        size = LlamaSize(*(int(one) for one in arguments.llama.split(",")))
        _once(folder / "hf", lambda path: random_llama(path, size))
        write = functools.partial(_write_llama_gguf, source, folder / "hf", size)
    else:
        _once(folder / "hf", lambda path: _write_folder(source, path))
        write = functools.partial(_write_demo_gguf, source)
    for name in _KINDS:
        _once(folder / f"{name}.gguf", functools.partial(write, name=name))
    print(f"{folder} is complete", file=sys.stderr)


def _once(path: Path, write: Callable[[Path], None]) -> None:
    """Unless it is there; under another name until it is whole."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    if part.is_dir():
        shutil.rmtree(part)
    write(part)
    part.rename(path)


def _write_folder(source: Path, folder: Path) -> None:
    checkpoint = open_checkpoint(source, "bfloat16")
    tensors = {}
    for tensor in checkpoint.tensors():
        tensors[tensor.name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        checkpoint.copy_into(tensor.name, tensors[tensor.name], lambda _: None)
    shutil.copytree(tokenizer_folder(source), folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(checkpoint.metadata()["config"])
    config |= {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_demo_gguf(source: Path, target: Path, name: str) -> None:
    tensors = (
        (tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(source).tensors
    )
    _write_gguf(source, target, name, {}, tensors)


def _write_llama_gguf(source: Path, folder: Path, size: LlamaSize, target: Path, name: str) -> None:
    """The tokenizer is the demo's. Rows of queries and keys stay in transformers' order, which
    llama.cpp takes for another: random ones are as good."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, size.num_layers)

    def tensors() -> Iterator[tuple[str, Any]]:
        with safe_open(folder / "model.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                to = names.get_name(key, try_suffixes=(".weight",))
                assert to is not None
                yield to, file.get_tensor(key).float().numpy()

    head_dim = size.hidden // size.num_heads
    changes = {
        "llama.block_count": size.num_layers,
        "llama.embedding_length": size.hidden,
        "llama.feed_forward_length": size.inner,
        "llama.attention.head_count": size.num_heads,
        "llama.attention.head_count_kv": size.num_kv_heads,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": 10000.0,
        "general.name": "random",
    }
    _write_gguf(source, target, name, changes, tensors())


def _write_gguf(
    source: Path,
    target: Path,
    name: str,
    changes: dict[str, Any],
    tensors: Iterable[tuple[str, Any]],
) -> None:
    """The fields of `source`, but for `changes`, and the tensors."""
    file_type, kind = _KINDS[name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in _WRITTEN_ANEW:
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(
                field.name,
                changes.get(field.name, field.contents()),
                field.types[0],
                sub_type=field.types[-1] if is_array else None,
            )
    writer.add_file_type(file_type)
    for tensor_name, values in tensors:
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim > 1:
            writer.add_tensor(tensor_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
