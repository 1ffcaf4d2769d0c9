"""A model served where memory is scarce: is every request answered, and is nobody ended for it?

Twice: in a control group with a limit of `--group` bytes, and on a /dev/shm of `--shm` bytes in a
mount namespace of the server's own. onecopy is given no limit: it has to find out by itself.
`--requests` requests are asked at the same time, each of `--prompt` tokens in, all different, and
`--answer` out, which together want several times the memory that there is. Needs root.

An answer counts where it has all its tokens. `oom_kills` is the kernel's own count of the group;
`instances_replaced` tells of those that ended by anything.

    python benchmarks/small_machine.py [--model demo] [--instances 2] [--serve=--OPTION ...]
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _client import Stream, completion, random_prompt, stream
from _control_group import memory_group
from _machine import describe_machine
from _processes import Load, end_on_sigterm, tree
from _server import running_server, server_status, wait_ready

_MOUNT = 'mount -t tmpfs -o "size=$0" tmpfs /dev/shm && exec "$@"'
_LOOK_S = 0.5


def main() -> None:
    """Print one JSON document; exit 1 where a request was not answered or a process was ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION")
    parser.add_argument("--group", type=int, default=1 << 30, help="bytes")
    parser.add_argument("--shm", type=int, default=340 << 20, help="bytes")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=1400, help="tokens")
    parser.add_argument("--answer", type=int, default=100, help="tokens")
    arguments = parser.parse_args()
    end_on_sigterm()
    places: dict[str, dict[str, Any]] = {}
    with memory_group(arguments.group) as group:
        places["control_group"] = _measured(arguments, group.enter) | {
            "limit_bytes": arguments.group,
            "most_bytes": group.most_bytes,
            "oom_kills": group.num_oom_kills,
        }
    mount = ["unshare", "-m", "sh", "-c", _MOUNT, str(arguments.shm)]
    places["shm"] = _measured(arguments, mount) | {"limit_bytes": arguments.shm}
    document = {
        "benchmark": "small_machine",
        **describe_machine(),
        "model": arguments.model,
        "serve_options": arguments.serve,
        "instances": arguments.instances,
        "requests": arguments.requests,
        "prompt_tokens": arguments.prompt,
        "answer_tokens": arguments.answer,
        **places,
    }
    print(json.dumps(document, indent=2))
    sys.exit(not all(_is_good(one, arguments.requests) for one in places.values()))


def _is_good(place: dict[str, Any], num_requests: int) -> bool:
    ended = place["instances_replaced"] + place.get("oom_kills", 0)
    return bool(place["answered"] == num_requests and not ended)


def _measured(arguments: argparse.Namespace, within: Sequence[str]) -> dict[str, Any]:
    """One server that a shell has put into its place by `within`."""
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder:
        runtime_dir = Path(folder) / "run"
        with running_server(
            arguments.model,
            runtime_dir,
            num_instances=arguments.instances,
            options=arguments.serve,
            within=within,
        ):
            status = wait_ready(runtime_dir, arguments.instances)
            load = Load(status["pid"])
            found = asyncio.run(_ask_all(arguments, status))
            shares = {name: round(share, 4) for name, share in load.shares().items()}
            pids = {one["pid"] for one in status["instances"]}
            now = {one["pid"] for one in server_status(runtime_dir)["instances"]}
            return found | {"instances_replaced": len(pids - now), **shares}


async def _ask_all(arguments: argparse.Namespace, status: dict[str, Any]) -> dict[str, Any]:
    rng = random.Random(1)
    url = f"{status['url']}/v1/completions"
    begun = time.perf_counter()
    asked = [
        asyncio.create_task(
            stream(
                url,
                completion(status["model"], random_prompt(rng, arguments.prompt), arguments.answer),
            )
        )
        for _ in range(arguments.requests)
    ]
    most_private = 0
    while not all(one.done() for one in asked):
        await asyncio.wait(asked, timeout=_LOOK_S)
        most_private = max(most_private, _anonymous_bytes(status["pid"]))
    wall_s = time.perf_counter() - begun
    answers = [one.exception() or one.result() for one in asked]
    whole = [
        one for one in answers if isinstance(one, Stream) and one.num_tokens == arguments.answer
    ]
    return {
        "answered": len(whole),
        "errors": sorted({str(one)[:400] for one in answers if isinstance(one, BaseException)}),
        "wall_s": round(wall_s, 1),
        "tok_per_s": round(sum(one.num_tokens for one in whole) / wall_s, 1),
        "last_first_token_s": round(max((one.ttft_ms for one in whole), default=0.0) / 1000, 1),
        "most_private_bytes": most_private,
    }


def _anonymous_bytes(pid: int) -> int:
    """Of the server and all that it has started."""
    found = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith("Private_Dirty:"):
                    found += int(line.split()[1]) * 1024
    return found


if __name__ == "__main__":
    main()
