"""Requests for explanations while their model answers, is busy, or is unloaded: no server, a generator of bytes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trident_serving.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded
from trident_serving.explanation.service import Explained, ExplanationService
from trident_serving.text import encode_texts


class Bytes:
    """A generator whose tokens are bytes; a token's log-probability is less for every `a` before it.

    Attributes:
        calls: so far.
        ended: of them that were given up.
        go: answers wait for it.
    """

    def __init__(self) -> None:
        self.calls = self.ended = 0
        self.go = threading.Event()
        self.go.set()

    async def infer(self, tensors: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        self.calls += 1
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.ended += 1
            raise
        given = tensors.get("text_input")
        ids = list(given.item()) if given is not None else tensors["input_ids"][0].tolist()
        return {
            "text_output": encode_texts(["!"]),
            "output_ids": np.array([[33]], np.int32),
            "prompt_token_ids": np.array([ids], np.int32),
            "prompt_tokens": np.array([[bytes([token]) for token in ids]], np.object_),
            "prompt_log_probs": np.array([[-1.0 - ids[:at].count(97) for at in range(1, len(ids))]], np.float32),
        }

    async def close(self) -> None:
        pass


class Channel:
    """A channel that is waited for; `gone` says that the client is."""

    def __init__(self) -> None:
        self.gone = False
        self.done = threading.Event()
        self.result: Any = None

    def is_cancelled(self) -> bool:
        return self.gone

    def send(self, result: Mapping[str, Any]) -> None:
        self.result = result
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.result = error
        self.done.set()

    def wait(self) -> Any:
        assert self.done.wait(10)
        return self.result


@pytest.fixture
def model() -> Bytes:
    return Bytes()


@pytest.fixture
def unloading() -> threading.Event:
    return threading.Event()


@pytest.fixture
def service(model: Bytes, unloading: threading.Event) -> Iterator[ExplanationService]:
    parameters = {"explains": "m", "task": "text-generation", "variants": "int8=m,fp32=m_fp32", "max_waiting": "3"}
    parameters["max_runs"] = "4"
    explained = Explained.read(parameters, Path(), "1")
    found = ExplanationService(explained, parameters, lambda name: model, unloading.is_set)
    yield found
    model.go.set()
    if not found._stopping:
        found.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asked(text: str, **options: str) -> dict[str, Any]:
    return {name: encode_texts([value])[None] for name, value in {"text_input": text, **options}.items()}


def test_an_answer(service: ExplanationService, model: Bytes) -> None:
    """The prompt's tokens, the answer, the whole, and one call for each word; the page is there where it is wanted."""
    channel = Channel()
    service.submit(asked("aa b a"), 10, channel)
    (found,) = json.loads(channel.wait()["explanation"].item())
    assert [each["value"] for each in found["attributions"]] == [-2, 0, -1]
    assert (found["model"], found["of"], found["score"], model.calls) == ("m", "!", -4, 6)
    assert "page" not in channel.result
    channel = Channel()
    service.submit(asked("b", variant="fp32", answer="c a") | {"page": np.array([[True]])}, 10, channel)
    assert isinstance(channel.wait(), InvalidRequest)  # without its only word nothing is left
    service.submit(asked("b b", variant="fp32", answer="c a") | {"page": np.array([[True]])}, 10, channel := Channel())
    assert "<!doctype html>" in channel.wait()["page"].item().decode()
    assert json.loads(channel.result["explanation"].item())[0]["model"] == "m_fp32"


def test_what_is_refused(service: ExplanationService, model: Bytes) -> None:
    for tensors, message in (
        (asked("a", label="b"), "label is not for text-generation"),
        (asked("a", by="letter"), "by must be one of word, sentence, token, found 'letter'"),
        (asked("a", variant="int4"), "variant must be one of int8, fp32, found 'int4'"),
        ({"text_input": encode_texts(["a", "b"])[None]}, "text_input must hold one text, found 2"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            service.submit(tensors, 10, Channel())
        assert str(caught.value).startswith(message)
    assert model.calls == 0
    service.submit(asked("a b c d e"), 10, channel := Channel())
    assert str(channel.wait()).startswith("text_input makes 5 texts without one of its parts, the limit is 4")
    assert model.calls == 1  # for the tokens; nothing is answered for what is refused
    service.submit(asked("a b"), 0, channel := Channel())
    assert isinstance(channel.wait(), DeadlineExceeded)


def test_who_has_gone_and_who_finds_no_room(service: ExplanationService, model: Bytes) -> None:
    model.go.clear()
    channels = [Channel() for _ in range(3)]
    for channel in channels:
        service.submit(asked("a b"), 10, channel)
    with pytest.raises(Overloaded, match="3 requests are being answered already"):
        service.submit(asked("a b"), 10, Channel())
    until(lambda: model.calls == 2)
    channels[0].gone = True
    model.go.set()
    assert isinstance(channels[0].wait(), Cancelled)
    for channel in channels[1:]:
        assert b"attributions" in channel.wait()["explanation"].item()
    # The one that had gone made no second call, the others five each.
    assert model.calls == 1 + 2 * 5


def test_nobody_waits_for_a_call_that_takes_long(
    service: ExplanationService, model: Bytes, unloading: threading.Event
) -> None:
    """Within a call its client may go, its time may end, and the model may be unloaded."""
    model.go.clear()
    gone, late = Channel(), Channel()
    service.submit(asked("a b"), 60, gone)
    service.submit(asked("a b"), 0.3, late)
    until(lambda: model.calls == 2)
    gone.gone = True
    assert isinstance(gone.wait(), Cancelled)
    assert isinstance(late.wait(), DeadlineExceeded)
    channels = [Channel() for _ in range(3)]
    for channel in channels:
        service.submit(asked("a b"), 60, channel)
    until(lambda: model.calls == 4)
    unloading.set()
    assert all("being unloaded" in str(channel.wait()) for channel in channels)
    assert model.calls == 4
    until(lambda: (model.ended, service._open) == (4, 0))  # a call ends a moment behind its request


def test_an_end_fails_what_is_open(service: ExplanationService, model: Bytes) -> None:
    model.go.clear()
    channels = [Channel() for _ in range(3)]
    for channel in channels:
        service.submit(asked("a b"), 10, channel)
    until(lambda: model.calls == 2)
    ending = threading.Thread(target=service.stop)
    ending.start()
    assert "being unloaded" in str(channels[2].wait())  # it has not begun
    model.go.set()
    ending.join(10)
    assert not ending.is_alive()
    assert all(isinstance(channel.result, Overloaded) for channel in channels)
    with pytest.raises(Overloaded, match="the model is being unloaded"):
        service.submit(asked("a b"), 10, Channel())
