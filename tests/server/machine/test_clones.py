"""The proof of one copy, against processes that hold a second one in each way that there is."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from allocator import Client, Manifest, RuntimeDir, TensorEntry, WeightSetWriter, file_handle
from server.machine.proof import NothingToProve, prove
from server.machine.verify import Verdict
from tests.allocator.processes import ClientProcess
from tests.daemon_process import DaemonProcess
from tests.server.machine.cloning_program import CloningProgram

WEIGHTS_BYTES = 64 << 20
OWN_BYTES = 40_000_000
"""What each process may have: its interpreter takes some 20 MB, and two thirds of the weights more
are more than this."""


class Instance(ClientProcess):
    """It can also copy the weights."""

    program = CloningProgram
    module = "tests.server.machine.cloning_program"
    do: CloningProgram


@pytest.fixture
def start(runtime_dir: RuntimeDir, served: Client) -> Iterator[Callable[[], Instance]]:
    """Instances that have attached to the served set."""
    with ExitStack() as stack:

        def one() -> Instance:
            instance = stack.enter_context(Instance(runtime_dir))
            instance.do.attach("served")
            return instance

        yield one


@pytest.fixture
def served(memory: Client) -> Client:
    """A weight set that is loaded, and idle."""
    load(memory, "served")
    return memory


def load(memory: Client, key: str) -> str:
    """The name of its segment."""
    writer = memory.open_weight_set(key, {})
    assert isinstance(writer, WeightSetWriter)
    buffer = writer.reserve(WEIGHTS_BYTES + (1 << 16))
    buffer[:WEIGHTS_BYTES] = bytes(range(1, 129)) * (WEIGHTS_BYTES // 128)
    del buffer
    reader = writer.seal(manifest(), WEIGHTS_BYTES)
    reader.release()
    return reader.handle.segment


def manifest(segment: int = 0) -> Manifest:
    entry = TensorEntry(
        dtype="uint8",
        shape=(WEIGHTS_BYTES,),
        stride=(1,),
        offset=0,
        num_bytes=WEIGHTS_BYTES,
        segment=segment,
    )
    return Manifest(version=1, tensors={"x": entry}, metadata={})


def judged(runtime_dir: RuntimeDir, *instances: Instance) -> Verdict:
    named = [(f"i{number}", one.pid) for number, one in enumerate(instances)]
    return prove(runtime_dir, named, OWN_BYTES)


def assert_caught(verdict: Verdict) -> None:
    assert not verdict.holds
    assert any("i1: holds" in one and "of its own" in one for one in verdict.problems), verdict


# --- honest ones


def test_instances_that_only_attach_hold_one_copy(
    runtime_dir: RuntimeDir, start: Callable[[], Instance], tmp_path: Path
) -> None:
    one, other = start(), start()
    verdict = judged(runtime_dir, one, other)
    assert (verdict.holds, verdict.problems) == (True, [])
    assert verdict.weights_pss_bytes <= verdict.weights_bytes + 3 * 4096
    other.do.use_the_pool(WEIGHTS_BYTES)
    other.do.work(8 << 20)
    other.do.log(str(tmp_path / "log"))
    other.do.read_a_file(WEIGHTS_BYTES)
    verdict = judged(runtime_dir, one, other)
    assert (verdict.holds, verdict.problems) == (True, [])
    assert [one.kv_bytes for one in verdict.instances] == [0, WEIGHTS_BYTES]


def test_weights_that_were_woken_from_an_image_are_one_copy(
    runtime_dir: RuntimeDir, served: Client, start: Callable[[], Instance]
) -> None:
    served.sleep("served", level=2)
    served.wake("served")
    verdict = judged(runtime_dir, start(), start())
    assert verdict.segment.endswith(".weights")
    assert (verdict.holds, verdict.problems) == (True, [])


def test_a_file_that_was_handed_out_is_one_copy(
    runtime_dir: RuntimeDir, memory: Client, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(range(1, 129)) * (WEIGHTS_BYTES // 128))
    writer = memory.open_weight_set("served", {})
    assert isinstance(writer, WeightSetWriter)
    writer.reserve(1 << 16)
    writer.seal(manifest(segment=1), 0, [file_handle(file)]).release()
    with Instance(runtime_dir) as one, Instance(runtime_dir) as other:
        for instance in (one, other):
            instance.do.attach("served")
        verdict = judged(runtime_dir, one, other)
        assert (verdict.holds, verdict.problems) == (True, [])
        assert verdict.segment == str(file)
        # The same bytes in another file, called as checkpoints are, were not handed out.
        other.do.clone("file", str(tmp_path / "copy.safetensors"))
        assert_caught(judged(runtime_dir, one, other))


# --- clones

IN_SHARED_MEMORY = "/dev/shm/onecopy-test-{pid}"


@pytest.mark.parametrize(
    ("how", "path"),
    [
        ("heap", ""),
        ("private_mapping", ""),
        ("shared_mapping", ""),
        ("memfd", ""),
        ("memfd_that_is_called_like_a_segment", "/dev/shm{segment}"),
        ("memfd_that_can_be_executed", ""),
        ("memfd_that_nobody_maps", ""),
        ("file", "/dev/shm/test-{pid}"),
        ("file", "/dev/shm/onecopy-test-{pid}"),
        ("file", "/dev/shm{segment}-pool"),
        ("file_that_nobody_maps", "/dev/shm/onecopy-test-{pid}"),
        ("unlinked_file", "/dev/shm/onecopy-test-{pid}"),
        ("file", "{folder}/copy.weights"),
        ("file", "{folder}/copy.safetensors"),
        ("file", "{folder}/copy-pool"),
        ("unlinked_file", "{folder}/copy.weights"),
        ("sysv", ""),
    ],
)
def test_a_clone_is_caught_wherever_it_is_and_whatever_it_is_called(
    how: str,
    path: str,
    runtime_dir: RuntimeDir,
    served: Client,
    start: Callable[[], Instance],
    tmp_path: Path,
) -> None:
    honest, cloning = start(), start()
    [segment] = [one.handle.segment for one in served.handed_out()]
    path = path.format(segment=segment, pid=cloning.pid, folder=tmp_path)
    assert judged(runtime_dir, honest, cloning).holds
    try:
        cloning.do.clone(how, path)
        assert_caught(judged(runtime_dir, honest, cloning))
        # Two that share a clone do not make it the allocator's.
        assert judged(runtime_dir, honest).holds
    finally:
        if path.startswith("/dev/shm") and how != "memfd_that_is_called_like_a_segment":
            Path(path).unlink(missing_ok=True)


def test_a_clone_that_all_share_is_one_copy_too_many(
    runtime_dir: RuntimeDir, start: Callable[[], Instance]
) -> None:
    one, other = start(), start()
    path = Path(f"/dev/shm/onecopy-test-{one.pid}")
    try:
        for instance in (one, other):
            instance.do.clone("file", str(path))
        verdict = judged(runtime_dir, one, other)
        assert_caught(verdict)
        assert any("i0: holds" in problem for problem in verdict.problems)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["huge_pages", "huge_memfd"])
def test_a_clone_in_huge_pages_is_caught(
    how: str, runtime_dir: RuntimeDir, start: Callable[[], Instance]
) -> None:
    free = int(Path("/proc/sys/vm/nr_hugepages").read_text())
    if free < WEIGHTS_BYTES // (2 << 20) + 1:
        pytest.skip("too few huge pages are reserved here (vm.nr_hugepages)")
    honest, cloning = start(), start()
    cloning.do.clone(how)
    assert_caught(judged(runtime_dir, honest, cloning))


def test_pages_of_the_segment_that_were_written_are_caught(
    runtime_dir: RuntimeDir, served: Client, start: Callable[[], Instance]
) -> None:
    honest, cloning = start(), start()
    [segment] = [one.handle.segment for one in served.handed_out()]
    cloning.do.clone("written_pages", f"/dev/shm{segment}")
    verdict = judged(runtime_dir, honest, cloning)
    assert not verdict.holds
    assert "i1: its mapping is writable or private" in verdict.problems


def test_another_set_of_the_allocators_is_no_excuse(
    runtime_dir: RuntimeDir, served: Client, start: Callable[[], Instance]
) -> None:
    honest, cloning = start(), start()
    segment = load(served, "copy")
    cloning.do.clone("other_weight_set", f"/dev/shm{segment}")
    assert_caught(judged(runtime_dir, honest, cloning))
    reading = start()
    reading.do.attach("copy")
    verdict = judged(runtime_dir, honest, reading)
    assert "the instances read 2 weight sets, not one" in verdict.problems


def test_a_segment_that_was_replaced_under_its_name_is_not_the_allocators(
    runtime_dir: RuntimeDir, served: Client, start: Callable[[], Instance]
) -> None:
    honest, cloning = start(), start()
    [segment] = [one.handle.segment for one in served.handed_out()]
    Path(f"/dev/shm{segment}").unlink()
    cloning.do.clone("file", f"/dev/shm{segment}")
    verdict = judged(runtime_dir, honest, cloning)
    assert not verdict.holds
    assert_caught(verdict)


def test_without_a_set_that_they_read_nothing_is_proven(
    runtime_dir: RuntimeDir, daemon: DaemonProcess
) -> None:
    with pytest.raises(NothingToProve, match="onecopy stop"):
        prove(runtime_dir, [("i0", daemon.pid)])
