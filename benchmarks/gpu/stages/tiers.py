"""Sleep and wake: out of the device's memory and back, at which speed, byte for byte."""

import time

from gpu.figures import settles, used_bytes
from gpu.processes import allocator, clients
from gpu.stage import GB, MIB, Stage, main

from tests.allocator.backends.device_client import DeviceClient


def run(stage: Stage) -> None:
    num_bytes = 32 * MIB if stage.small else stage.fitting(2 * GB)
    stage.figure("set_bytes", num_bytes)
    with allocator(stage) as daemon, clients(daemon, 1) as (client,):
        client.do.load("set", num_bytes, 5)
        digest = client.do.digest()
        for level, where in ((1, "host memory"), (2, "disk")):
            with stage.part(f"to {where} and back"):
                _there_and_back(stage, client, num_bytes, level, digest)


def _there_and_back(
    stage: Stage, client: DeviceClient, num_bytes: int, level: int, digest: str
) -> None:
    client.do.release()
    before = used_bytes(stage.device)
    begun = time.perf_counter()
    client.do.sleep("set", level)
    slept = time.perf_counter() - begun
    after = settles(lambda: used_bytes(stage.device), lambda now: now <= before - num_bytes)
    stage.claim("a sleeping set takes nothing of the device", before - after >= num_bytes)
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        client.do.open("set", {})
        times.append(time.perf_counter() - begun)
        if len(times) == 1:
            stage.claim("it wakes byte for byte", client.do.digest() == digest)
            client.do.release()
    stage.figure(f"level_{level}_sleep_gb_per_s", round(num_bytes / slept / 1e9, 2))
    stage.figure(f"level_{level}_wake_gb_per_s", round(num_bytes / times[0] / 1e9, 2))
    stage.figure(f"level_{level}_open_once_awake_ms", round(times[1] * 1000, 2))


if __name__ == "__main__":
    main(run)
