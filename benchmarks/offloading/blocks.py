"""The blocks of `overlap`, beside diffusers' group offloading of the same, each within a control
group that leaves it no room but for its program and a few blocks.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from _control_group import MemoryGroup
from _machine import spread
from _processes import environment
from offloading.overlap import Size, num_outputs_for
from offloading.serving import Watch, group_or_none

from workers.placement.blocks import offload

_DEPTH = 2
_ROOM_BLOCKS = _DEPTH + 1
_PROGRAM = Path(__file__).parents[1] / "_blocks_program.py"
_PEER = Path(__file__).parents[1] / "peers" / "blocks_peer.py"
_OURS = "onecopy"


@dataclass
class _Running:
    requests: IO[str]
    answers: IO[str]
    pid: int
    group: MemoryGroup | None
    pass_s: list[float]
    most_resident: int = 0

    def turn(self, passes: int) -> None:
        """Raises RuntimeError where it ended."""
        with Watch(self.group, self.pid) as watch:
            self.requests.write("\n")
            self.requests.flush()
            line = self.answers.readline()
        if not line:
            raise RuntimeError("it ended; its log says why")
        self.pass_s.append(float(line) / passes)
        self.most_resident = max(self.most_resident, watch.most_resident_bytes)


def blocks_beside_peers(
    size: Size, python: Path | None, rounds: int, folder: Path
) -> dict[str, Any]:
    """Seconds a pass, in turns, where a block takes as long to compute as to read."""
    blocks = size.blocks()
    probe = offload(blocks, depth=0, directory=folder)
    numbers = [size.num_blocks, size.width, num_outputs_for(size, blocks, probe, 1.0, size.width)]
    numbers.append(size.passes)
    probe.close()
    ours = [sys.executable, "-P", str(_PROGRAM), str(folder), *map(str, [*numbers, _DEPTH])]
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running = {_OURS: stack.enter_context(_started(_OURS, ours, size, folder, own=True))}
        for name, stream in (("group_offloading", 0), ("group_offloading_with_streams", 1)):
            if python is None:
                absent[name] = "not measured: --peer accelerate=PYTHON was not given"
                continue
            own = folder / name
            own.mkdir()
            command = [str(python), str(_PEER), str(own), *map(str, [*numbers, stream])]
            try:
                running[name] = stack.enter_context(
                    _started(name, command, size, folder, own=False)
                )
            except (RuntimeError, OSError) as error:
                absent[name] = str(error)
        for _ in range(rounds):
            for one in running.values():
                one.turn(size.passes)
        figures = {
            name: {
                "pass_s": spread(one.pass_s, 3),
                "most_resident_bytes": one.most_resident,
                "most_charged_bytes": one.group.most_bytes if one.group else None,
            }
            for name, one in running.items()
        }
    of_ours = running[_OURS].pass_s
    for name, one in running.items():
        pairs = zip(one.pass_s, of_ours, strict=True)
        figures[name]["ours_over"] = spread([theirs / own_s for theirs, own_s in pairs], 2)
    return {
        "block_bytes": size.block_bytes,
        "blocks": size.num_blocks,
        "depth": _DEPTH,
        "ours": figures.pop(_OURS),
        "peers": figures,
        "absent": absent,
    }


@contextlib.contextmanager
def _started(
    name: str, command: Sequence[str], size: Size, folder: Path, *, own: bool
) -> Iterator[_Running]:
    """Once its blocks are in files, its group is limited to what it then holds and a few blocks.
    Raises RuntimeError with the end of its log where it doesn't come that far."""
    log = folder / f"{name}.log"
    with group_or_none(1 << 40, name) as group, log.open("w") as errors:
        found = group if isinstance(group, MemoryGroup) else None
        process = subprocess.Popen(
            [*(found.enter if found else ()), *command],
            env=environment(own=own),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not process.stdout.readline().startswith(json.dumps({"ready": True})):
                process.wait(timeout=60)
                raise RuntimeError(log.read_text(errors="replace").strip().splitlines()[-1])
            if found:
                room = _ROOM_BLOCKS * size.block_bytes + (64 << 20)
                found.limit(found.memory[0] + room)
            yield _Running(process.stdin, process.stdout, process.pid, found, [])
        finally:
            process.kill()
            process.wait()
