"""A model computed in stretches, with weights that come and go, answers as it does in one piece."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.workers.model.tiny_families import FAMILIES, save, tiny_model
from tests.workers.tiny_models import prompt
from workers.checkpoint import open_checkpoint
from workers.conformance.greedy import read_whole
from workers.kv.source import PrivateSource
from workers.kv.table import BlockTable
from workers.model.batch import Batch, Part
from workers.model.decoder import Model, build_model
from workers.model.stretch import Decoder, LayerWeights, Placement, Stretch
from workers.placement.resident import Resident

NATIVE = ["llama", "qwen3", "gemma3", "gpt_neox", "mixtral", "phi"]


class OneSlot:
    """Stretches of `length` layers, whose weights are copied to places that all of them share
    before one is computed, and overwritten after it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], length: int) -> None:
        self.tensors = tensors
        self.device = torch.device("cpu")
        self._length = length
        self._stretches: list[tuple[Stretch, Sequence[LayerWeights], Sequence[LayerWeights]]] = []

    def use(self, decoder: Decoder) -> None:
        layers = decoder.layers
        slots: dict[object, torch.Tensor] = {}
        self._stretches = []
        for first in range(0, len(layers), self._length):
            kept = layers[first : first + self._length]
            placed = [
                {
                    name: slots.setdefault((place, name, one.shape), torch.empty_like(one))
                    for name, one in layer.items()
                }
                for place, layer in enumerate(kept)
            ]
            self._stretches.append((decoder.stretch(first, placed), kept, placed))

    def stretches(self) -> Iterator[Stretch]:
        for stretch, kept, placed in self._stretches:
            _copy(kept, placed)
            yield stretch
            for layer in placed:
                for tensor in layer.values():
                    tensor.fill_(float("nan"))


def _copy(kept: Sequence[LayerWeights], placed: Sequence[LayerWeights]) -> None:
    for layer, place in zip(kept, placed, strict=True):
        for name, tensor in layer.items():
            place[name].copy_(tensor)


def _logits(model: Model) -> list[torch.Tensor]:
    """Of two sequences together, then of one more token of each."""
    layout = model.geometry.kv_layout
    source = PrivateSource(layout)
    tables = [BlockTable(layout, source.lease(4)) for _ in range(2)]
    beginnings = [prompt(21, seed=1), prompt(6, seed=2)]
    batches = [
        [Part(table, tokens, 2) for table, tokens in zip(tables, beginnings, strict=True)],
        [Part(tables[0], [7], 1), Part(tables[1], [9], 0)],
        [Part(tables[1], [11], 0)],
        [Part(table, [5], 1) for table in tables],
    ]
    return [model.forward(Batch.of(parts)) for parts in batches]


Placed = Callable[[Mapping[str, torch.Tensor]], Placement]


def _models(family: str, tmp_path: Path, dtype: torch.dtype) -> Callable[[Placed], Model]:
    """The model with its weights placed in some way."""
    checkpoint = open_checkpoint(save(tiny_model(family).to(dtype), tmp_path))
    tensors = read_whole(checkpoint)
    config = json.loads(checkpoint.metadata()["config"])

    return lambda placed: build_model(config, placed(tensors), dtype)


def _in_slots(length: int) -> Placed:
    return lambda tensors: OneSlot(tensors, length)


@pytest.mark.parametrize("family", sorted({*FAMILIES, "gemma3", "llama"}))
def test_modules_compute_the_same_bits_in_stretches(family: str, tmp_path: Path) -> None:
    models = _models(family, tmp_path, torch.float32)
    whole = _logits(models(Resident))
    for length in (1, 2):
        for got, expected in zip(_logits(models(_in_slots(length))), whole, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("family", NATIVE)
def test_kernels_compute_the_same_bits_in_stretches(family: str, tmp_path: Path) -> None:
    models = _models(family, tmp_path, torch.bfloat16)
    results = []
    for placed in (Resident, _in_slots(1), _in_slots(2)):
        model = models(placed)
        assert model.accelerate(64, 128, 2) is None
        results.append(_logits(model))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


def test_weights_of_another_layer_are_refused(tmp_path: Path) -> None:
    class Asks(Resident):
        def use(self, decoder: Decoder) -> None:
            layers = decoder.layers
            with pytest.raises(ValueError, match="layers from 2 on of 3"):
                decoder.stretch(2, layers[1:])
            with pytest.raises(ValueError, match="a layer's weights, but for"):
                decoder.stretch(0, [{}])
            shorter = {name: one[:1] for name, one in layers[0].items()}
            with pytest.raises(ValueError, match=" is "):
                decoder.stretch(0, [shorter])
            asked.append(decoder)
            super().use(decoder)

    asked: list[Decoder] = []
    model = _models("mixtral", tmp_path, torch.bfloat16)(Asks)
    assert model.accelerate(8, 128, 1) is None
    assert len(asked) == 2
