"""The proof that instances hold one copy, put together: whom to ask, in which order.

Owns the questions to the allocator, and to the kernel or a GPU's driver; `verify` and
`device_verify` judge the answers. Invariant: what an instance maps counts as the weights only if
the allocator says that it has handed out that very object, for the set that the instance reads.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from allocator import Client, RuntimeDir, connect, device_usage
from allocator.messages import Statistics, WeightSetStatistics
from server.machine import device_verify, process_memory
from server.machine.device_verify import DeviceVerdict, judge_device
from server.machine.handed_out import handed_out
from server.machine.verify import MAX_PRIVATE_BYTES, NO_RANKS, Verdict, judge_all

_LOOKS: Final = 50
_BETWEEN_LOOKS_S: Final = 0.1


class NothingToProve(Exception):
    """No weight set is known that these instances read. The message names what to do."""


def prove(
    runtime_dir: RuntimeDir,
    instances: Sequence[tuple[str, int]],
    max_private_bytes: int | None = None,
    *,
    digests: bool = False,
    ranks: Mapping[int, int] = NO_RANKS,
) -> Verdict | DeviceVerdict:
    """Judge the instances (name, pid), each of which may have `max_private_bytes` for itself, by
    default what fits the device; with `digests` every byte of the weights, too. `ranks` as in
    `judge`. Raises NothingToProve, AllocatorError."""
    pids = {pid for _, pid in instances}
    with connect(runtime_dir, label="onecopy verify") as memory:
        statistics = memory.statistics()
        used = [one for one in statistics.weight_sets if pids.intersection(one.reader_pids)]
        if not used:
            raise NothingToProve(
                "the allocator knows of no weight set that a ready instance reads. Either none is "
                "ready (`onecopy ps`), or the allocator was restarted after they attached: then "
                "`onecopy stop` and start again, to hold one copy"
            )
        served = used[0]
        verdict: Verdict | DeviceVerdict
        if statistics.device == "host":
            verdict = _on_host(memory, served, instances, max_private_bytes, ranks)
        else:
            verdict = _on_gpu(runtime_dir, statistics, served, instances, max_private_bytes)
        problems = []
        if len(used) > 1:
            problems.append(f"the instances read {len(used)} weight sets, not one")
        if digests and (damaged := memory.damaged(served.key)):
            problems.append(f"{len(damaged)} tensors are not what was sealed, {damaged[0]} first")
    if not problems:
        return verdict
    return verdict.model_copy(update={"holds": False, "problems": verdict.problems + problems})


def _on_host(
    memory: Client,
    served: WeightSetStatistics,
    instances: Sequence[tuple[str, int]],
    max_private_bytes: int | None,
    ranks: Mapping[int, int],
) -> Verdict:
    mapped = handed_out(memory, [served.key])

    def look() -> Verdict:
        memories = [(name, process_memory.read(pid, mapped)) for name, pid in instances]
        most = max_private_bytes or MAX_PRIVATE_BYTES
        return judge_all(_segments(served), memories, most, ranks)

    return settled(look, lambda: time.sleep(_BETWEEN_LOOKS_S))


def settled(look: Callable[[], Verdict], wait: Callable[[], None]) -> Verdict:
    """What `look` finds. One process is read after the other, and each one's share of the weights
    falls while another begins to touch them: so what does not hold is looked at again, as long as
    the shares change."""
    verdict = look()
    for _ in range(_LOOKS):
        if verdict.holds:
            break
        wait()
        earlier, verdict = verdict, look()
        if _shares(earlier) == _shares(verdict):
            break
    return verdict


def _shares(verdict: Verdict) -> list[tuple[int, int]]:
    return [(one.pid, one.weights_pss_bytes) for one in verdict.instances]


def _on_gpu(
    runtime_dir: RuntimeDir,
    statistics: Statistics,
    served: WeightSetStatistics,
    instances: Sequence[tuple[str, int]],
    max_private_bytes: int | None,
) -> DeviceVerdict:
    owner = runtime_dir.owner("allocator")
    return judge_device(
        statistics.device,
        device_usage(statistics.device),
        weights_bytes=served.num_bytes,
        allocator_bytes=statistics.used_bytes,
        instances=instances,
        readers=served.reader_pids,
        clients={one.pid for one in statistics.sessions} - {os.getpid()},
        allocator_pid=None if owner is None else owner.pid,
        max_private_bytes=max_private_bytes or device_verify.MAX_PRIVATE_BYTES,
    )


def _segments(weight_set: WeightSetStatistics) -> dict[str, int]:
    """Segment or file → bytes."""
    in_files = sum(num_bytes for _, num_bytes in weight_set.files)
    return {weight_set.segment: weight_set.num_bytes - in_files, **dict(weight_set.files)}
