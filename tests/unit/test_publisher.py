"""What is told to Triton's metrics, and what becomes of them at the end of a process; Triton's classes are fakes."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

from trident_serving.runtime.metrics import Recorder
from trident_serving.triton.metrics import Publisher


class Metric:
    def __init__(self, told: list[tuple[str, str, float]], name: str) -> None:
        self._told, self._name = told, name

    def increment(self, amount: float) -> None:
        self._told.append((self._name, "increment", amount))

    def set(self, value: float) -> None:
        self._told.append((self._name, "set", value))

    def observe(self, value: float) -> None:
        self._told.append((self._name, "observe", value))


class Api:
    """As much of `pb_utils` as a publisher needs.

    Attributes:
        told: what the metrics were told.
        living: families and metrics that were made.
    """

    def __init__(self) -> None:
        self.told: list[tuple[str, str, float]] = []
        self.living: list[weakref.ref[Any]] = []
        api = self

        class Family:
            HISTOGRAM, COUNTER, GAUGE = range(3)

            def __init__(self, name: str, description: str, kind: int) -> None:
                self.name = name
                api.living.append(weakref.ref(self))

            def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:  # noqa: N802
                made = Metric(api.told, self.name)
                api.living.append(weakref.ref(made))
                return made

        self.MetricFamily = Family


def test_a_process_that_ends_takes_its_metrics_with_it() -> None:
    api, recorder = Api(), Recorder()
    publisher = Publisher(api, recorder, {"model": "m"})
    recorder.count("generated_tokens", 3)
    recorder.observe("queue_time", 0.5)
    recorder.set(slots=4.0)
    publisher.stop(shared=False)
    assert set(api.told) == {
        ("trident_generated_tokens_total", "increment", 3),
        ("trident_queue_time_seconds", "observe", 0.5),
        ("trident_slots", "set", 4.0),
    }
    gc.collect()
    assert len(api.living) > 20
    assert not any(each() for each in api.living)


def test_metrics_of_another_process_are_left_to_it() -> None:
    """Triton would delete them under the process that has taken the model's place, and crash with its next words."""
    api, recorder = Api(), Recorder()
    publisher = Publisher(api, recorder, {"model": "m"})
    recorder.count("generated_tokens", 3)
    publisher.stop(shared=True)
    recorder.set(slots=4.0)
    publisher._publish()
    assert api.told == [("trident_generated_tokens_total", "increment", 3)]
    del publisher
    gc.collect()
    assert all(each() for each in api.living)


def test_a_share_of_the_gaps_between_tokens_is_told_and_has_their_distribution() -> None:
    api, recorder = Api(), Recorder()
    publisher = Publisher(api, recorder, {"model": "m"})
    gaps = [0.01] * 8000 + [0.1] * 2000  # in an order: a fixed stride would be fair, too, but not with 8 or 16 streams
    recorder.observe("inter_token_latency", *gaps)
    recorder.observe("batch_size", *[4.0] * 100)
    publisher.stop(shared=False)
    told = [value for name, _, value in api.told if name == "trident_inter_token_latency_seconds"]
    assert 1000 <= len(told) <= 1500  # 1250 expected; a standard deviation is 33
    assert 0.15 <= sum(value == 0.1 for value in told) / len(told) <= 0.25  # 0.2 expected, 0.011
    assert [value for name, _, value in api.told if name == "trident_batch_size"] == [4.0] * 100


def test_what_is_recorded_is_told_without_being_asked_and_idle_threads_sleep() -> None:
    api, recorder = Api(), Recorder()
    publisher = Publisher(api, recorder, {"model": "m"})
    drains, drain = [], recorder.drain
    recorder.drain = lambda: (drains.append(1), drain())[1]  # type: ignore[method-assign, func-returns-value]
    time.sleep(0.7)
    assert not drains
    recorder.count("generated_tokens", 3)
    time.sleep(0.7)
    assert api.told == [("trident_generated_tokens_total", "increment", 3)]
    assert len(drains) == 1
    publisher.stop(shared=False)
