"""The demo model in the forms that other engines read: the same weights, cast once.

    python benchmarks/peers/write_models.py FOLDER

writes FOLDER/hf (a Hugging Face folder, bfloat16), FOLDER/bf16.gguf and FOLDER/f16.gguf (vectors
in float32, as llama.cpp's own converter leaves them). 0.8 GB; what is there already is kept. The
demo model is distributed in Q4_1, which onecopy, too, casts to bfloat16 when it loads it.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from safetensors.torch import save_file

from server.model_source import DEMO, find_model
from server.tokenizer_files import tokenizer_folder
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
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    source = find_model(DEMO).path
    _once(folder / "hf", lambda path: _write_folder(source, path))
    for name in _KINDS:
        _once(folder / f"{name}.gguf", functools.partial(_write_gguf, source, name=name))
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


def _write_gguf(source: Path, target: Path, name: str) -> None:
    file_type, kind = _KINDS[name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in _WRITTEN_ANEW:
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(
                field.name,
                field.contents(),
                field.types[0],
                sub_type=field.types[-1] if is_array else None,
            )
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
