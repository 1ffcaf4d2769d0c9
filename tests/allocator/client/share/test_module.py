"""Modules shared by real processes: the same values, once in memory, and nobody harmed."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from allocator import Client, InvalidMessage, OutOfDeviceMemory, RuntimeDir
from allocator.client.share.module import share
from allocator.messages import WeightSetStatistics
from server.machine import process_memory
from server.machine.handed_out import handed_out, seen
from server.machine.process_memory import HandedOut, ProcessMemory
from tests.allocator.client.share.module_programs import ModuleProcess, Nursery
from tests.allocator.client.share.sample_modules import (
    HAS_DIFFUSERS,
    LARGE_BYTES,
    build,
    described,
    output,
)
from tests.allocator.processes import Refused
from tests.daemon_process import DaemonProcess
from tests.leaks import wait_until

Start = Callable[[], ModuleProcess]


@pytest.fixture(scope="module")
def nursery(adopted_orphans: None) -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have it: with more threads a sum may be taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start(nursery: Nursery, daemon: DaemonProcess, runtime_dir: RuntimeDir) -> Iterator[Start]:
    """Start processes that are connected to the daemon; each is stopped at teardown."""
    started: list[ModuleProcess] = []

    def one() -> ModuleProcess:
        started.append(nursery.start(runtime_dir))
        return started[-1]

    yield one
    for process in started:
        process.stop()


def sharing(start: Start, kind: str, *, seed: int = 0, device: str = "cpu") -> ModuleProcess:
    """A process that has shared such a module as "k"."""
    process = start()
    process.do.build(kind, seed, device)
    process.do.share("k")
    return process


def only_set(memory: Client) -> WeightSetStatistics:
    [found] = memory.statistics().weight_sets
    return found


def measured(process: ModuleProcess, mapped: HandedOut | None = None) -> ProcessMemory:
    """Its memory, of which the allocator has handed out what it has now, or `mapped`."""
    found = process_memory.read(process.pid, mapped or seen(process.runtime_dir))
    assert found is not None
    return found


def private_bytes(process: ModuleProcess) -> int:
    return measured(process).private_bytes


def peak_bytes(process: ModuleProcess) -> int:
    """The most that was ever resident, shared memory included."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel gives no VmHWM")


# --- one copy


@pytest.mark.parametrize("number", [2, 4])
def test_processes_at_once_compute_the_same_over_one_copy(start: Start, number: int) -> None:
    expected = output("large", build("large"))
    processes = [start() for _ in range(number)]
    for process in processes:
        process.do.build("large")
    before = [private_bytes(process) for process in processes]
    for process in processes:
        process.begin.share("k")
    assert sorted(process.receive() for process in processes) == [False] * (number - 1) + [True]
    assert [process.do.output() for process in processes] == [expected] * number

    segments = [segment for process in processes for segment in measured(process).segments]
    assert len(segments) == number
    assert len({segment.inode for segment in segments}) == 1
    assert all(segment.shared and not segment.writable for segment in segments)
    assert all(segment.resident_bytes >= LARGE_BYTES for segment in segments)
    [copy] = {segment.mapped_bytes for segment in segments}
    assert LARGE_BYTES <= copy < LARGE_BYTES + (1 << 16)
    assert sum(segment.pss_bytes for segment in segments) <= copy + number * 4096
    for process, private in zip(processes, before, strict=True):
        # What Python takes for itself on the way it takes a mebibyte at a time.
        assert private_bytes(process) < private - LARGE_BYTES + (5 << 20)


def test_the_memory_of_parameters_goes_though_a_buffer_had_a_part_of_it(start: Start) -> None:
    publisher = start()
    publisher.do.build("flat")
    before = private_bytes(publisher)
    Path(f"/proc/{publisher.pid}/clear_refs").write_text("5")  # the peak begins anew, see proc(5)
    peak = peak_bytes(publisher)
    assert publisher.do.share("k")
    assert private_bytes(publisher) < before - LARGE_BYTES + (4 << 20)
    assert peak_bytes(publisher) < peak + LARGE_BYTES + (8 << 20)  # the segment, and no third copy
    assert publisher.do.in_segment() == ["up", "down"]
    assert publisher.do.output() == output("flat", build("flat"))


