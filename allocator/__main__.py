"""`python -m allocator`: the daemon alone, as the server starts it where none runs."""

import argparse
import logging
import sys
from pathlib import Path

from allocator.daemon.daemon import run
from allocator.daemon.settings import (
    DaemonSettings,
    default_image_folder,
    parse_bytes,
    parse_quotas,
)
from allocator.errors import AllocatorError
from allocator.runtime_dir import RuntimeDir


def main() -> int:
    """Exit status 0 after a signal, 1 with a one-line message where it can't start."""
    parser = argparse.ArgumentParser(prog="onecopy allocator", description=__doc__)
    parser.add_argument("--runtime-dir")
    parser.add_argument("--device", action="append", help="host, cuda:N or cuda:GPU-UUID")
    parser.add_argument("--memory-limit", metavar="SIZE", help="of each device, as 800M or 20GiB")
    parser.add_argument("--host-tier-limit", metavar="SIZE", help="of what sleeps in host memory")
    parser.add_argument(
        "--prefix-cache-limit", metavar="SIZE", help="of sealed KV blocks that nobody maps"
    )
    parser.add_argument("--image-dir", type=Path, help="where weight sets sleep on disk")
    parser.add_argument("--placement", default="", help="of host memory: huge, interleave:0+1 ...")
    parser.add_argument("--quota", action="append", default=[], metavar="KIND:NAME=SIZE")
    parser.add_argument("--ready-fd", type=int, help="gets one byte once clients can connect")
    parser.add_argument("--quiet", action="store_true", help="log warnings only")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.WARNING if arguments.quiet else logging.INFO,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        run(
            RuntimeDir.open(arguments.runtime_dir),
            DaemonSettings(
                devices=tuple(arguments.device or ["host"]),
                memory_limit=_size(arguments.memory_limit),
                host_tier_limit=_size(arguments.host_tier_limit),
                prefix_cache_limit=_size(arguments.prefix_cache_limit),
                image_folder=(arguments.image_dir or default_image_folder()).absolute(),
                placement=arguments.placement,
                quotas=parse_quotas(arguments.quota),
            ),
            ready_fd=arguments.ready_fd,
        )
    except (AllocatorError, OSError) as error:  # of the machine itself: /proc, descriptors
        print(f"onecopy allocator: {error}", file=sys.stderr)
        return 1
    return 0


def _size(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


if __name__ == "__main__":
    sys.exit(main())
