"""Peers that compute a model whose weights stay on disk, driven through pipes; see `_peers.py`.

Run by their Python: `python offload_peer.py KIND HF_FOLDER WORK_FOLDER NUM_THREADS [BYTES]`. KIND:

    disk_offload    accelerate's: all weights as files of numpy's in WORK_FOLDER, layer by layer
    device_map      accelerate's: BYTES of the weights in memory, the others as above
    airllm          AirLLM: all layers as files of safetensors, the next read while one computes

With `prepare` behind the kind (`disk_offload-prepare`) only the files are written. Eager mode,
bfloat16, the default attention (sdpa), on the processor.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria

kind, folder, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
kind, _, only = kind.partition("-")
torch.set_num_threads(int(sys.argv[4]))
shards = work / kind


def accelerated():  # type: ignore[no-untyped-def]
    """The model, with accelerate's hooks."""
    from accelerate import disk_offload, init_empty_weights
    from accelerate.utils import offload_state_dict
    from safetensors.torch import load_file

    config = AutoConfig.from_pretrained(folder)
    if kind == "device_map":
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": int(sys.argv[5])},
            offload_folder=shards,
        )
    if not (shards / "index.json").exists():
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        offload_state_dict(shards, tensors)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return disk_offload(model.eval(), shards, execution_device=torch.device("cpu"))


def airllm():  # type: ignore[no-untyped-def]
    """AirLLM's model, which has transformers' own within."""
    from airllm import AutoModel

    sys.stdout, out = sys.stderr, sys.stdout  # it tells what it does
    try:
        return AutoModel.from_pretrained(
            folder, device="cpu", layer_shards_saving_path=str(shards), prefetching=True
        )
    finally:
        sys.stdout = out


class Report(StoppingCriteria):
    """Tells of each step; never stops."""

    def __call__(self, input_ids, scores, **_):  # type: ignore[no-untyped-def]
        """One token a row was chosen."""
        sys.__stdout__.write("".join(f"{row} 1\n" for row in range(len(input_ids))))
        sys.__stdout__.flush()
        return torch.zeros(len(input_ids), dtype=torch.bool)


work.mkdir(parents=True, exist_ok=True)
model = airllm() if kind == "airllm" else accelerated()
print(json.dumps({"ready": True}), flush=True)
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0
for line in () if only else sys.stdin:
    request = json.loads(line)
    ids = torch.tensor(request["prompts"])
    with torch.inference_mode():
        sys.stdout = sys.stderr
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["max_tokens"],
            do_sample=False,
            stopping_criteria=[Report()],
        )
        sys.stdout = sys.__stdout__
    print("end", flush=True)
