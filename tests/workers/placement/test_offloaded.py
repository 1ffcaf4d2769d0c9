"""A model whose layers are read from its files while it computes answers as one in memory does."""

import json
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from allocator import DiskFull
from tests.leaks import wait_until
from tests.quick import few_quick
from tests.workers.checkpoint.checkpoint_files import write_gguf
from tests.workers.model.placed_models import NATIVE, logits_of, models_of
from tests.workers.model.tiny_families import FAMILIES, save, tiny_model
from tests.workers.placement.test_slots import tensor
from workers.checkpoint import Checkpoint, open_checkpoint
from workers.checkpoint.converted import OnWritten, write_converted
from workers.checkpoint.offloaded import (
    OffloadedFile,
    OffloadedLayer,
    OffloadedLayers,
    decoded,
    find_layers,
)
from workers.conformance.greedy import read_whole
from workers.errors import (
    CacheNotWritable,
    CheckpointChanged,
    CheckpointNotFound,
    DeviceLost,
    ReadFailed,
    ReadTimedOut,
)
from workers.model.decoder import Model, build_model
from workers.model.stretch import Placement
from workers.packed_format import decoded as packed_ones
from workers.placement.layer_slots import LayerSlots, memory_bytes
from workers.placement.offloaded import Offloaded
from workers.placement.place import open_files
from workers.placement.reader import Reader
from workers.placement.resident import Resident
from workers.placement.slots import slot_layout
from workers.quantize.quantize import quantize
from workers.quantize.request import Request
from workers.skeleton.decoder import names_of_layers, skeleton


@dataclass
class Saved:
    """A tiny model in files."""

    folder: Path
    dtype: torch.dtype
    file: Path | None = None
    """In the folder, where it is no folder's model."""
    packs: bool = False

    def checkpoint(self) -> Checkpoint:
        dtype = str(self.dtype).removeprefix("torch.")
        return open_checkpoint(self.file or self.folder, dtype, packs=self.packs)

    def resident(self) -> Model:
        return self.built(Resident(read_whole(self.checkpoint())))

    def built(self, placement: Placement) -> Model:
        metadata = self.checkpoint().metadata()
        config, packed = json.loads(metadata["config"]), packed_ones(metadata)
        return build_model(config, placement, self.dtype, packed=packed)

    def offloaded(
        self,
        indices: list[int] | None = None,
        on_written: OnWritten = lambda *_: None,
        converted: Path | None = None,
    ) -> OffloadedLayers:
        """Those layers, or all, of the checkpoint."""
        checkpoint = self.checkpoint()
        names = names_of_layers(skeleton(self.config(), self.dtype))
        chosen = range(len(names)) if indices is None else indices
        converted = converted or self.folder / "converted.layers"
        found = find_layers(checkpoint, names, chosen, converted)
        found = write_converted(checkpoint, found, on_written)
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
            check_files = open_files(threads, offloaded)
            area = mmap.mmap(-1, memory_bytes(layouts, depth))
            slots = LayerSlots(layouts, depth, torch.frombuffer(area, dtype=torch.uint8), threads)
            yield self.built(Offloaded(staying, offloaded, slots, check_files)), slots


def saved(family: str, folder: Path, dtype: torch.dtype) -> Saved:
    save(tiny_model(family).to(dtype), folder)
    return Saved(folder, dtype)


@pytest.mark.parametrize("family", few_quick(sorted({*FAMILIES, "gemma3", "llama"})))
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


@pytest.mark.parametrize("by_kernels", [True, False])
def test_packed_layers_compute_the_same_bits(by_kernels: bool, tmp_path: Path) -> None:
    save(tiny_model("llama", hidden_size=128, intermediate_size=256), tmp_path / "whole")
    request = Request(tmp_path / "whole", tmp_path / "small", "w4a16", group_size=32)
    quantize(request, lambda _progress: None)
    files = Saved(tmp_path / "small", torch.bfloat16, packs=True)
    resident = files.resident()
    offloaded = files.offloaded()
    assert {"uint8", "bfloat16"} == {one.dtype for one in offloaded.layers[0].tensors.values()}
    with files.model(offloaded, 1) as (model, _):
        for one in (resident, model) if by_kernels else ():
            assert one.accelerate(64, 128, 2) is None
        whole = logits_of(resident)
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
    with files.model(files.offloaded(), 1, NeverWaits(delay=(1, 5.0))) as (model, _):
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


