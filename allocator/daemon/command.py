"""The daemon's command: its options, and the process that it makes of itself.

Owns the order of a daemon's life. Invariant: whoever started it learns on `--ready-fd` when clients
can connect, or one line on stderr says why there is none.
"""

import argparse
import logging
import os
import resource
import sys

from allocator.backends.limits import check_limits
from allocator.daemon.daemon import Daemon
from allocator.daemon.settings import OPTIONS, DaemonSettings
from allocator.errors import AllocatorError
from allocator.runtime_dir import RuntimeDir

log = logging.getLogger("onecopy.allocator")


def main() -> int:
    """Exit status 0 after a signal, 1 with a one-line message where it can't start."""
    parser = argparse.ArgumentParser(
        prog="onecopy allocator",
        description="The daemon alone, as the server starts it where none runs.",
    )
    parser.add_argument("--runtime-dir")
    for option in OPTIONS:
        parser.add_argument(
            option.name, action="append", default=[], metavar=option.metavar, help=option.help
        )
    parser.add_argument("--ready-fd", type=int, help="gets one byte once clients can connect")
    parser.add_argument("--quiet", action="store_true", help="log warnings only")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.WARNING if arguments.quiet else logging.INFO,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        settings = DaemonSettings.parse({o.field: getattr(arguments, o.field) for o in OPTIONS})
        run(RuntimeDir.open(arguments.runtime_dir), settings, ready_fd=arguments.ready_fd)
    except (AllocatorError, OSError) as error:  # of the machine itself: /proc, descriptors
        print(f"onecopy allocator: {error}", file=sys.stderr)
        return 1
    return 0


def run(
    runtime_dir: RuntimeDir,
    settings: DaemonSettings | None = None,
    *,
    ready_fd: int | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; `ready_fd` gets one byte, and is closed, once clients can
    connect. Raises AlreadyRunning, InvalidSetting."""
    os.umask(0o077)
    if settings is None or "host" in settings.devices:
        check_limits(None if settings is None else settings.memory_limit)
    # A lifeline each client, and for a moment a descriptor for what it maps.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    daemon = Daemon(runtime_dir, settings)
    daemon.stop_on_signals()
    log.info("allocator ready in %s", runtime_dir.path)
    if ready_fd is not None:
        os.write(ready_fd, b"\n")
        os.close(ready_fd)
    daemon.serve()
    log.info("allocator stopped")
