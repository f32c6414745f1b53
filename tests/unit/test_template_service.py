"""Template tasks answer every request once, whatever becomes of its client; the generator and the client are fakes."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from trident_serving.errors import Cancelled, Overloaded
from trident_serving.template_service import TemplateService
from trident_serving.templates import Completion, TemplateTask
from trident_serving.text import encode_texts

PARAMETERS = {"task": "summarization", "generator": "gen", "template": "{{ text_input }}", "max_tokens": "8"}


class Generator:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def complete(self, tensors: Any, seconds: float) -> Completion:
        await asyncio.sleep(self.seconds)
        return Completion("done", "stop", 1, 1, ())

    async def close(self) -> None:
        pass


class Channel:
    def __init__(self, gone: bool) -> None:
        self.gone = gone
        self.got: list[object] = []
        self.answered = threading.Event()

    def is_cancelled(self) -> bool:
        return self.gone

    def send(self, result: Any) -> None:
        self.got.append(result["text_output"].reshape(-1)[0])
        self.answered.set()

    def fail(self, error: Exception) -> None:
        self.got.append(type(error))
        self.answered.set()


def inputs() -> dict[str, Any]:
    return {"text_input": encode_texts(["a text"])[None].astype(np.object_)}


def test_each_request_is_answered_once_also_where_its_client_goes_before_the_work_begins() -> None:
    service = TemplateService(TemplateTask(PARAMETERS), Generator(0.02), 10_000)
    channels = []
    # The loop is held up, so that some are cancelled before their first step.
    for index in range(300):
        channels.append(Channel(gone=index % 3 != 0))
        if index % 50 == 0:
            service._loop.call_soon_threadsafe(time.sleep, 0.06)
        service.submit(inputs(), 10.0, channels[-1])
    for entry in list(service._open):
        if entry.channel.is_cancelled() and entry.work is not None:
            service._loop.call_soon_threadsafe(entry.work.cancel)
    assert all(channel.answered.wait(5) for channel in channels)
    assert all(channel.got == [b"done"] for channel in channels if not channel.gone)
    assert all(channel.got in ([b"done"], [Cancelled]) for channel in channels if channel.gone)
    assert service._open == set()
    service.stop()


def test_an_unload_ends_what_is_asked() -> None:
    unloading = threading.Event()
    service = TemplateService(TemplateTask(PARAMETERS), Generator(30.0), 8, unloading.is_set)
    channels = [Channel(gone=False) for _ in range(3)]
    for channel in channels:
        service.submit(inputs(), 60.0, channel)
    unloading.set()
    assert all(channel.answered.wait(5) for channel in channels)
    assert all(channel.got == [Overloaded] for channel in channels)
    with pytest.raises(Overloaded, match="the model is being unloaded"):
        service.submit(inputs(), 60.0, Channel(gone=False))
    service.stop()


def test_a_task_that_is_cancelled_before_its_first_step_is_answered() -> None:
    service = TemplateService(TemplateTask(PARAMETERS), Generator(5.0), 8)
    channel = Channel(gone=False)

    def begin_and_cancel() -> None:
        (entry,) = service._open
        assert entry.work is not None
        entry.work.cancel()

    service._loop.call_soon_threadsafe(time.sleep, 0.1)
    service.submit(inputs(), 10.0, channel)
    service._loop.call_soon_threadsafe(begin_and_cancel)
    assert channel.answered.wait(5)
    assert channel.got == [Cancelled]
    assert service._open == set()
    left = Channel(gone=False)
    service.submit(inputs(), 10.0, left)
    time.sleep(0.1)
    service.stop()
    assert left.got == [Overloaded]
