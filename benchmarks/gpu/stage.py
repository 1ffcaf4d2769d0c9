"""A stage's own side: what it found, told line by line.

Owns the lines that a stage's process writes to its standard output, one JSON object each: a claim
that holds or not, a figure, a part that failed or did not run. Invariant: what was told is told for
good; a stage that is killed later loses nothing of it. The other side is `report`.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

MIB = 1 << 20
GB = 1_000_000_000


class NotRun(Exception):
    """A part can't run here. The message says why."""


@dataclass(frozen=True)
class Stage:
    """What a stage is told, and tells."""

    device: str
    """As `--device` takes it: "cuda:0", or "host" in a rehearsal."""
    small: bool
    """A rehearsal: sizes that show that the program works, and nothing else."""
    folder: Path
    """For files; gone afterwards."""
    out: TextIO

    @property
    def on_gpu(self) -> bool:
        """Whether torch can compute where the memory is. Not so on a simulated driver."""
        return self.device != "host" and not self.small

    def fitting(self, num_bytes: int) -> int:
        """No more than a quarter of what host memory has room for, in whole MiB: a machine may
        show little of its memory before it is used."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(one.split()[1]) * 1024 for one in lines if "MemAvailable" in one)
        status = os.statvfs("/dev/shm")
        room = min(available, status.f_bavail * status.f_frsize) // 4
        return max(MIB, min(num_bytes, room) // MIB * MIB)

    def figure(self, name: str, value: Any) -> None:
        """A measurement; its unit ends the name."""
        self._tell({"figure": name, "value": value})

    def claim(self, text: str, holds: bool, **figures: Any) -> None:
        """Something that should be so, and whether it is."""
        self._tell({"claim": text, "holds": bool(holds), "figures": figures})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails in here fails alone: the stage goes on."""
        started = time.monotonic()
        try:
            yield
        except NotRun as why:
            self._tell({"part": name, "not_run": str(why)})
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            traceback.print_exc()
            self._tell({"part": name, "failed": f"{type(error).__name__}: {error}"[:2000]})
            return
        self._tell({"part": name, "seconds": round(time.monotonic() - started, 2)})

    def _tell(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self.out, flush=True)


def main(run: Callable[[Stage], None]) -> None:
    """Run one stage as a program; it may read further arguments itself. Whatever else prints goes
    to standard error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true")
    arguments, _ = parser.parse_known_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory(prefix="onecopy-gpu-") as folder:
        run(Stage(arguments.device, arguments.small, Path(folder), out))