def test_a_module_on_meta_never_has_private_parameters(start: Start) -> None:
    publisher = sharing(start, "large")
    reader = start()
    reader.do.build("large", 0, "meta")
    before = private_bytes(reader)
    assert reader.do.share("k") is False
    assert reader.do.output() == publisher.do.output()
    assert private_bytes(reader) < before + (8 << 20)


# --- exactness


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_form_of_tensor_is_kept(start: Start, device: str) -> None:
    module = build("odd")
    expected, computed = described(module), output("odd", module)
    assert len(expected["overlaps"]) > 20  # of parameters, buffers, and both
    publisher = sharing(start, "odd")
    reader = sharing(start, "odd", seed=5, device=device)
    for process in (publisher, reader):
        assert process.do.described() == expected
        assert process.do.output() == computed
    # The slice lies in a storage of 64 MiB, of which nothing else is needed.
    assert publisher.do.num_bytes() < 64 << 10


def test_random_views_of_random_storages_are_kept(start: Start) -> None:
    publisher, reader = start(), start()
    num_overlaps = 0
    for seed in range(40):
        kind = f"scattered {seed}"
        expected = described(build(kind))
        num_overlaps += len(expected["overlaps"])
        for process, first in ((publisher, True), (reader, False)):
            process.do.build(kind, 0 if first else 9, "cpu")
            assert process.do.share(kind) is first
            assert process.do.described() == expected, kind
    assert num_overlaps > 100


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "t5",
        pytest.param(
            "unet", marks=pytest.mark.skipif(not HAS_DIFFUSERS, reason="diffusers is not installed")
        ),
        pytest.param(
            "autoencoder",
            marks=pytest.mark.skipif(not HAS_DIFFUSERS, reason="diffusers is not installed"),
        ),
        "lstm",
    ],
)
def test_models_of_libraries_compute_the_same(start: Start, kind: str) -> None:
    module = build(kind)
    expected, computed = described(module), output(kind, module)
    assert computed != output(kind, build(kind, seed=5))
    for process in (
        sharing(start, kind),
        sharing(start, kind, seed=5),
        sharing(start, kind, device="meta"),
    ):
        assert process.do.described() == expected
        assert process.do.output() == computed
        assert process.do.in_segment() == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("first", ["untied", "tied"])
def test_the_publishers_ties_win(start: Start, first: str, device: str) -> None:
    publisher = sharing(start, first)
    reader = sharing(start, "untied" if first == "tied" else "tied", seed=5, device=device)
    assert reader.do.described() == publisher.do.described() == described(build(first))
    assert reader.do.output() == output(first, build(first))


def test_one_layer_under_two_names_cant_become_two(start: Start) -> None:
    sharing(start, "untied")
    with pytest.raises(Refused, match=r"'first.weight' and 'second.weight' were two tensors .*'k'"):
        sharing(start, "one layer")
    two = sharing(start, "tied")  # the refusal harmed nobody
    assert two.do.described() == described(build("untied"))


def test_two_layers_become_one_set_of_tensors(start: Start) -> None:
    sharing(start, "one layer")
    reader = sharing(start, "untied", seed=5)
    assert reader.do.described() == described(build("one layer"))


# --- buffers


def test_buffers_are_private_and_writable(start: Start) -> None:
    module = build("normed")
    expected = [output("normed", module.train()) for _ in range(2)]
    after = described(module)
    publisher = sharing(start, "normed")
    readers = [sharing(start, "normed", seed=5, device=device) for device in ("cpu", "meta")]
    for process in (publisher, *readers):  # each begins with the publisher's values of the start
        assert process.do.in_segment() == [name for name, _ in module.named_parameters()]
        assert [process.do.train() for _ in range(2)] == expected
        assert process.do.described() == after


