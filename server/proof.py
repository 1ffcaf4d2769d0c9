"""The proof that instances hold one copy, put together: whom to ask, in which order.

Owns the questions to the allocator and to the kernel; `verify` judges the answers. Invariant: what
an instance maps counts as the weights only if the allocator says that it has handed out that very
object, for the set that the instance reads. Knows nothing of terminals, nor of how instances start.
"""

from collections.abc import Sequence

from allocator import RuntimeDir, connect
from allocator.messages import WeightSetStatistics
from server import process_memory
from server.handed_out import handed_out
from server.verify import MAX_PRIVATE_BYTES, Verdict, judge_all


class NothingToProve(Exception):
    """No weight set is known that these instances read. The message names what to do."""


def prove(
    runtime_dir: RuntimeDir,
    instances: Sequence[tuple[str, int]],
    max_private_bytes: int = MAX_PRIVATE_BYTES,
    *,
    digests: bool = False,
) -> Verdict:
    """Judge the instances (name, pid); with `digests` every byte of the weights, too. Raises
    NothingToProve, AllocatorError."""
    pids = {pid for _, pid in instances}
    with connect(runtime_dir, label="onecopy verify") as memory:
        used = [
            one for one in memory.statistics().weight_sets if pids.intersection(one.reader_pids)
        ]
        if not used:
            raise NothingToProve(
                "the allocator knows of no weight set that a ready instance reads. Either none is "
                "ready (`onecopy ps`), or the allocator was restarted after they attached: then "
                "`onecopy stop` and start again, to hold one copy"
            )
        served = used[0]
        mapped = handed_out(memory, [served.key])
        memories = [(name, process_memory.read(pid, mapped)) for name, pid in instances]
        verdict = judge_all(_segments(served), memories, max_private_bytes)
        problems = []
        if len(used) > 1:
            problems.append(f"the instances read {len(used)} weight sets, not one")
        if digests and (damaged := memory.damaged(served.key)):
            problems.append(f"{len(damaged)} tensors are not what was sealed, {damaged[0]} first")
    if not problems:
        return verdict
    return verdict.model_copy(update={"holds": False, "problems": verdict.problems + problems})


def _segments(weight_set: WeightSetStatistics) -> dict[str, int]:
    """Segment or file → bytes."""
    in_files = sum(num_bytes for _, num_bytes in weight_set.files)
    return {weight_set.segment: weight_set.num_bytes - in_files, **dict(weight_set.files)}
