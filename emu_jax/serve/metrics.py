"""Figures of a server for Prometheus: requests by route and status, their seconds, and what the engine is at."""

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
    """How a request ended; 500 unless a handler says otherwise."""

    status: int = 500


class Metrics:
    """A registry of its own for each server, so that several live in one process."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "emu_requests", "Requests answered, by route and status.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "emu_request_seconds",
            "From a request to its answer (of a stream: to its beginning).",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_EngineFigures(engine))

    @contextlib.contextmanager
    def timed(self, route: str) -> Iterator[Outcome]:
        """Counts a request, whose status is to be put into what is given."""
        outcome, began = Outcome(), time.monotonic()
        try:
            yield outcome
        finally:
            self._requests.labels(route, str(outcome.status)).inc()
            self._seconds.labels(route).observe(time.monotonic() - began)


class _EngineFigures(Collector):
    """What an engine counts, read when it is asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, figures in (("waiting", self._engine.waiting()), ("running", self._engine.running())):
            gauge = GaugeMetricFamily(f"emu_{name}", f"Requests that are {name}, by kind.", labels=["kind"])
            for kind, value in figures.items():
                gauge.add_metric([kind], value)
            yield gauge
        about = {
            "texts": "Texts written to their end.",
            "tokens": "Tokens written.",
            "images": "Images drawn to their end.",
            "refused": "Requests refused because the queue was full.",
            "cancelled": "Requests given up by those who asked.",
            "timed_out": "Requests that took too long.",
            "failed": "Requests that the model failed on.",
        }
        for name, help in about.items():
            yield CounterMetricFamily(f"emu_{name}", help, value=getattr(self._engine.counts, name))