def test_a_buffer_over_a_parameter_is_read_only_as_it_is(start: Start) -> None:
    for process in (sharing(start, "odd"), sharing(start, "odd", device="meta")):
        shared = process.do.in_segment()
        assert "of_parameter" in shared
        assert not {"values", "first_values", "beside", "count", "derived"} & set(shared)
        process.do.write("values")
        process.begin.write("of_parameter")
        assert process.ended_by() == signal.SIGSEGV


# --- meta


def test_a_module_on_meta_waits_for_nobody(start: Start, memory: Client) -> None:
    reader = start()
    reader.do.build("untied", 0, "meta")
    for _ in range(2):
        with pytest.raises(Refused, match=r"UnknownWeightSet: nobody has shared 'k' yet, and this"):
            reader.do.share("k")
    assert {form[-1] for form in reader.do.described()["tensors"].values()} == {"meta"}
    assert memory.statistics().weight_sets == ()
    publisher = sharing(start, "untied")
    assert reader.do.share("k") is False
    assert reader.do.described() == publisher.do.described()


# --- what must match


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "half",
            r"FingerprintMismatch: the module that was shared as 'k' has other tensors than this "
            r"one: 'first.weight' was a parameter, float32\[8, 8\] and is now a parameter, "
            r"bfloat16\[8, 8\]; 'first.bias'",
        ),
        (
            "narrow",
            r"'second.weight' was a parameter, float32\[8, 8\] and is now a parameter, "
            r"float32\[4, 8\]; 'second.bias' was .*\[8\] and is now .*\[4\]$",
        ),
        ("linear", r"FingerprintMismatch: .*module was 'tests\S+Two' and is now 'torch\S+Linear'"),
    ],
)
def test_another_module_is_refused_by_what_differs(
    start: Start, memory: Client, kind: str, message: str
) -> None:
    publisher = sharing(start, "untied")
    other = start()
    other.do.build(kind)
    before = other.do.described()
    with pytest.raises(Refused, match=message):
        other.do.share("k")
    assert other.do.described() == before
    assert only_set(memory).reader_pids == (publisher.pid,)


def test_the_callers_fingerprint_counts(start: Start) -> None:
    processes = [start(), start()]
    for process in processes:
        process.do.build("untied")
    assert processes[0].do.share("k", {"revision": "1"})
    with pytest.raises(Refused, match=r"revision was '1' and is now '2'"):
        processes[1].do.share("k", {"revision": "2"})
    with pytest.raises(Refused, match=r"InvalidMessage: .* 'module' of its own"):
        processes[1].do.share("k", {"module": "2"})
    assert processes[1].do.share("k", {"revision": "1"}) is False


class Subclass(torch.Tensor):
    """What a library of quantized weights would bring."""


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.eye(3).as_subclass(Subclass), "it is a Subclass, not a plain buffer"),
        (nn.Parameter(torch.eye(3)), "it is a Parameter, not a plain buffer"),
        (torch.eye(3).to_sparse(), r"its layout is torch.sparse_coo"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "lazily conjugated"),
        (torch.zeros(3, dtype=torch.complex64).conj().imag, "lazily conjugated or negated"),
    ],
    ids=["subclass", "parameter", "coo", "conj", "neg"],
)
def test_what_is_more_than_its_bytes_is_refused_by_name(
    memory: Client, tensor: torch.Tensor, problem: str
) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_buffer("b", tensor)
    with pytest.raises(InvalidMessage, match=rf"the buffer '0.b' can't be shared: .*{problem}"):
        share(memory, module, "k")
    assert memory.statistics().weight_sets == ()


