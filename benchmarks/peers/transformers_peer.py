"""transformers' `generate`, driven through pipes; see `_peers.py` for the protocol.

Run by its Python: `python transformers_peer.py HF_FOLDER NUM_THREADS`. Eager mode, bfloat16,
the default attention (sdpa); prompts that come together, of equal length, are one static batch.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

folder, num_threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(num_threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0


class Report(StoppingCriteria):
    """Tells of each step; never stops."""

    def __call__(self, input_ids, scores, **_):  # type: ignore[no-untyped-def]
        """One token a row was chosen."""
        sys.stdout.write("".join(f"{row} 1\n" for row in range(len(input_ids))))
        sys.stdout.flush()
        return torch.zeros(len(input_ids), dtype=torch.bool)


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    ids = torch.tensor(request["prompts"])
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["max_tokens"],
            do_sample=False,
            stopping_criteria=[Report()],
        )
    print("end", flush=True)
