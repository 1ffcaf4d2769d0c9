"""SIGKILL of a reader, a writer and the daemon: what is freed, what survives, who can adopt."""

from gpu.figures import settles, used_bytes
from gpu.processes import allocator, clients
from gpu.stage import GB, MIB, Stage, main

from tests.allocator.backends.device_client import DeviceClient
from tests.daemon_process import DaemonProcess

SLACK_BYTES = 64 * MIB


def run(stage: Stage) -> None:
    num_bytes = 32 * MIB if stage.small else GB
    with allocator(stage) as daemon:
        with stage.part("a reader"), clients(daemon, 2) as (writer, reader):
            _kill_reader(stage, writer, reader, num_bytes)
        with stage.part("a writer"), clients(daemon, 2) as (writer, waiter):
            _kill_writer(stage, daemon, writer, waiter, num_bytes)
        with stage.part("a client that leases"), clients(daemon, 1) as (client,):
            _kill_lessee(stage, daemon, client)
        with stage.part("the daemon"), clients(daemon, 2) as pair:
            _kill_daemon(stage, daemon, pair, num_bytes)


def _settled_at_most(stage: Stage, limit: int) -> int:
    return settles(lambda: used_bytes(stage.device), lambda used: used <= limit)


def _kill_reader(stage: Stage, writer: DeviceClient, reader: DeviceClient, num_bytes: int) -> None:
    before = used_bytes(stage.device)
    writer.do.load("a", num_bytes, 3)
    reader.do.load("a", num_bytes, 0)
    digest = reader.do.digest()
    reader.kill()
    after = _settled_at_most(stage, before + num_bytes + SLACK_BYTES)
    stage.claim("the others keep the weights", writer.do.digest() == digest)
    stage.figure("freed_by_the_reader_s_end_bytes", before + num_bytes - after)
    writer.do.release()
    writer.do.evict("a")


def _kill_writer(
    stage: Stage, daemon: DaemonProcess, writer: DeviceClient, waiter: DeviceClient, num_bytes: int
) -> None:
    before = used_bytes(stage.device)
    writer.do.open("b", {})
    writer.do.reserve(num_bytes)
    reserved = used_bytes(stage.device)
    stage.claim("what is to be written is taken at once", reserved - before >= num_bytes)
    waiter.begin.open("b", {})
    writer.kill()
    stage.claim("who waits is elected", waiter.receive() == "writer")
    after = _settled_at_most(stage, before + SLACK_BYTES)
    stage.claim(
        "half written weights are freed with their writer",
        after <= before + SLACK_BYTES,
        left_bytes=after - before,
    )
    waiter.do.load_as_elected(num_bytes, 5)
    with daemon.connect() as looking:
        looking.check_integrity()
    waiter.do.release()
    waiter.do.evict("b")


def _kill_lessee(stage: Stage, daemon: DaemonProcess, client: DeviceClient) -> None:
    before = used_bytes(stage.device)
    client.do.lease(4 * MIB, 8)
    taken = used_bytes(stage.device) - before
    stage.claim("leases take the device's memory as they are made", taken >= 32 * MIB)
    client.kill()
    after = _settled_at_most(stage, before)
    stage.claim("a dead client's leases are the device's again", after <= before + 8 * MIB)
    with daemon.connect() as looking:
        stage.claim("and the allocator knows it", looking.statistics().pool.leased_bytes == 0)


def _kill_daemon(
    stage: Stage, daemon: DaemonProcess, pair: list[DeviceClient], num_bytes: int
) -> None:
    first, second = pair
    first.do.load("c", num_bytes, 7)
    digest = first.do.digest()
    used = used_bytes(stage.device)
    daemon.kill()
    stage.claim("clients go on with what they map", first.do.digest() == digest)
    stage.figure("freed_by_the_daemon_s_end_bytes", used - used_bytes(stage.device))
    with allocator(stage) as successor:
        with successor.connect() as looking:
            known = [one.key for one in looking.statistics().weight_sets]
        stage.figure("sets_that_a_successor_adopts", known)
        with clients(successor, 1) as (other,):
            stage.claim(
                "a successor can't adopt a GPU's memory: who comes next loads anew",
                other.do.load("c", num_bytes, 7) == "writer",
            )
            stage.claim("beside the old copy", used_bytes(stage.device) >= used + num_bytes)
        stage.claim("which stays intact", first.do.digest() == digest)
        before = used_bytes(stage.device)
        first.kill()
        second.kill()
        after = settles(lambda: used_bytes(stage.device), lambda now: now <= before - num_bytes)
        stage.claim("and goes with its last client", before - after >= num_bytes)


if __name__ == "__main__":
    main(run)
