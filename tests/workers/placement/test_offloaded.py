"""A model whose layers are read from its files while it computes answers as one in memory does."""

import json
import mmap
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from allocator import DiskFull
from tests.workers.checkpoint.checkpoint_files import read_whole, write_gguf
from tests.workers.model.placed_models import NATIVE, logits_of, models_of
from tests.workers.model.tiny_families import FAMILIES, save, tiny_model
from workers.checkpoint import Checkpoint, open_checkpoint
from workers.checkpoint.converted import write_converted
from workers.checkpoint.offloaded import OffloadedLayers, decoded, find_layers
from workers.errors import CheckpointChanged, ReadFailed
from workers.model.decoder import Model, build_model
from workers.placement.layer_slots import LayerSlots, memory_bytes
from workers.placement.offloaded import Offloaded
from workers.placement.reader import Reader
from workers.placement.resident import Resident
from workers.placement.slots import slot_layout
from workers.skeleton.decoder import names_of_layers, skeleton


@dataclass
class Saved:
    """A tiny model in files."""

    folder: Path
    dtype: torch.dtype
    file: Path | None = None
    """In the folder, where it is no folder's model."""

    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.file or self.folder, str(self.dtype).removeprefix("torch."))

    def resident(self) -> Model:
        return build_model(self.config(), Resident(read_whole(self.checkpoint())), self.dtype)

    def offloaded(self, indices: list[int] | None = None) -> OffloadedLayers:
        """Those layers, or all, of the checkpoint."""
        checkpoint = self.checkpoint()
        names = names_of_layers(skeleton(self.config(), self.dtype))
        chosen = range(len(names)) if indices is None else indices
        found = find_layers(checkpoint, names, chosen, self.folder / "converted.layers")
        found = write_converted(checkpoint, found, lambda *_: None)
        return decoded({"offloaded": found.encoded()}) or found

    def config(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.checkpoint().metadata()["config"])
        return found

    @contextmanager
    def model(
        self, offloaded: OffloadedLayers, depth: int, reader: Reader | None = None
    ) -> Iterator[tuple[Model, LayerSlots]]:
        """With those layers read `depth` ahead."""
        tensors = read_whole(self.checkpoint())
        staying = {name: one for name, one in tensors.items() if name not in offloaded.names}
        layouts = [slot_layout(layer.tensors) for layer in offloaded.layers]
        with reader or Reader() as threads:
            for file in offloaded.files:
                threads.open(file.check())
            area = mmap.mmap(-1, memory_bytes(layouts, depth))
            slots = LayerSlots(layouts, depth, torch.frombuffer(area, dtype=torch.uint8), threads)
            placement = Offloaded(staying, offloaded, slots)
            yield build_model(self.config(), placement, self.dtype), slots


def saved(family: str, folder: Path, dtype: torch.dtype) -> Saved:
    save(tiny_model(family).to(dtype), folder)
    return Saved(folder, dtype)


