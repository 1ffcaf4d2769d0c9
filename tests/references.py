"""What transformers itself makes of the GGUF files that the tests use.

Its reader takes half a minute for a real file, so what several tests need is read once, by
whichever process of the tests comes first, and kept as transformers stores it.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig


def transformers_reads(gguf: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, its blocks dequantized."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model.eval()


def converted(gguf: Path, folder: Path) -> Path:
    """The model in fp32 and its tokenizer, as `save_pretrained` writes them to `folder`. Two
    processes may do so at once: the first to end is the one."""
    if not folder.exists():
        made = Path(tempfile.mkdtemp(prefix="converting-", dir=folder.parent))
        model = transformers_reads(gguf)
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:  # as it is there
            if not folder.exists():
                raise
            shutil.rmtree(made)
    return folder


def load(folder: Path, dtype: torch.dtype) -> Any:
    """What `converted` made."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()
