"""Modules to share, and what must be the same of them before and after, in every process.

Owns one builder for each kind of module, by name, so that any process can build it. Knows nothing
of sharing.
"""

import hashlib
import importlib.util
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LARGE_BYTES = 2 * 36 << 20
"""The parameters of "large" and "flat". Each is beyond what malloc ever keeps after a free."""
ALL_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None


class Large(nn.Module):
    """Two products with large weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(256, 36 << 10).normal_())
        self.down = nn.Parameter(torch.empty(36 << 10, 256).normal_())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.up) @ self.down


class Flat(Large):
    """The same out of one storage, of which a buffer has a part too, and another more than all."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.cat([self.up.detach().flatten(), self.down.detach().flatten(), torch.ones(8)])
        half = self.up.numel()
        self.up = nn.Parameter(flat[:half].view_as(self.up))
        self.down = nn.Parameter(flat[half : 2 * half].view_as(self.down))
        self.register_buffer("rest", flat[2 * half :])


class Odd(nn.Module):
    """Every way in which tensors may lie in memory that we could think of."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(6, 8)
        self.weight = nn.Parameter(weight)
        self.same = self.weight
        self.again = nn.Parameter(weight)
        self.transposed = nn.Parameter(weight.T)
        self.rows = nn.Parameter(weight[1:3])
        self.overlapping = nn.Parameter(weight[2:5, ::2])
        self.expanded = nn.Parameter(weight[4, 3].expand(3, 5))
        self.nothing = nn.Parameter(weight[:, 8:])
        self.void = nn.Parameter(torch.empty(0, 3, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(3.5, dtype=torch.float16))
        self.holes = nn.Parameter(torch.randn(5, 7, 3)[:, 2:4].transpose(0, 2))
        self.slice_of_huge = nn.Parameter(torch.randn(64 << 18)[1000:1010])
        self.register_parameter("absent", None)
        raw = torch.randint(0, 255, (64,), dtype=torch.uint8)
        self.bytes_at_1 = nn.Parameter(raw[1:9], requires_grad=False)
        self.floats_at_4 = nn.Parameter(raw[4:20].view(torch.float32), requires_grad=False)
        self.halves_at_18 = nn.Parameter(raw[18:22].view(torch.float16), requires_grad=False)
        self.dtypes = nn.ParameterDict(
            {
                str(dtype).replace(".", "_"): nn.Parameter(
                    torch.randn(4, 3).to(dtype).T, requires_grad=False
                )
                for dtype in ALL_DTYPES
            }
        )
        self.pair = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
        self.pair[1].weight = self.pair[0].weight
        self.shared_layer = nn.ModuleList([self.pair[0]])

        values = torch.randn(10)
        self.register_buffer("values", values)
        self.register_buffer("same_values", values, persistent=False)
        self.register_buffer("first_values", values[:4])
        self.register_buffer("beside", torch.cat([values, values])[10:])
        self.register_buffer("of_parameter", weight[3])
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("not_there", None)
        self.register_buffer("derived", self.weight * 2)  # with a graph behind it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.pair[1](self.pair[0](x)) @ self.transposed * self.scalar
        return product + self.same.sum() + self.beside.sum() + self.of_parameter.sum()


class Scattered(nn.Module):
    """Random views of a few storages, as parameters and buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choice = random.Random(seed)
        for index in range(choice.randint(1, 3)):
            raw = torch.randint(0, 255, (choice.randint(64, 600),), dtype=torch.uint8)
            for number in range(choice.randint(1, 8)):
                tensor = self._view(raw, choice)
                name = f"t{index}_{number}"
                if choice.random() < 0.6:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(name, tensor, persistent=choice.random() < 0.5)
                if choice.random() < 0.2:
                    setattr(self, f"{name}_again", getattr(self, name))

    @staticmethod
    def _view(raw: torch.Tensor, choice: random.Random) -> torch.Tensor:
        dtype = choice.choice([torch.uint8, torch.int16, torch.bfloat16, torch.int32, torch.int64])
        typed = raw[: raw.numel() // 8 * 8].view(dtype)
        shape, stride = [], []
        offset = choice.randrange(typed.numel())
        left = typed.numel() - 1 - offset
        for _ in range(choice.randint(0, 3)):
            stride.append(choice.choice([0, 1, 2, 3, 5]))
            most = left // stride[-1] if stride[-1] else 3
            shape.append(choice.randint(1, min(6, most + 1)) if choice.random() > 0.05 else 0)
            left -= max(shape[-1] - 1, 0) * stride[-1]
        return typed.as_strided(shape, stride, offset)


class Normed(nn.Module):
    """A module whose buffers change as it is used for training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Two(nn.Module):
    """Two layers, in one of the ways to be tied that are asked for."""

    def __init__(self, tied: str, dtype: torch.dtype = torch.float32, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, dtype=dtype)
        self.second = nn.Linear(8, width, dtype=dtype)
        if tied == "weight":
            self.second.weight = self.first.weight
        elif tied == "layer":
            self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.to(self.first.weight.dtype)))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    model: nn.Module = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model.eval()


def _autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    model: nn.Module = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    return model.eval()


@dataclass(frozen=True)
class Kind:
    """How to build a module, and what goes in and comes out."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], torch.Tensor]


def _rows(module: nn.Module) -> torch.Tensor:
    return module(torch.randn(3, 8))


def _image(module: nn.Module) -> torch.Tensor:
    return module(torch.randn(2, 3, 8, 8))


KINDS = {
    "large": Kind(Large, lambda module: module(torch.randn(2, 256))),
    "flat": Kind(Flat, lambda module: module(torch.randn(2, 256))),
    "odd": Kind(Odd, lambda module: module(torch.randn(3, 8))),
    "normed": Kind(Normed, _image),
    "untied": Kind(lambda: Two(""), _rows),
    "tied": Kind(lambda: Two("weight"), _rows),
    "one layer": Kind(lambda: Two("layer"), _rows),
    "half": Kind(lambda: Two("", torch.bfloat16), _rows),
    "narrow": Kind(lambda: Two("", width=4), _rows),
    "linear": Kind(lambda: nn.Linear(8, 8), _rows),
    "lstm": Kind(lambda: nn.LSTM(8, 8, num_layers=2), lambda module: module(torch.randn(4, 8))[0]),
    "llama": Kind(_llama, lambda module: module(torch.arange(1, 13)[None]).logits),
    "t5": Kind(
        _t5,
        lambda module: (
            module(
                input_ids=torch.arange(1, 9)[None], decoder_input_ids=torch.arange(3, 8)[None]
            ).logits
        ),
    ),
    "unet": Kind(_unet, lambda module: module(torch.randn(1, 3, 16, 16), 7).sample),
    "autoencoder": Kind(_autoencoder, lambda module: module(torch.randn(1, 3, 16, 16)).sample),
    **{
        f"scattered {seed}": Kind(
            lambda seed=seed: Scattered(seed),
            lambda module: torch.zeros(0),
        )
        for seed in range(40)
    },
}


def build(kind: str, seed: int = 0, device: str = "cpu") -> nn.Module:
    """A module of this kind; its values depend on the seed alone, its structure on the kind."""
    torch.manual_seed(seed)
    with torch.device(device):
        return KINDS[kind].build()


def output(kind: str, module: nn.Module) -> str:
    """A digest of what the module makes of inputs that are always the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        return digest(KINDS[kind].run(module))


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's values, bit for bit."""
    values = tensor.detach().clone(memory_format=torch.contiguous_format)
    values = values.reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def described(module: nn.Module) -> dict[str, Any]:
    """All that sharing must keep: values and form of each tensor, which bytes are one and the same,
    and which names one object has. As JSON would have it."""
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    overlaps, objects = [], []
    for (a, one), (b, other) in itertools.combinations(tensors.items(), 2):
        if one is other:
            objects.append([a, b])
        distance = other.data_ptr() - one.data_ptr()
        if one.numel() and other.numel() and -_reach(other) < distance < _reach(one):
            overlaps.append([a, b, distance])
    return {
        "tensors": {
            name: [
                "buffer" if name in buffers else "parameter",
                *(str(t.dtype), list(t.shape), list(t.stride())),
                "meta" if t.is_meta else digest(t),
            ]
            for name, t in tensors.items()
        },
        "overlaps": overlaps,
        "objects": objects,
        "state": list(module.state_dict()),
    }


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize
