"""One copy for several real processes: what each further one takes of the device, by the driver's
own figures, and what happens to one that writes where it may not."""

import os

from gpu.figures import process_bytes, used_bytes
from gpu.processes import allocator, clients, together
from gpu.stage import GB, MIB, NotRun, Stage, main

from allocator import Client
from allocator.backends import Mapping, for_handle
from allocator.backends.cuda_driver import find
from allocator.messages import Open, Sealed
from tests.allocator.backends.device_client import DeviceClient
from tests.allocator.processes import Refused
from tests.daemon_process import DaemonProcess

NUM_READERS = 4
SLACK_BYTES = 64 * MIB
"""What a process may take beside its context: small allocations of the driver's own."""


def run(stage: Stage) -> None:
    num_bytes = 32 * MIB if stage.small else GB // 2
    find(stage.device)
    before = used_bytes(stage.device)
    with allocator(stage) as daemon:
        with stage.part("the allocator makes no context"):
            with daemon.connect() as client:
                client.statistics()
            grown = used_bytes(stage.device) - before
            stage.claim("the allocator takes nothing of the device by itself", grown < SLACK_BYTES)
            stage.figure("allocator_bytes", grown)
        with clients(daemon, 1 + NUM_READERS) as (writer, *readers):
            with stage.part("one segment, many readers"):
                _many_readers(stage, writer, readers, num_bytes)
            with stage.part("the same bytes, not equal ones"):
                _same_bytes(stage, daemon, readers, num_bytes)
            with stage.part("a write to sealed weights"):
                _forbidden_write(stage, readers)


def _many_readers(
    stage: Stage, writer: DeviceClient, readers: list[DeviceClient], num_bytes: int
) -> None:
    with_contexts = used_bytes(stage.device)
    writer.do.load("set", num_bytes, 7)
    with_writer = used_bytes(stage.device)
    stage.claim(
        "the first client takes one copy",
        num_bytes <= with_writer - with_contexts < num_bytes + SLACK_BYTES,
        bytes=num_bytes,
        taken=with_writer - with_contexts,
    )
    taken = []
    for reader in readers:
        before = used_bytes(stage.device)
        reader.do.load("set", num_bytes, 0)
        taken.append(used_bytes(stage.device) - before)
    stage.claim(
        "each further client takes its context and nothing of the weights",
        all(one < SLACK_BYTES for one in taken),
        taken_beyond_its_context=taken,
    )
    stage.figure(
        "bytes_that_the_driver_counts_for_each",
        {
            "writer": process_bytes(stage.device, writer.pid),
            "readers": [process_bytes(stage.device, one.pid) for one in readers],
        },
    )
    digests = set(together([writer, *readers], lambda one: one.begin.digest()))
    stage.claim("all of them read the same bytes", len(digests) == 1)
    if stage.on_gpu:
        before = used_bytes(stage.device)
        together(readers, lambda one: one.begin.take_tensor())
        stage.figure("bytes_that_torch_takes_in_each", _each(stage, before))
        sums = set(together(readers, lambda one: one.begin.tensor_sum()))
        stage.claim("a kernel of each adds them up to the same", sums == {7 * num_bytes})


def _each(stage: Stage, before: int) -> int:
    return (used_bytes(stage.device) - before) // NUM_READERS


def _same_bytes(
    stage: Stage, daemon: DaemonProcess, readers: list[DeviceClient], num_bytes: int
) -> None:
    """What the stage's own process writes behind everybody's back, all others see."""
    before = readers[0].do.digest()
    with daemon.connect() as memory:
        mapping = _writable(memory, "set")
        mapping.write(num_bytes // 2, b"\x08")
        mapping.close()
    seen = set(together(readers, lambda one: one.begin.digest()))
    stage.claim(
        "one byte that another process changes is changed for all readers",
        len(seen) == 1 and before not in seen,
    )


def _writable(memory: Client, key: str) -> Mapping:
    """A sealed set, mapped as no client's library would."""
    answer, (descriptor,) = memory._connection.exchange(Open(key=key, fingerprint={}, wait_ms=0))
    assert isinstance(answer, Sealed)
    try:
        return for_handle(answer.handle).map(answer.handle, writable=True, descriptor=descriptor)
    finally:
        os.close(descriptor)


def _forbidden_write(stage: Stage, readers: list[DeviceClient]) -> None:
    if not stage.on_gpu:
        raise NotRun("no GPU for torch")
    culprit, *others = readers
    said: list[str] = []
    for try_it in (culprit.do.write_to_tensor, culprit.do.tensor_sum):
        try:
            try_it()
        except Refused as refused:
            said.append(str(refused)[:300])
    stage.figure("what_the_fault_looks_like", said)
    stage.claim("a write through a reader's mapping is refused by the device", len(said) > 0)
    stage.claim("and the process that tried computes nothing more", len(said) == 2)
    sums = {one.do.tensor_sum() for one in others}
    stage.claim("all others go on with the weights as they were", len(sums) == 1)
    stage.claim("and so does one that comes now", _newcomer_is_well(others, sums))


def _newcomer_is_well(others: list[DeviceClient], sums: set[int]) -> bool:
    others[0].do.release()
    others[0].do.drop_tensor()
    others[0].do.load("set", 0, 0)
    others[0].do.take_tensor()
    return others[0].do.tensor_sum() in sums


if __name__ == "__main__":
    main(run)
