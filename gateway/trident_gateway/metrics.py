"""Prometheus metrics of the gateway: requests by route, model and status, tokens, queues, latencies, servers.

With several processes each writes its own numbers to files of a folder, which `PROMETHEUS_MULTIPROC_DIR` names before
the library is imported, and any of them can tell the sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from trident_gateway.exchange import Exchange

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        several = FOLDER in os.environ
        if several:
            multiprocess.MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        registry = None if several else self.registry
        by_model = ("route", "model")
        self._requests = Counter(
            "trident_gateway_requests", "Requests that are over.", (*by_model, "status"), registry=registry
        )
        self._seconds = Histogram(
            "trident_gateway_request_seconds", "Time of a request.", by_model, buckets=_SECONDS, registry=registry
        )
        self._first_byte = Histogram(
            "trident_gateway_first_byte_seconds",
            "Time until an answer begins.",
            by_model,
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue = Histogram(
            "trident_gateway_queue_seconds", "Time in the queue.", ("model",), buckets=_SECONDS, registry=registry
        )
        self._tokens = Counter("trident_gateway_tokens", "Tokens.", ("model", "kind"), registry=registry)
        self._running = Gauge(
            "trident_gateway_running",
            "Answers that are being made.",
            ("model",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._waiting = Gauge(
            "trident_gateway_waiting",
            "Requests in the queue.",
            ("model",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._healthy = Gauge(
            "trident_gateway_server_healthy",
            "Whether a server answers.",
            ("server",),
            registry=registry,
            multiprocess_mode="livemin",
        )
        by_server = ("server", "model")
        self._ready = Gauge(
            "trident_gateway_model_ready",
            "Whether a server has a model that it had before.",
            by_server,
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._unverified = Gauge(
            "trident_gateway_model_unverified",
            "Whether a model was installed although its gate refused it.",
            by_server,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._losses = Counter(
            "trident_gateway_model_losses",
            "Models that a server which answers no longer has.",
            by_server,
            registry=registry,
        )
        self._seen: dict[str, dict[str, bool]] = {}

    def over(self, exchange: Exchange, seconds: float) -> None:
        """A request is over."""
        route, model = exchange.route or "unknown", exchange.model or ""
        self._requests.labels(route, model, str(exchange.status)).inc()
        self._seconds.labels(route, model).observe(seconds)
        if exchange.first_byte_seconds is not None:
            self._first_byte.labels(route, model).observe(exchange.first_byte_seconds)
        if exchange.queue_seconds is not None:
            self._queue.labels(model).observe(exchange.queue_seconds)
        if exchange.prompt_tokens:
            self._tokens.labels(model, "prompt").inc(exchange.prompt_tokens)
        if exchange.completion_tokens:
            self._tokens.labels(model, "completion").inc(exchange.completion_tokens)

    def depths(self, depths: dict[str, tuple[int, int]]) -> None:
        """How many requests run and wait, by model."""
        for model, (running, waiting) in depths.items():
            self._running.labels(model).set(running)
            self._waiting.labels(model).set(waiting)

    def server(self, address: str, *, healthy: bool, verified: Mapping[str, bool]) -> None:
        """What a look at a server has found.

        Args:
            address: of the server.
            healthy: whether it answers.
            verified: its models, and whether each passed its gate.
        """
        self._healthy.labels(address).set(int(healthy))
        seen = self._seen.setdefault(address, {})
        for model, passed in verified.items():
            self._unverified.labels(address, model).set(int(not passed))
            self._losses.labels(address, model)  # begins at 0, so that the first loss is a rise
        for model in {*seen, *verified}:
            here = healthy and model in verified
            self._ready.labels(address, model).set(int(here))
            if healthy and not here and seen[model]:
                self._losses.labels(address, model).inc()
            seen[model] = here or (not healthy and seen.get(model, False))

    def forget(self, address: str) -> None:
        """A server is none any more. Several processes share files that keep every label, so there it becomes NaN."""
        models = self._seen.pop(address, {})
        gauges: list[tuple[Gauge, tuple[str, ...]]] = [(self._healthy, (address,))]
        gauges += [(gauge, (address, model)) for gauge in (self._ready, self._unverified) for model in models]
        for gauge, labels in gauges:
            if FOLDER in os.environ:
                gauge.labels(*labels).set(math.nan)
            else:
                gauge.remove(*labels)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
