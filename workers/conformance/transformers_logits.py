"""What transformers would choose after each of the tokens that we chose, by its logits.

A program for an interpreter that has `transformers` and torch, and nothing of ours. Reads one JSON
object: `model`, a folder or a GGUF file; `is_file`; `dtype`; `prompts` and `new`, token ids. Writes
one: for each new token its choice, how far the logit of that is above ours, and what one unit of
the last place of bf16 is there. Exit status 3: transformers is not there.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        import torch  # noqa: F401 - which transformers can be there without
        import transformers
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    model = _load(request)
    pairs = zip(request["prompts"], request["new"], strict=True)
    found = [judged(model, prompt, new) for prompt, new in pairs]
    answer = {
        "version": f"transformers {transformers.__version__}",
        "choices": [choices for choices, _, _ in found],
        "gaps": [gaps for _, gaps, _ in found],
        "ulps": [ulps for _, _, ulps in found],
    }
    json.dump(answer, sys.stdout)
    return 0


def judged(
    model: Any, prompt: Sequence[int], new: Sequence[int]
) -> tuple[list[int], list[float], list[float]]:
    """Of each token of `new`, given all before it: the choice of a model of transformers, how far
    the logit of that is above the token's, and what one unit of the last place of bf16 is there."""
    import torch

    inputs = torch.tensor([[*prompt, *new]])
    with torch.inference_mode():
        logits = model(inputs).logits[0, len(prompt) - 1 : -1].float()
    best = logits.max(dim=-1)
    chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
    gaps: list[float] = (best.values - chosen).tolist()
    # Of two that are the same the first is the best; the token may be the other.
    choices = [
        ours if gap == 0 else theirs
        for ours, theirs, gap in zip(new, best.indices.tolist(), gaps, strict=True)
    ]
    return choices, gaps, [_ulp(value) for value in best.values.tolist()]


def _ulp(value: float) -> float:
    """Of the last place of bf16, which has 8 bits of precision."""
    return 2.0 ** (math.frexp(value)[1] - 8) if value else 2.0**-133


def _load(request: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path, options = Path(request["model"]), {}
    if request["is_file"]:
        from transformers.utils.quantization_config import GgufConfig

        options = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        path = path.parent
    else:
        config = AutoConfig.from_pretrained(path)
        if getattr(config, "attn_logit_softcapping", None):  # which its other attentions leave out
            options["attn_implementation"] = "eager"
    dtype = getattr(torch, request["dtype"])
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


if __name__ == "__main__":
    sys.exit(main())
