"""`python -m allocator`: the daemon alone, as the server starts it where none runs."""

import argparse
import logging
import sys

from allocator.daemon import run
from allocator.errors import AllocatorError
from allocator.runtime_dir import RuntimeDir


def main() -> int:
    """Exit status 0 after a signal, 1 with a one-line message where it can't start."""
    parser = argparse.ArgumentParser(prog="python -m allocator", description=__doc__)
    parser.add_argument("--runtime-dir")
    parser.add_argument("--memory-limit", type=int, metavar="BYTES")
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
            memory_limit=arguments.memory_limit,
            ready_fd=arguments.ready_fd,
        )
    except AllocatorError as error:
        print(f"onecopy allocator: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
