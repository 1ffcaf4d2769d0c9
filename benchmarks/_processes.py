"""Processes of a benchmark: trees that are stopped while others run, and what they hold."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NUM_THREADS = 2


def environment(*, own: bool) -> dict[str, str]:
    """As a shell would have it, with as many OpenMP threads for everyone, and no other setting of
    OpenMP's; PYTHONPATH for our own processes only."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    if not own:
        variables.pop("PYTHONPATH", None)
    return variables | {"OMP_NUM_THREADS": str(NUM_THREADS), "HF_HUB_OFFLINE": "1"}


def tree(pid: int) -> list[int]:
    """The process and all that descend from it, parents first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def pause(pid: int) -> None:
    """Stop the whole tree: an idle engine that spins or polls would take what is measured."""
    _signal(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    """Undo `pause`."""
    _signal(pid, signal.SIGCONT)


def end(process: "subprocess.Popen[str]") -> None:
    """Ask the tree to end, then make it."""
    pids = tree(process.pid)
    _signal_all(pids, signal.SIGCONT)
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        _signal_all(pids, signal.SIGKILL)
        process.wait()


def private_bytes(pid: int) -> int:
    """What only this process maps, clean or dirty (proc(5), smaps_rollup)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Private_")
    )


class Load:
    """Who had the processors, as shares of all their time since this was made."""

    def __init__(self, pid: int):
        self._pid = pid
        self._started = time.perf_counter()
        self._ours = self._own_ticks()
        self._busy, self._steal = _machine_ticks()

    def shares(self) -> dict[str, float]:
        """`steal`: the host; `others`: processes here that are neither ours nor of `pid`'s tree."""
        busy, steal = _machine_ticks()
        wall = time.perf_counter() - self._started
        ticks = wall * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        others = busy - self._busy - (self._own_ticks() - self._ours)
        return {"steal": (steal - self._steal) / ticks, "others": max(0.0, others / ticks)}

    def _own_ticks(self) -> int:
        return sum(_ticks(pid) for pid in {os.getpid(), *tree(self._pid)})


def _machine_ticks() -> tuple[int, int]:
    """(busy, stolen) since boot (proc(5), stat)."""
    fields = [int(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return user + nice + system + irq + softirq, steal


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[11]) + int(fields[12])


def end_on_sigterm() -> None:
    """So that what a benchmark started ends with it however it is stopped."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread, whatever it waits for."""

    def raise_it(_number: int, _frame: object) -> None:
        raise TimeoutError(f"no end within {seconds:.0f} s")

    signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _signal(pid: int, number: signal.Signals) -> None:
    _signal_all(tree(pid), number)


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for one in pids:
        try:
            os.kill(one, number)
        except ProcessLookupError:
            continue
