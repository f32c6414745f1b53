"""Many requests of the client: what is in flight, what is sent again, and what is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from trident_client._sending import IN_FLIGHT, send_all


class Refusal(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


class Call:
    """A future as gRPC's are."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.cancelled = False

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self._answer is not None:
            threading.Timer(0.001, callback, [self]).start()

    def code(self) -> grpc.StatusCode:
        return self._answer.code() if isinstance(self._answer, Refusal) else grpc.StatusCode.OK

    def details(self) -> str:
        return self._answer.details() if isinstance(self._answer, Refusal) else ""

    def result(self) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def cancel(self) -> None:
        self.cancelled = True


FULL = Refusal(grpc.StatusCode.UNAVAILABLE, "the queue is full: 4 of 4 requests wait while 8 run; try again later")


def test_responses_come_in_order_and_few_fly() -> None:
    flying = most = 0
    lock = threading.Lock()

    class Counted(Call):
        def result(self) -> Any:
            nonlocal flying
            with lock:
                flying -= 1
            return super().result()

    def start(index: int, seconds: float | None) -> Call:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        return Counted(f"answer {index}")

    assert send_all(start, 100, None) == [f"answer {index}" for index in range(100)]
    assert 1 < most <= IN_FLIGHT


def test_a_full_queue_is_asked_again() -> None:
    tries: dict[int, list[float]] = {}

    def start(index: int, seconds: float | None) -> Call:
        assert seconds is not None
        tries.setdefault(index, []).append(seconds)
        return Call(FULL if len(tries[index]) < 3 and index % 2 else index + 1)

    assert send_all(start, 6, 30.0) == [1, 2, 3, 4, 5, 6]
    assert [len(tries[index]) for index in range(6)] == [1, 3, 1, 3, 1, 3]
    assert all(seconds == sorted(seconds, reverse=True) for seconds in tries.values())  # one deadline for all tries


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"),
        Refusal(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: ask another, or try again later"),
        Refusal(grpc.StatusCode.INVALID_ARGUMENT, "the queue is full of nonsense"),
    ],
)
def test_other_errors_are_raised_and_the_rest_cancelled(refusal: Refusal) -> None:
    calls: list[Call] = []

    def start(index: int, seconds: float | None) -> Call:
        calls.append(Call(refusal if index == 2 else None))
        return calls[-1]

    with pytest.raises(grpc.RpcError) as raised:
        send_all(start, 40, None)
    assert raised.value is refusal
    assert len(calls) == IN_FLIGHT
    assert [call.cancelled for call in calls] == [index != 2 for index in range(IN_FLIGHT)]


def test_a_queue_that_stays_full_is_an_error_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as raised:
        send_all(lambda index, seconds: Call(FULL), 3, 0.4)
    assert raised.value is FULL
    assert time.monotonic() - started < 2.0