def test_a_file_that_ends_in_mid_pass_is_an_error_that_names_it(tmp_path: Path) -> None:
    files = saved("llama", tmp_path, torch.float32)
    weights = tmp_path / "model.safetensors"
    with files.model(files.offloaded(), 1) as (model, _):

        def cut(*_: object) -> None:
            os.truncate(weights, 1000)

        layers = [part for part in model.module.modules() if type(part).__name__.endswith("MLP")]
        layers[0].register_forward_pre_hook(cut)
        with pytest.raises(ReadFailed, match=r"model\.safetensors became shorter"):
            logits_of(model)


def test_what_was_read_ahead_in_vain_is_read_again(tmp_path: Path) -> None:
    layouts = [slot_layout({"a": tensor((0, 4096 * n, 4096))}) for n in range(4)]
    file = tmp_path / "file"
    content = bytes(n for n in range(4) for _ in range(4096))
    file.write_bytes(content[: 4096 + 7])
    area = torch.frombuffer(mmap.mmap(-1, memory_bytes(layouts, 2)), dtype=torch.uint8)
    with Reader() as reader:
        reader.open(file)
        slots = LayerSlots(layouts, 2, area, reader)
        slots.use(0)
        ahead = [job for job in slots._jobs if job is not None]
        wait_until(lambda: len(ahead) == 2 and all(map(reader.done, ahead)), "what is read ahead")
        file.write_bytes(content)
        for item in (1, 2, 3):
            assert slots.views(item, slots.use(item))["a"].unique().tolist() == [item]


def test_a_file_that_changes_while_it_is_served_is_refused_from_then_on(tmp_path: Path) -> None:
    files = saved("llama", tmp_path, torch.float32)
    with files.model(files.offloaded(), 1) as (model, _):
        logits_of(model)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(-100, 2)
            file.write(bytes(100))
        for _ in range(2):
            with pytest.raises(CheckpointChanged, match=r"safetensors is not the file any more"):
                logits_of(model)


def test_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    files = saved("llama", tmp_path, torch.float32)
    offloaded = files.offloaded()
    (tmp_path / "model.safetensors").touch()
    with Reader() as reader, pytest.raises(CheckpointChanged, match="is not the file any more"):
        open_files(reader, offloaded)
    (tmp_path / "model.safetensors").unlink()
    with Reader() as reader, pytest.raises(CheckpointNotFound, match="finds them anew"):
        open_files(reader, offloaded)


class Hangs(Reader):
    """Of a disk that does not answer: whoever waits for it to end waits for ever."""

    def wait(self, job: int, timeout_s: float | None = None) -> None:
        raise ReadTimedOut(f"{timeout_s} s")

    def cancel(self, job: int) -> None:
        pytest.fail("it was waited for")


def test_a_disk_that_hangs_ends_who_needs_it_and_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8192))
    layouts = [slot_layout({"a": tensor((0, 4096 * n, 4096))}) for n in range(2)]
    area = torch.frombuffer(mmap.mmap(-1, memory_bytes(layouts, 0)), dtype=torch.uint8)
    with Hangs() as reader:
        reader.open(file)
        slots = LayerSlots(layouts, 0, area, reader, patience_s=3)
        with pytest.raises(DeviceLost, match="3 s"):
            slots.use(0)
        slots.close()
        assert reader.statistics().bytes_read >= 0  # it is not closed


def test_two_who_convert_at_once_have_the_same_file(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    files = Saved(tmp_path, torch.bfloat16)
    other: list[OffloadedLayers] = []

    def meanwhile(_done: int, _total: int) -> None:
        if not other:
            other.append(files.offloaded())

    assert files.offloaded(on_written=meanwhile) == other[0]


def test_a_folder_that_can_not_be_written_to_is_named(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    (tmp_path / "file").write_text("")
    files = Saved(tmp_path, torch.bfloat16)
    with pytest.raises(CacheNotWritable, match="set ONECOPY_CACHE_DIR"):
        files.offloaded(converted=tmp_path / "file" / "converted.layers")


def test_a_thousand_files_are_told_apart_in_a_word(tmp_path: Path) -> None:
    numbers = range(1000)
    files = tuple(OffloadedFile(f"/models/{n}", f"1:{n}:{10**10}:{10**18}") for n in numbers)
    layers = tuple(OffloadedLayer(n, f"layers.{n}.", {}) for n in numbers)
    layout = OffloadedLayers(files, layers).layout
    assert len(layout) < 100
    assert layout != OffloadedLayers(files[1:], layers).layout
    assert layout != OffloadedLayers(files, layers[1:]).layout


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