@pytest.mark.parametrize("family", sorted({*FAMILIES, "gemma3", "llama"}))
def test_modules_compute_the_same_bits(family: str, tmp_path: Path) -> None:
    whole = logits_of(models_of(family, tmp_path, torch.float32)(Resident))
    files = Saved(tmp_path, torch.float32)
    with files.model(files.offloaded(), 1) as (model, _):
        for _ in range(2):  # passes follow one on another
            for got, expected in zip(logits_of(model), whole, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("family", NATIVE)
def test_kernels_compute_the_same_bits(family: str, tmp_path: Path) -> None:
    resident = models_of(family, tmp_path, torch.bfloat16)(Resident)
    assert resident.accelerate(64, 128, 2) is None
    whole = logits_of(resident)
    files = Saved(tmp_path, torch.bfloat16)
    num_layers = len(files.offloaded().layers)
    for indices, depth in (([*range(num_layers)], 1), ([*range(num_layers)], 9), ([1], 1)):
        with files.model(files.offloaded(indices), depth) as (model, _):
            assert model.accelerate(64, 128, 2) is None
            for _ in range(2):
                for got, expected in zip(logits_of(model), whole, strict=True):
                    assert torch.equal(got, expected)


def test_a_read_that_takes_its_time_changes_nothing(tmp_path: Path) -> None:
    whole = logits_of(models_of("llama", tmp_path, torch.float32)(Resident))
    files = Saved(tmp_path, torch.float32)
    for seed in range(3):
        with files.model(files.offloaded(), 1, Reader(delay=(seed, 0.005))) as (model, slots):
            for got, expected in zip(logits_of(model), whole, strict=True):
                assert torch.equal(got, expected)
            assert slots.waited_s > 0


class NeverWaits(Reader):
    """What a forgotten wait would do."""

    def wait(self, job: int, timeout_s: float | None = None) -> None:
        pass


def test_without_the_wait_it_would_be_another_answer(tmp_path: Path) -> None:
    whole = logits_of(models_of("llama", tmp_path, torch.float32)(Resident))
    files = Saved(tmp_path, torch.float32)
    with files.model(files.offloaded(), 1, NeverWaits(delay=(1, 0.2))) as (model, _):
        pairs = zip(logits_of(model), whole, strict=True)
        assert not all(torch.equal(got, expected) for got, expected in pairs)


def test_a_pass_that_failed_leaves_the_next_one_right(tmp_path: Path) -> None:
    whole = logits_of(models_of("llama", tmp_path, torch.float32)(Resident))
    files = Saved(tmp_path, torch.float32)
    with files.model(files.offloaded(), 1) as (model, _):
        layer = next(part for part in model.module.modules() if type(part).__name__.endswith("MLP"))
        hook = layer.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            logits_of(model)
        hook.remove()
        for got, expected in zip(logits_of(model), whole, strict=True):
            assert torch.equal(got, expected)


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_a_file_that_ends_early_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    whole = logits_of(models_of("llama", tmp_path, torch.float32)(Resident))
    files = Saved(tmp_path, torch.float32)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    with files.model(files.offloaded(), 1) as (model, _):
        logits_of(model)
        with weights.open("r+b") as file:
            file.truncate(len(content) // 2)
            with pytest.raises(ReadFailed, match="became shorter"):
                logits_of(model)
            file.write(content)
        for got, expected in zip(logits_of(model), whole, strict=True):
            assert torch.equal(got, expected)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    offloaded = saved("llama", tmp_path, torch.float32).offloaded()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointChanged, match=r"model\.safetensors is not the file any more"):
        offloaded.files[0].check()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_layers_that_must_be_converted_are_written_once(family: str, tmp_path: Path) -> None:
    save(tiny_model(family), tmp_path)
    files = Saved(tmp_path, torch.bfloat16)
    whole = logits_of(files.resident())
    offloaded = files.offloaded()
    assert {Path(file.path).name for file in offloaded.files} == {"converted.layers"}
    with files.model(offloaded, 1) as (model, _):
        for got, expected in zip(logits_of(model), whole, strict=True):
            assert torch.equal(got, expected)
    before = (tmp_path / "converted.layers").stat()
    assert files.offloaded() == offloaded
    assert files.offloaded().layout == offloaded.layout
    assert (tmp_path / "converted.layers").stat() == before
    assert [path.name for path in tmp_path.glob(".*")] == []
    (tmp_path / "converted.layers").unlink()  # what is written anew is another weight set's
    assert files.offloaded().layout != offloaded.layout


def test_layers_of_a_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    files = Saved(tmp_path, torch.bfloat16, file)
    whole = logits_of(files.resident())
    with files.model(files.offloaded(), 1) as (model, _):
        for got, expected in zip(logits_of(model), whole, strict=True):
            assert torch.equal(got, expected)


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    files = Saved(tmp_path, torch.bfloat16)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"no room for [0-9,]+ bytes of converted layers"):
            files.offloaded()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".part", ".layers")] == []


def test_no_more_layers_are_in_memory_than_there_are_slots(tmp_path: Path) -> None:
    files = saved("llama", tmp_path, torch.float32)
    offloaded = files.offloaded()
    assert len(offloaded.layers) > 2
    layer_bytes = sum(tensor.num_bytes for tensor in offloaded.layers[0].tensors.values())
    with files.model(offloaded, 1) as (model, slots):
        assert slots.num_slots == 2
        places = {
            view.data_ptr()
            for layer in range(3)
            for s in range(2)
            for view in slots.views(layer, s).values()
        }
        assert max(places) - min(places) < 2 * (layer_bytes + 4096 * 16)
        own = {name for name in model._placement.tensors if name in offloaded.names}
        assert {model._placement.tensors[name].data_ptr() for name in own} <= places
