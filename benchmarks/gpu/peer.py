"""transformers on the same device: what it generates, how fast, and what it thinks of our tokens.

A program driven by lines of JSON: `python peer.py FOLDER DEVICE`, then
{"generate": [[ids], ...], "max_tokens": n} → {"seconds": s, "token_ids": [[ids], ...]}
{"judge": [[prompt ids], [new ids]]} → {"ulps": the most that a token is below transformers' own
choice, in units of bfloat16's last place, given all tokens before it, "equal": how many first
tokens are its own choice}
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Answer until standard input ends."""
    folder, device = sys.argv[1:3]
    device = "cpu" if device == "host" else device
    # As here: with torch's own choice on Hopper each token would take some 30 ms longer.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    answer({"ready": True, "reserved_bytes": reserved(device)})
    for line in sys.stdin:
        request = json.loads(line)
        with torch.inference_mode():
            if "generate" in request:
                answer(generate(model, device, request["generate"], request["max_tokens"]))
            else:
                answer(judge(model, device, *request["judge"]))


def answer(value: dict[str, Any]) -> None:
    """One line."""
    print(json.dumps(value), flush=True)


def reserved(device: str) -> int:
    """What torch has taken of the device."""
    return torch.cuda.memory_reserved() if device != "cpu" else 0


def generate(model: Any, device: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy, prompts of equal length as one static batch."""
    ids = torch.tensor(prompts, device=device)
    started = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    token_ids = output[:, ids.shape[1] :].tolist()
    return {"seconds": time.perf_counter() - started, "token_ids": token_ids}


def judge(model: Any, device: str, prompt: list[int], new: list[int]) -> dict[str, Any]:
    """As workers/conformance/ties.py does."""
    ids = torch.tensor([[*prompt, *new]], device=device)
    logits = model(ids, logits_to_keep=len(new) + 1).logits[0, :-1].float()
    best = logits.max(dim=-1)
    chosen = logits.gather(1, torch.tensor(new, device=device)[:, None])[:, 0]
    ulp = 2.0 ** (best.values.abs().log2().floor() - 7)
    below = (best.values - chosen) / ulp
    same = (below == 0).tolist()
    equal = same.index(False) if False in same else len(new)
    return {"ulps": float(below.max()), "equal": equal}


if __name__ == "__main__":
    main()
