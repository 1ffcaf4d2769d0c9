"""diffusers' group offloading of the blocks that `offloading/overlap.py` has, through pipes.

Run by its Python: `python blocks_peer.py WORK_FOLDER NUM_BLOCKS WIDTH NUM_OUTPUTS PASSES STREAM`.
The weights go to files in WORK_FOLDER. With STREAM 1 the next block is read on a stream of its own,
which diffusers has on accelerators only: that it says. A line in is a measurement; out comes one
with the seconds that PASSES passes took, behind one that is not counted.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from diffusers.hooks import apply_group_offloading

folder = Path(sys.argv[1])
num_blocks, width, num_outputs, passes, stream = (int(one) for one in sys.argv[2:7])
torch.set_num_threads(1)


class Matrix(torch.nn.Module):
    """Of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Computes so many outputs; hands the rows on, as diffusers has it."""
        for begin in range(0, num_outputs, width):
            torch.nn.functional.linear(rows, self.weight[: num_outputs - begin])
        return rows


class Blocks(torch.nn.Module):
    """All of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Matrix() for _ in range(num_blocks))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """In order."""
        for block in self.blocks:
            rows = block(rows)
        return rows


model = Blocks()
apply_group_offloading(
    model,
    onload_device=torch.device("cpu"),
    offload_device=torch.device("cpu"),
    offload_type="block_level",
    num_blocks_per_group=1,
    use_stream=bool(stream),
    offload_to_disk_path=str(folder),
)
for file in folder.rglob("*.safetensors"):
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
print(json.dumps({"ready": True}), flush=True)
rows = torch.randn(16, width)
for _ in sys.stdin:
    with torch.inference_mode():
        model(rows)
        begun = time.perf_counter()
        for _ in range(passes):
            model(rows)
    print(time.perf_counter() - begun, flush=True)
