"""What keys and values may be kept as, of which model: said before weights are read."""

from pathlib import Path

import pytest
import torch

from tests.workers.tiny_models import write_checkpoint
from workers.checkpoint import open_checkpoint
from workers.errors import InvalidSetting
from workers.placement.kept import check_kept
from workers.settings import checked


def check(folder: Path, name: str, dtype: str = "auto") -> None:
    settings = checked({"kv_cache_dtype": name, "dtype": dtype})
    check_kept(open_checkpoint(folder, dtype), settings)


def test_what_the_kernels_compute_may_be_quantized(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama", torch.bfloat16)
    for name in ("auto", "bf16", "int8", "int4"):
        check(folder, name)


def test_others_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "fp32", "llama", torch.float32)
    check(folder, "auto")
    check(folder, "int8", "bfloat16")
    with pytest.raises(InvalidSetting, match=r"int4, .* transformers, .*float32.*: leave it out"):
        check(folder, "int4")
    with pytest.raises(InvalidSetting, match=r"bf16, .* computes in float32: .* --dtype bfloat16"):
        check(folder, "bf16")
    wide = write_checkpoint(tmp_path / "wide", "llama", torch.bfloat16, head_dim=288)
    check(wide, "bf16")
    with pytest.raises(InvalidSetting, match=r"int8, .* transformers, .*\(4 heads of 288"):
        check(wide, "int8")
