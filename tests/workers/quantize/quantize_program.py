"""Quantizes in a process of its own, for what ends it or bounds it: SRC DST and a JSON object of
what else there is to say. Prints how far the most memory it had in use was above that before."""

import json
import resource
import sys
from pathlib import Path

from workers.quantize.quantize import quantize
from workers.quantize.request import Request


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main() -> None:
    source, destination, said = sys.argv[1:]
    options = json.loads(said)
    if (most := options.pop("most_file_bytes", None)) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    quantize(Request(Path(source), Path(destination), **options), lambda _progress: None)
    print(memory("VmHWM") - before)


main()
