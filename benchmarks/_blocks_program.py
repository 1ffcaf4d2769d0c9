"""Our side of `offloading/blocks.py`: as peers/blocks_peer.py, whose pipes it has.

`python -P _blocks_program.py FOLDER NUM_BLOCKS WIDTH NUM_OUTPUTS PASSES DEPTH`
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from offloading.overlap import Size

from workers.placement.blocks import offload

folder = Path(sys.argv[1])
num_blocks, width, num_outputs, passes, depth = (int(one) for one in sys.argv[2:7])
torch.set_num_threads(1)
size = Size(num_blocks, width, passes)
blocks = size.blocks()
rows = size.rows()
with torch.inference_mode(), offload(blocks, depth=depth, directory=folder):
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        for block in blocks:
            block(rows, num_outputs)
        begun = time.perf_counter()
        for _ in range(passes):
            for block in blocks:
                block(rows, num_outputs)
        print(time.perf_counter() - begun, flush=True)
