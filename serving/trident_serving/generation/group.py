"""Several answers to one prompt: streams of their own, whose chunks go to one client.

The first is prefilled; the others begin once it is, behind what its slot then holds of the prompt.
"""

from __future__ import annotations

import threading

from trident_serving.generation.stream import Chunk, ResponseChannel


class AnswerGroup:
    """The channel of a request with several answers.

    Streamed, each chunk goes out as it comes, with the index of its answer. Otherwise they go out together, in order,
    once all are complete. When one fails, the request fails and the others are cancelled.

    Args:
        channel: the client.
        count: answers.
    """

    def __init__(self, channel: ResponseChannel, count: int, *, streaming: bool) -> None:
        self._channel = channel
        self._streaming = streaming
        self._lock = threading.Lock()
        self._last: list[Chunk | None] = [None] * count
        self._failed = False

    def member(self, index: int) -> ResponseChannel:
        """The channel of one answer."""
        return _Member(self, index)

    def send(self, index: int, chunk: Chunk) -> None:
        """A chunk of an answer."""
        with self._lock:
            if self._failed:
                return
            if chunk.finish_reason is not None:
                self._last[index] = chunk
            complete = [last for last in self._last if last is not None]
        final = chunk.finish_reason is not None and len(complete) == len(self._last)
        if self._streaming:
            chunk.index, chunk.final = index, final
            self._channel.send(chunk)
        elif final:
            for place, each in enumerate(complete):
                each.index = place
            first = complete[0]
            first.others, first.final = complete[1:], True
            self._channel.send(first)

    def fail(self, error: Exception) -> None:
        """One answer can't be completed."""
        with self._lock:
            failed, self._failed = self._failed, True
        if not failed:
            self._channel.fail(error)

    def is_cancelled(self) -> bool:
        """Whether the answers are not wanted any more."""
        return self._failed or self._channel.is_cancelled()


class _Member:
    def __init__(self, group: AnswerGroup, index: int) -> None:
        self._group = group
        self._index = index

    def send(self, chunk: Chunk) -> None:
        """See `ResponseChannel.send`."""
        self._group.send(self._index, chunk)

    def fail(self, error: Exception) -> None:
        """See `ResponseChannel.fail`."""
        self._group.fail(error)

    def is_cancelled(self) -> bool:
        """See `ResponseChannel.is_cancelled`."""
        return self._group.is_cancelled()
