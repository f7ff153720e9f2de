"""Metrics of a server for Prometheus: requests by route and status, their latency, and the engine's counters."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emu_jax.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclasses.dataclass
class Outcome:
    """The status of a request's response; 500 unless a handler sets it."""

    status: int = 500


class Metrics:
    """One registry per server, so that one process can run several."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "emu_requests", "Requests answered, by route and status.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "emu_request_seconds",
            "Time from a request to its answer (to the first byte of a stream).",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_EngineMetrics(engine))

    @contextlib.contextmanager
    def timed(self, route: str) -> Iterator[Outcome]:
        """Counts and times a request; the caller sets the status of the yielded outcome."""
        outcome, began = Outcome(), time.monotonic()
        try:
            yield outcome
        finally:
            self._requests.labels(route, str(outcome.status)).inc()
            self._seconds.labels(route).observe(time.monotonic() - began)


class _EngineMetrics(Collector):
    """An engine's counters, read at each scrape."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, counts in (("waiting", self._engine.waiting()), ("running", self._engine.running())):
            gauge = GaugeMetricFamily(f"emu_{name}", f"Requests that are {name}, by kind.", labels=["kind"])
            for kind, value in counts.items():
                gauge.add_metric([kind], value)
            yield gauge
        descriptions = {
            "texts": "Texts generated completely.",
            "tokens": "Tokens generated.",
            "images": "Images drawn completely.",
            "embeddings": "Images and prompts embedded.",
            "refused": "Requests refused because the queue was full.",
            "cancelled": "Requests cancelled by their clients.",
            "timed_out": "Requests that exceeded the time limit.",
            "failed": "Requests that the model failed on.",
        }
        for name, help in descriptions.items():
            yield CounterMetricFamily(f"emu_{name}", help, value=getattr(self._engine.counts, name))