def test_parameters_that_are_more_than_their_bytes_are_refused(memory: Client) -> None:
    with pytest.raises(InvalidMessage, match="'weight' can't be shared: it is a Uninitialized"):
        share(memory, nn.LazyLinear(3), "k")
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(torch.eye(3).to_sparse()))
    with pytest.raises(InvalidMessage, match="the parameter 'p' can't be shared: its layout"):
        share(memory, module, "k")
    assert memory.statistics().weight_sets == ()


class Packed(nn.Linear):
    """Has weights that are neither parameter nor buffer, as packed quantized ones are."""

    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 3}


def test_state_that_would_not_travel_is_refused(memory: Client) -> None:
    with pytest.raises(InvalidMessage, match=r"the state '0\._extra_state' can't be shared"):
        share(memory, nn.Sequential(Packed(2, 2)), "k")
    assert memory.statistics().weight_sets == ()


# --- errors and deaths


def test_a_publisher_that_is_killed_in_the_middle_is_followed_by_the_next(
    start: Start, memory: Client
) -> None:
    expected = output("large", build("large"))
    publisher, waiting = start(), start()
    for process in (publisher, waiting):
        process.do.build("large")
    publisher.do.stop_at_first_progress()
    publisher.begin.share("k")
    publisher.wait_stopped()
    assert 0 < only_set(memory).written_bytes < LARGE_BYTES
    with pytest.raises(Refused, match=rf"WaitTimeout: process {publisher.pid} has been loading"):
        waiting.do.share("k", {}, 0.1)
    waiting.begin.share("k")
    publisher.signal(signal.SIGKILL)
    assert publisher.ended_by() == signal.SIGKILL
    assert waiting.receive() is True
    assert waiting.do.output() == expected
    assert only_set(memory).reader_pids == (waiting.pid,)


def test_a_publisher_that_is_interrupted_gives_the_election_back(
    start: Start, memory: Client
) -> None:
    expected = output("large", build("large"))
    publisher = start()
    publisher.do.build("large")
    before = private_bytes(publisher)
    publisher.do.interrupt_at_first_progress()
    publisher.begin.share("k")
    with pytest.raises(Refused, match="KeyboardInterrupt"):
        publisher.receive()
    assert memory.statistics().weight_sets == ()
    assert publisher.do.in_segment() == []
    assert publisher.do.output() == expected
    assert abs(private_bytes(publisher) - before) < 4 << 20
    assert sharing(start, "large", seed=5).do.output() != expected
    assert publisher.do.share("k") is False
    assert publisher.do.output() != expected


def test_a_module_that_does_not_fit_stays_as_it_was(memory: Client, tmp_path: Path) -> None:
    num_bytes = 1 << 42
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(num_bytes)
    module = nn.Linear(2, 2)
    huge = torch.from_file(str(tmp_path / "sparse"), shared=True, size=num_bytes, dtype=torch.uint8)
    module.register_parameter("huge", nn.Parameter(huge, requires_grad=False))
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(OutOfDeviceMemory):
        share(memory, module, "k")
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses
    assert module.weight.requires_grad
    assert memory.statistics().weight_sets == ()


def test_bytes_that_no_offset_aligns_are_refused(memory: Client) -> None:
    data = bytearray(64)
    module = nn.Module()
    module.a = nn.Parameter(torch.frombuffer(data, dtype=torch.float32, count=2))
    module.b = nn.Parameter(torch.frombuffer(data, dtype=torch.float32, count=2, offset=2))
    with pytest.raises(InvalidMessage, match="'a', 'b' overlap at distances"):
        share(memory, module, "k")
    assert memory.statistics().weight_sets == ()


def test_a_write_ends_only_the_writer(start: Start, memory: Client) -> None:
    processes = [sharing(start, "tied") for _ in range(3)]
    expected = output("tied", build("tied"))
    for writer in (processes[0], processes[1]):  # the publisher, and a reader
        writer.begin.write("second.weight")
        assert writer.ended_by() == signal.SIGSEGV
    wait_until(lambda: only_set(memory).reader_pids == (processes[2].pid,), "the others are gone")
    assert processes[2].do.output() == expected


