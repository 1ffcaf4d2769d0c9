"""Prometheus metrics: the allocator's figures, as a scrape sees them.

Owns names and labels. Invariant: a scrape that can't reach the allocator still answers, and says
that it is down. Knows nothing of HTTP.
"""

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from allocator import AllocatorError, RuntimeDir, Statistics, connect

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "onecopy_allocator_"
_STATES: Final = ("loading", "sealed", "idle", "moving", "asleep")
_SCRAPE_TIMEOUT_S: Final = 2.0


def read_devices(runtime_dir: RuntimeDir) -> list[Statistics]:
    """Every device's statistics. Raises AllocatorError."""
    found: list[Statistics] = []
    with connect(runtime_dir, _SCRAPE_TIMEOUT_S, label="statistics") as memory:
        found.append(memory.statistics())
        others = [name for name in memory.devices if name != memory.device]
    for name in others:
        with connect(runtime_dir, _SCRAPE_TIMEOUT_S, device=name, label="statistics") as memory:
            found.append(memory.statistics())
    return found


def scrape(runtime_dir: RuntimeDir, *others: Collector) -> bytes:
    """All metrics in Prometheus' text format, and those of `others`. Blocks for some seconds at
    most."""
    try:
        devices = read_devices(runtime_dir)
    except AllocatorError:
        devices = []
    registry = CollectorRegistry()
    registry.register(_Figures(devices))
    for collector in others:
        registry.register(collector)
    return generate_latest(registry)


_Figure = Callable[[Statistics], float]


class _Figures(Collector):
    """One scrape's figures."""

    def __init__(self, devices: list[Statistics]):
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with a sample for each device."""
        up = GaugeMetricFamily(f"{_PREFIX}up", "Whether the allocator answers.")
        up.add_metric([], float(bool(self._devices)))
        yield up
        yield self._gauge("limit_bytes", "What may be used.", lambda s: s.limit_bytes)
        yield self._gauge("used_bytes", "Weights, leases and blocks.", lambda s: s.used_bytes)
        yield self._gauge("weights_bytes", "Weight sets on the device.", lambda s: s.weights_bytes)
        yield self._gauge("host_tier_bytes", "Asleep in host memory.", lambda s: s.host_tier_bytes)
        yield self._gauge("sessions", "Connected clients.", lambda s: s.num_sessions)
        yield self._gauge("uptime_seconds", "Since the allocator started.", lambda s: s.uptime_s)
        for name, text in (
            ("total_bytes", "The pool for KV blocks."),
            ("leased_bytes", "Leased by sessions."),
            ("cached_bytes", "Sealed prefix blocks."),
            ("evictable_bytes", "Sealed prefix blocks that nobody pins."),
            ("largest_free_bytes", "The largest free extent."),
            ("fragmentation", "1 - largest free extent / all that is free."),
            ("num_leases", "Leased extents."),
            ("num_blocks", "Sealed prefix blocks."),
        ):
            yield self._gauge(f"pool_{name}", text, _pool_figure(name))
        yield self._counter("evictions", "Weight sets evicted.", lambda s: s.num_evictions)
        yield self._counter(
            "block_evictions", "Blocks evicted.", lambda s: s.pool.num_block_evictions
        )
        yield self._counter("block_lookups", "Blocks asked for.", lambda s: s.pool.num_lookups)
        yield self._counter("block_hits", "Blocks found.", lambda s: s.pool.num_hits)
        sets = GaugeMetricFamily(
            f"{_PREFIX}weight_sets", "Weight sets by state.", labels=["device", "state"]
        )
        quota = GaugeMetricFamily(
            f"{_PREFIX}quota_used_bytes",
            "What a model or a user holds under its quota.",
            labels=["device", "kind", "name"],
        )
        for device in self._devices:
            for state in _STATES:
                count = sum(one.state == state for one in device.weight_sets)
                sets.add_metric([device.device, state], count)
            for one in device.quotas:
                quota.add_metric([device.device, one.kind, one.name], one.used_bytes)
        yield sets
        yield quota

    def _gauge(self, name: str, text: str, figure: _Figure) -> Metric:
        metric = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=["device"])
        return self._filled(metric, figure)

    def _counter(self, name: str, text: str, figure: _Figure) -> Metric:
        metric = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=["device"])
        return self._filled(metric, figure)

    def _filled(self, metric: GaugeMetricFamily | CounterMetricFamily, figure: _Figure) -> Metric:
        for device in self._devices:
            metric.add_metric([device.device], figure(device))
        return metric


def _pool_figure(name: str) -> _Figure:
    return lambda statistics: float(getattr(statistics.pool, name))
