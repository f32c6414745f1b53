"""Publishes an engine's counts on Triton's metrics port; docs/reference/metrics.md explains them.

An update is a message to the server and its answer, for which both take a core from the model, so a separate thread
sends them, four times a second while there are any.
"""

from __future__ import annotations

import ctypes
import random
import threading
from typing import Any

from trident_serving.runtime.metrics import Recorder

PREFIX = "trident_"
PERIOD_SECONDS = 0.25

# Of what happens with each token of each stream, this share is published, chosen at random (decision 0101).
SHARES = {"inter_token_latency": 0.125}

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAP_SECONDS = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)

# By the name that the engine records them under: name for Prometheus, description, buckets.
HISTOGRAMS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "time_to_first_token": ("time_to_first_token_seconds", "From a request's arrival to its first token", _SECONDS),
    "inter_token_latency": ("inter_token_latency_seconds", "Between one token of an answer and the next", _GAP_SECONDS),
    "request_duration": ("request_duration_seconds", "From a request's arrival to the end of its answer", _SECONDS),
    "queue_time": ("queue_time_seconds", "From a request's arrival to its slot", _SECONDS),
    "batch_size": ("batch_size", "Sequences that decode in one step", (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "prompt_tokens": ("prompt_tokens_total", "Tokens of the prompts that got a slot"),
    "prefix_hit_tokens": ("prefix_hit_tokens_total", "Those of them that the cache already held"),
    "generated_tokens": ("generated_tokens_total", "Tokens generated"),
    "draft_tokens": ("draft_tokens_total", "Tokens drafted"),
    "draft_tokens_accepted": ("draft_tokens_accepted_total", "Those of them that the model accepted"),
    "pool_draft_tokens": ("pool_draft_tokens_total", "Those of the drafted tokens that came from other answers"),
    "pool_draft_tokens_accepted": ("pool_draft_tokens_accepted_total", "Those of them that the model accepted"),
    "model_draft_tokens": ("model_draft_tokens_total", "Those of the drafted tokens that came from the draft model"),
    "model_draft_tokens_accepted": ("model_draft_tokens_accepted_total", "Those of them that the model accepted"),
    "requests_cancelled": ("requests_cancelled_total", "Requests that were cancelled"),
    "requests_failed": ("requests_failed_total", "Requests that ended with an error once they were queued"),
    "requests_rejected": ("requests_rejected_total", "Requests that found the queue full"),
    "guard_blocks": ("guard_blocks_total", "Prompts and answers that a guard's rule ended"),
    "loop_restarts": ("loop_restarts_total", "Restarts of the generation loop after an error"),
}
GAUGES: dict[str, tuple[str, str]] = {
    "requests_running": ("requests_running", "Requests with a slot"),
    "requests_waiting": ("requests_waiting", "Requests in the queue"),
    "slots_used": ("slots_used", "Slots of the KV cache with a sequence that runs"),
    "slots": ("slots", "Slots of the KV cache"),
    "kv_cache_tokens": ("kv_cache_tokens", "Tokens that running sequences may grow to, and those kept for reuse"),
    "kv_cache_tokens_reserved": ("kv_cache_tokens_reserved", "Tokens that running sequences may grow to"),
    "kv_cache_tokens_limit": ("kv_cache_tokens_limit", "Tokens that the KV cache can hold"),
}


class Publisher:
    """Publishes one recorder until it is stopped.

    Args:
        pb_utils: Triton's Python API.
        labels: of every metric, such as the model's name.
    """

    def __init__(self, pb_utils: Any, recorder: Recorder, labels: dict[str, str]) -> None:
        self._recorder = recorder
        kinds = pb_utils.MetricFamily
        # A family must outlive its metrics.
        self._families: list[Any] = []
        self._metrics: dict[str, Any] = {}
        for key, (name, description, buckets) in HISTOGRAMS.items():
            family = pb_utils.MetricFamily(name=PREFIX + name, description=description, kind=kinds.HISTOGRAM)
            self._families.append(family)
            self._metrics[key] = family.Metric(labels=labels, buckets=list(buckets))
        for names, kind in ((COUNTERS, kinds.COUNTER), (GAUGES, kinds.GAUGE)):
            for key, (name, description) in names.items():
                family = pb_utils.MetricFamily(name=PREFIX + name, description=description, kind=kind)
                self._families.append(family)
                self._metrics[key] = family.Metric(labels=labels)
        self._told: dict[str, float] = {}
        self._random = random.Random()
        self._shared = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="metrics", daemon=True)
        self._thread.start()

    def stop(self, *, shared: bool) -> None:
        """Publish what is left, and end.

        Args:
            shared: whether another process may publish metrics of the same labels, as where a model is loaded again in
                its place. Triton gives both the same metrics and deletes them with the first (2.51), and then crashes
                with the second, so they are left as they are (decision 0092).
        """
        self._shared = shared
        self._stopping.set()
        self._recorder.changed.set()
        self._thread.join()
        if shared:
            for each in (*self._metrics.values(), *self._families):
                _keep(each)
        self._metrics.clear()
        self._families.clear()

    def _loop(self) -> None:
        changed = self._recorder.changed
        while changed.wait() and not self._stopping.wait(PERIOD_SECONDS):
            changed.clear()  # first: what is recorded meanwhile is published next time
            self._publish()
        self._publish()

    def _publish(self) -> None:
        recorded = self._recorder.drain()
        if self._shared:
            recorded.gauges.clear()  # they are the other's
        for key, amount in recorded.counters.items():
            self._metrics[key].increment(amount)
        # Each call waits for the server with Python's lock held, so what is as it was is not told again.
        for key, value in recorded.gauges.items():
            if self._told.get(key) != value:
                self._metrics[key].set(value)
                self._told[key] = value
        for key, values in recorded.histograms.items():
            share = SHARES.get(key, 1.0)
            for value in values:
                if share == 1.0 or self._random.random() < share:
                    self._metrics[key].observe(value)


def _keep(what: Any) -> None:
    """Have an object never end, not even with the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))