# --- the module stays a module


def test_copies_and_conversions_are_private(start: Start) -> None:
    for kind in ("llama", "odd"):
        process = start()
        process.do.build(kind)
        process.do.share(kind)
        module = build(kind)
        expected = output(kind, module)
        assert process.do.output() == expected
        copied, written, in_segment = process.do.copy()
        assert (copied, in_segment) == (expected, [])
        assert written != expected
        assert process.do.output() == expected
    first, second = sharing(start, "llama"), sharing(start, "llama")
    first.do.convert("float64")
    assert first.do.in_segment() == []
    assert first.do.output() == output("llama", build("llama").to(torch.float64))
    assert second.do.output() == output("llama", build("llama"))


def test_mode_hooks_names_and_objects_stay(memory: Client) -> None:
    module = build("tied").eval()
    assert isinstance(module.first, nn.Linear)
    calls: list[str] = []
    module.first.register_forward_hook(lambda *_: calls.append("hook"))
    module.second.train()
    module(torch.ones(1, 8)).sum().backward()
    names, parameters = list(module.state_dict()), list(module.parameters())
    expected = output("tied", module)
    calls.clear()
    with share(memory, module, "k") as shared:
        assert shared.loaded
        assert shared.num_bytes == only_set(memory).num_bytes
        assert output("tied", module) == expected
        assert calls == ["hook"]
        assert list(module.state_dict()) == names
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
        assert module.second.weight is module.first.weight
        assert (module.training, module.second.training) == (False, True)
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_a_parameters_storage_and_attributes_are_its_own(memory: Client) -> None:
    publisher, reader = build("tied"), build("tied", device="meta")
    for module in (publisher, reader):
        module.get_parameter("first.weight").note = "kept"
        share(memory, module, "k")
        assert module.get_parameter("second.weight").note == "kept"
        for parameter in module.parameters():  # so that saving one does not save all
            assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_sharing_in_inference_mode(memory: Client) -> None:
    with torch.inference_mode():
        modules = [build("normed", seed) for seed in (0, 5)]
        before = described(modules[0])
        shared = [share(memory, module, "k") for module in modules]
    assert [one.loaded for one in shared] == [True, False]
    assert [described(module) for module in modules] == [before, before]
    assert not any(tensor.is_inference() for tensor in modules[1].state_dict().values())
    image = torch.ones(2, 3, 8, 8, requires_grad=True)
    modules[1].train()(image).sum().backward()
    assert image.grad is not None


def test_a_module_without_tensors(memory: Client) -> None:
    with share(memory, nn.ReLU(), "k") as first, share(memory, nn.ReLU(), "k") as second:
        assert (first.loaded, second.loaded) == (True, False)


def test_a_shared_module_can_be_shared_again(memory: Client) -> None:
    module, expected = build("odd"), described(build("odd"))
    for key in ("k", "k", "other"):
        share(memory, module, key)
        assert described(module) == expected


# --- the end of sharing


def test_released_modules_stay_valid(start: Start, memory: Client) -> None:
    publisher, reader = sharing(start, "large"), sharing(start, "large", device="meta")
    expected = publisher.do.output()
    mapped = handed_out(memory)
    for process in (publisher, reader):
        process.do.release()
    assert only_set(memory).state == "idle"
    memory.evict("k")
    assert [process.do.output() for process in (publisher, reader)] == [expected] * 2
    assert len(measured(reader, mapped).segments) == 1
    assert measured(reader).segments == ()  # it has not been handed out any more
    reader.do.drop()
    assert measured(reader, mapped).segments == ()


def test_modules_outlive_the_allocator(start: Start, daemon: DaemonProcess) -> None:
    process = sharing(start, "tied")
    assert daemon.stop() == 0
    assert process.do.output() == output("tied", build("tied"))
    process.do.release()
    with pytest.raises(Refused, match="AllocatorGone"):
        process.do.share("k")
    assert process.do.output() == output("tied", build("tied"))
