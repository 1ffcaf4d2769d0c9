"""Prometheus metrics: what the instances say of themselves with every step.

Owns names and labels. The counters of an instance begin anew with its replacement, as those of any
restarted process do. Knows nothing of the allocator, whose own figures are in `metrics.py`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.fleet.instance import Instance
from workers.messages import StepOutput

_PREFIX: Final = "onecopy_instance_"
_Figure = Callable[[StepOutput], float]
_GAUGES: Final[Sequence[tuple[str, str, _Figure]]] = (
    ("requests_running", "Sequences that hold KV memory.", lambda s: s.num_running),
    ("requests_waiting", "Sequences that wait for their turn.", lambda s: s.num_waiting),
    ("kv_bytes", "KV blocks that are held, shared ones too.", lambda s: s.kv_bytes),
)
_COUNTERS: Final[Sequence[tuple[str, str, _Figure]]] = (
    ("preemptions", "Sequences that gave way for want of KV memory.", lambda s: s.num_preempted),
    ("prefix_cache_queries", "Prompt tokens that were looked up.", lambda s: s.prompt_tokens),
    ("prefix_cache_hits", "Prompt tokens that were found.", lambda s: s.cached_tokens),
    ("draft_tokens", "Tokens that were computed on trial.", lambda s: s.drafted_tokens),
    ("draft_tokens_accepted", "Those of them that were right.", lambda s: s.accepted_tokens),
)


class InstanceMetrics(Collector):
    """What the instances said last, in the moment of a scrape."""

    def __init__(self, instances: Callable[[], Sequence[Instance]]):
        self._instances = instances

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with a sample for each instance that has taken a step."""
        loads = [(one.name, one.load) for one in self._instances() if one.load is not None]
        for name, text, figure in _GAUGES:
            gauge = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=["instance"])
            for instance, load in loads:
                gauge.add_metric([instance], figure(load))
            yield gauge
        for name, text, figure in _COUNTERS:
            counter = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=["instance"])
            for instance, load in loads:
                counter.add_metric([instance], figure(load))
            yield counter
        unresponsive = GaugeMetricFamily(
            f"{_PREFIX}unresponsive_seconds",
            "For how long it has shown no sign of life, though it should; 0 where it does.",
            labels=["instance"],
        )
        step = GaugeMetricFamily(
            f"{_PREFIX}step_seconds",
            "How long the present step has taken; 0 between steps.",
            labels=["instance"],
        )
        for one in self._instances():
            beat = one.leash.look()
            unresponsive.add_metric([one.name], _age(one.unresponsive_since))
            step.add_metric([one.name], _age(beat.since if beat is not None else None))
        yield unresponsive
        yield step


def _age(since: float | None) -> float:
    """Seconds, of a moment of CLOCK_MONOTONIC."""
    return 0.0 if since is None else time.monotonic() - since
