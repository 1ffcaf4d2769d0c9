"""How long an instance that is killed is missed.

SIGKILLs one of two instances, several times, and takes the time until the server's admin API shows
another one ready in its place. There is no peer: who runs processes without a supervisor has none.

    python benchmarks/instance_replacement.py [--model demo] [--kills 7]
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path

from _machine import describe_machine, spread, steal_ticks
from _server import running_server

from allocator import RuntimeDir
from server.admin.client import AdminClient


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kills", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        runtime_dir = Path(folder) / "run"
        steal = steal_ticks()
        with running_server(arguments.model, runtime_dir, num_instances=2):
            admin = AdminClient(RuntimeDir.open(runtime_dir))
            times = [_kill_one(admin) for _ in range(arguments.kills)]
        document = {
            "benchmark": "instance_replacement",
            **describe_machine(),
            "steal_ticks": steal_ticks() - steal,
            "model": arguments.model,
            "killed_to_replacement_ready_ms": spread(times),
        }
        print(json.dumps(document, indent=2))


def _kill_one(admin: AdminClient) -> float:
    before = {one.pid for one in admin.status().instances}
    victim = admin.status().instances[0].pid
    assert victim is not None
    started = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while time.monotonic() < started + 60:
        instances = admin.status().instances
        ready = [one.pid for one in instances if one.state == "ready"]
        if victim not in ready and len(ready) == 2 and set(ready) != before:
            return (time.monotonic() - started) * 1000
    raise TimeoutError("the killed instance was not replaced")


if __name__ == "__main__":
    main()
