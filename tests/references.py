"""What transformers itself makes of the GGUF files that the tests use.

Its reader takes half a minute for a real file: here it is spared what it does again and again, and
what several tests need is read once, by whichever process of the tests comes first, and kept as
transformers stores it.
"""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from workers.conformance.transformers_logits import judged


@contextlib.contextmanager
def _quick_reader() -> Iterator[None]:
    """A slice of a `memmap` costs ten times one of an array, and each word of a vocabulary is one;
    the table of names is made anew for every module."""
    memmap, name_map = np.memmap, functools.cache(gguf.get_tensor_name_map)

    def array(*arguments: Any, **options: Any) -> np.ndarray:
        return memmap(*arguments, **options).view(np.ndarray)

    with (
        mock.patch.object(np, "memmap", array),
        mock.patch.object(gguf, "get_tensor_name_map", name_map),
    ):
        yield


def transformers_reads(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, its blocks dequantized."""
    with _quick_reader():
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
        )
    return model.eval()


def converted(file: Path, folder: Path) -> Path:
    """The model in fp32 and its tokenizer, as `save_pretrained` writes them to `folder`. Two
    processes may do so at once: the first to end is the one."""
    if not folder.exists():
        made = Path(tempfile.mkdtemp(prefix="converting-", dir=folder.parent))
        transformers_reads(file).save_pretrained(made)
        with _quick_reader():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(made)
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


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """By name; tied ones by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def ulps_below_the_best(model: Any, prompt: Sequence[int], new: Sequence[int]) -> list[float]:
    """Of each token of `new`: by how many bf16 ulps the model, given all tokens before it, prefers
    its own choice. 0 for the same choice."""
    _, gaps, ulps = judged(model, prompt, new)
    return [gap / ulp for gap, ulp in zip(gaps, ulps, strict=True)]
