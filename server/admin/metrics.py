"""Prometheus metrics: the allocator's figures, as a scrape sees them.

Owns names and labels, and the one thread that asks the allocator. Invariant: a scrape that can't
reach the allocator still answers, within about a second, and says that it is down; however many
scrapes there are, a silent allocator holds up that one thread.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from allocator import AllocatorError, RuntimeDir, Statistics, connect

_PREFIX: Final = "onecopy_allocator_"
_STATES: Final = ("loading", "sealed", "idle", "moving", "asleep")
_ANSWER_S: Final = 2.0
_SCRAPE_S: Final = 1.0
"""What a scrape waits for the allocator."""


class Metrics:
    """All metrics of one server."""

    def __init__(self, runtime_dir: RuntimeDir, *others: Collector) -> None:
        """`others` have figures that are not the allocator's."""
        self._runtime_dir = runtime_dir
        self._others = others
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._asking: asyncio.Future[list[Statistics]] | None = None

    async def scrape(self) -> bytes:
        """Prometheus' text format."""
        if self._asking is None or self._asking.done():
            loop = asyncio.get_running_loop()
            self._asking = loop.run_in_executor(self._thread, self._read)
        done, _ = await asyncio.wait({self._asking}, timeout=_SCRAPE_S)
        return exposition(self._asking.result() if done else [], *self._others)

    def close(self) -> None:
        """Nobody scrapes any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self) -> list[Statistics]:
        try:
            return read_devices(self._runtime_dir)
        except AllocatorError:
            return []


def read_devices(runtime_dir: RuntimeDir) -> list[Statistics]:
    """Every device's statistics. Raises AllocatorError."""
    found: list[Statistics] = []
    names = [""]  # of the first device, whatever it is called
    while names:
        with connect(
            runtime_dir,
            _ANSWER_S,
            device=names.pop(0),
            label="statistics",
            request_timeout_s=_ANSWER_S,
        ) as memory:
            if not found:
                names = [name for name in memory.devices if name != memory.device]
            found.append(memory.statistics())
    return found


def exposition(devices: Sequence[Statistics], *others: Collector) -> bytes:
    """The figures of these devices, and those of `others`, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Figures(devices))
    for collector in others:
        registry.register(collector)
    return generate_latest(registry)


_Figure = Callable[[Statistics], float]


class _Figures(Collector):
    """One scrape's figures."""

    def __init__(self, devices: Sequence[Statistics]):
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
