"""When a greedy token is that of a reference: it is its choice, or a tie with it.

Sums of the same numbers in another order differ by rounding, and where the two best tokens are that
near to each other, either may come first. Owns how near that is. Pure.
"""

from collections.abc import Mapping
from typing import Final

BF16_TIE_ULPS: Final = 4
"""Two logits nearer than that, in units of the last place of bf16, are a tie in bf16: each is
rounded to bf16 itself, after a sum of products that were rounded to bf16 in every layer."""
TIE_ULPS: Final[Mapping[str, float]] = {
    "float32": BF16_TIE_ULPS / 256,
    "float16": BF16_TIE_ULPS / 8,
    "bfloat16": BF16_TIE_ULPS,
}
"""The same by the dtype that is computed in: fp16 has three bits of precision more, fp32 sixteen,
of which the sums of a deep model take half."""
ROUNDED_TIE_GAP: Final = 1.0
"""The same in logits, where a reference rounds activations to 8 bits for each product, as llama.cpp
does with quantized weights."""
