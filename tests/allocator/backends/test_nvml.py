"""The driver's own figures, as NVML gives them, against a simulated one.

What a real driver counts for a process that imported memory is not known here: tests/gpu looks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from allocator.backends.nvml import device_usage
from allocator.errors import InvalidSetting
from allocator.messages import Handle
from tests.allocator.backends.simulated_driver.build import GRANULARITY, build, environment
from tests.allocator.backends.simulated_driver.process import Process, imported
from tests.allocator.processes import Refused
from tests.warm import Warm

pytestmark = pytest.mark.slow

DEVICE = "cuda:GPU-d0d0d0d0-d0d0-d0d0-d0d0-d0d0d0d0d0d0"
SIZE = 3 * GRANULARITY

Start = Callable[..., Process]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("simulated_driver"))


@pytest.fixture(scope="session")
def warm(library: Path, adopted_orphans: None) -> Iterator[Warm]:
    with imported(environment(library, Path("/nowhere"))) as warm:
        yield warm


@pytest.fixture
def start(library: Path, warm: Warm, tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as started:
        yield lambda **settings: started.enter_context(
            Process(environment(library, tmp_path / "state", **settings), warm)
        )


def test_memory_that_two_processes_hold_is_in_use_once(start: Start) -> None:
    owner, reader = start(), start()
    owner.do.own("cuda:0")
    before = reader.do.usage(DEVICE)
    owner.do.reserve("a", SIZE)
    descriptor = owner.export("a")
    named = Handle(backend="cuda", device=DEVICE, segment="a", num_bytes=SIZE, generation=1)
    reader.given(descriptor).map(named, False)
    os.close(descriptor)
    usage = reader.do.usage(DEVICE)
    assert usage["used_bytes"] - before["used_bytes"] == SIZE
    assert sorted(usage["processes"].values()) == [SIZE, SIZE]
    assert usage["total_bytes"] - usage["used_bytes"] == reader.do.free_bytes()
    assert (usage["model"], usage["compute_mode"], usage["mig"]) == (
        "Simulated device 0",
        "default",
        False,
    )
    owner.kill()
    assert reader.do.usage(DEVICE)["used_bytes"] == SIZE


@pytest.mark.parametrize(
    ("mode", "name"), [("0", "default"), ("2", "prohibited"), ("3", "exclusive"), ("9", "unknown")]
)
def test_the_compute_mode_has_a_name(start: Start, mode: str, name: str) -> None:
    assert start(SIMULATED_NVML_MODE=mode).do.usage(DEVICE)["compute_mode"] == name


def test_what_a_driver_does_not_tell_is_no_error_where_it_can_be_missed(start: Start) -> None:
    assert start(SIMULATED_NVML_LACKS="mode").do.usage(DEVICE)["compute_mode"] == "unknown"
    with pytest.raises(Refused, match=r"InvalidSetting: .* does not tell: "):
        start(SIMULATED_NVML_LACKS="processes").do.usage(DEVICE)


def test_all_devices_are_told(start: Start) -> None:
    usages = start(SIMULATED_DRIVER_DEVICES="2").do.usages()
    assert [f"cuda:{one['name']}" for one in usages] == [DEVICE, DEVICE.replace("d0", "d1")]


def test_a_device_that_is_not_there_is_named(start: Start) -> None:
    with pytest.raises(Refused, match="NVML knows no device cuda:GPU-0"):
        start().do.usage("cuda:GPU-00000000-0000-0000-0000-000000000000")


def test_a_machine_without_nvml_is_told_what_to_do() -> None:
    try:
        usage = device_usage(DEVICE)
    except InvalidSetting as error:
        assert "nvidia-smi" in str(error)  # noqa: PT017 - a machine with a GPU raises the other one
    else:
        pytest.fail(f"a device that can't be here: {usage}")
