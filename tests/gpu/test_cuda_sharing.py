"""One copy on a GPU for several real processes: a daemon, clients, tensors over the same memory."""

import hashlib
import os
from collections.abc import Callable

import pytest
import torch

from allocator import RuntimeDir
from tests.allocator.backends.device_client import DeviceClient
from tests.allocator.processes import Refused
from tests.daemon_process import DaemonProcess
from tests.leaks import wait_until

SIZE = 512 << 20
SMALL = 64 << 20
SLACK = 64 << 20  # what torch may allocate meanwhile

Start = Callable[..., DeviceClient]


def digest_of(value: int, num_bytes: int) -> str:
    return hashlib.sha256(bytes([value]) * num_bytes).hexdigest()


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def test_the_daemon_takes_no_device_memory_of_its_own(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    before = free_bytes()
    daemon = start_daemon("--device", "cuda:0")  # a context would take hundreds of megabytes
    with daemon.connect() as client:
        assert client.statistics().limit_bytes <= torch.cuda.mem_get_info()[1]
    assert before - free_bytes() < SLACK


def test_a_second_process_costs_no_second_copy(daemon: DaemonProcess, start: Start) -> None:
    writer, readers = start(), [start(), start()]
    for client in (writer, *readers):
        client.do.free_bytes()  # its context, before anything is measured
    before = readers[0].do.free_bytes()
    assert writer.do.load("set", SIZE, 7) == "writer"
    with_one = readers[0].do.free_bytes()
    assert SIZE <= before - with_one < SIZE + SLACK
    for reader in readers:
        assert reader.do.load("set", SIZE, 0) == "reader"
        assert reader.do.take_tensor() == ["cuda:0", "torch.uint8", SIZE]
    assert with_one - readers[0].do.free_bytes() < SLACK
    for reader in readers:
        assert reader.do.digest() == digest_of(7, SIZE)
        assert reader.do.tensor_digest() == digest_of(7, SIZE)


def test_the_device_computes_with_what_another_process_wrote(start: Start) -> None:
    writer, reader = start(), start()
    writer.do.load("set", SMALL, 3)
    reader.do.load("set", SMALL, 0)
    reader.do.take_tensor()
    assert reader.do.tensor_sum() == 3 * SMALL
    writer.kill()
    assert reader.do.tensor_sum() == 3 * SMALL


def test_a_write_to_sealed_weights_ends_the_writer_alone(start: Start) -> None:
    clients = [start(), start()]
    for client in clients:
        client.do.load("set", SMALL, 3)
        client.do.take_tensor()
    with pytest.raises(Refused, match="CUDA error"):
        clients[0].do.write_to_tensor()
    with pytest.raises(Refused, match=r"CUDA error|CUDA_ERROR"):
        clients[0].do.tensor_sum()
    assert "CUDA_ERROR" in clients[0].do.fault()
    assert clients[1].do.fault() is None
    assert clients[1].do.tensor_sum() == 3 * SMALL
    assert clients[1].do.tensor_digest() == digest_of(3, SMALL)


def test_an_evicted_sets_memory_is_back_when_its_last_tensor_goes(
    daemon: DaemonProcess, start: Start
) -> None:
    client = start()
    client.do.free_bytes()
    before = free_bytes()
    client.do.load("set", SIZE, 5)
    client.do.take_tensor()
    client.do.release()
    with daemon.connect() as other:
        other.evict("set")
    assert before - free_bytes() >= SIZE
    assert client.do.tensor_sum() == 5 * SIZE
    client.do.drop_tensor()
    assert before - free_bytes() < SIZE // 2


def test_a_set_sleeps_and_wakes(start: Start) -> None:
    client = start()
    client.do.free_bytes()
    client.do.load("set", SMALL, 5)
    client.do.release()
    for level in (1, 2):
        client.do.sleep("set", level)
        assert client.do.open("set", {}) == "reader"
        client.do.take_tensor()
        assert client.do.tensor_digest() == digest_of(5, SMALL)
        client.do.drop_tensor()
        client.do.release()


def test_clients_go_on_when_the_daemon_is_killed(
    daemon: DaemonProcess, start: Start, start_daemon: Callable[..., DaemonProcess]
) -> None:
    client = start()
    client.do.load("set", SMALL, 7)
    client.do.take_tensor()
    daemon.kill()
    assert client.do.tensor_digest() == digest_of(7, SMALL)
    start_daemon("--device", "cuda:0")
    other = start()
    assert other.do.load("set", SMALL, 7) == "writer"
    assert client.do.tensor_sum() == 7 * SMALL


def test_a_client_that_sees_only_other_gpus_is_told_so(
    daemon: DaemonProcess, runtime_dir: RuntimeDir
) -> None:
    blind = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with DeviceClient(runtime_dir, blind) as client:
        with pytest.raises(Refused) as refused:
            client.do.load("set", SMALL, 1)
        assert refused.value.name == "InvalidSetting"


# --- the pool


def test_leases_lie_in_one_window(start: Start) -> None:
    client = start()
    offsets = client.do.lease(4 << 20, 8)
    client.do.fill_leases([(offset, i + 1) for i, offset in enumerate(offsets)])
    bases = {address - offset for offset, address in client.do.lease_addresses()}
    assert len(bases) == 1
    for i, offset in enumerate(offsets):
        assert client.do.lease_digest(offset) == digest_of(i + 1, 4 << 20)


def test_a_lease_is_zero_at_first(start: Start) -> None:
    first = start()
    (offset,) = first.do.lease(SMALL)
    first.do.fill_leases([(offset, 255)])
    first.do.release_leases([offset])
    for client in (first, start()):
        for offset in client.do.lease(SMALL):
            assert client.do.lease_digest(offset) == digest_of(0, SMALL)


def test_a_block_is_read_by_who_looks_it_up(daemon: DaemonProcess, start: Start) -> None:
    first, second = start(), start()
    (offset,) = first.do.lease(2 << 20)
    first.do.fill_leases([(offset, 9)])
    digest = "ab" * 16
    assert first.do.put([(digest, offset)]) == [True]
    assert second.do.look_up([digest]) == [offset]
    assert second.do.block_digest(digest) == digest_of(9, 2 << 20)
    first.kill()
    assert second.do.block_digest(digest) == digest_of(9, 2 << 20)


def test_a_dead_clients_leases_are_the_devices_again(daemon: DaemonProcess, start: Start) -> None:
    client = start()
    client.do.free_bytes()
    before = free_bytes()
    client.do.lease(16 << 20, 32)
    assert before - free_bytes() >= 512 << 20
    client.kill()
    wait_until(lambda: free_bytes() >= before - SLACK, "512 MiB back")
    with daemon.connect() as other:
        assert other.statistics().used_bytes == 0
