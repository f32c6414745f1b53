"""The ways to a server: our client over gRPC and over HTTP, and the gateway with plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

from benchmarks.load.workloads import Generation, Workload
from trident_client import AsyncClient, OverloadedError

GRPC, HTTP, GATEWAY = "grpc", "http", "gateway"
DOORS = (GRPC, HTTP, GATEWAY)
SECONDS = 300.0  # that one request may take
Note = Callable[[], None]


class AnswerError(RuntimeError):
    """An answer is an error; the message is the server's."""


class FullError(AnswerError):
    """The server or the gateway has no room: it takes less than it is sent."""


@dataclass(frozen=True)
class Answered:
    """What came back: something that `==` compares, and how many tokens were generated; 0: none are."""

    answer: Any
    tokens: int = 0


class Door(Protocol):
    """One way to ask."""

    name: str

    def opens(self, workload: Workload | Generation) -> bool:
        """Whether this task can be asked here."""
        ...

    async def ask(self, model: str, workload: Workload | Generation, item: Any, note: Note) -> Answered:
        """One request.

        Args:
            note: is called whenever a part of a streamed answer comes.

        Raises:
            FullError: there is no room.
            Exception: anything else that goes wrong.
        """
        ...


class TridentDoor:
    """Our client.

    Args:
        name: "grpc" or "http".
        client: of the server, over that.
    """

    def __init__(self, name: str, client: AsyncClient) -> None:
        self.name = name
        self._client = client

    def opens(self, workload: Workload | Generation) -> bool:
        """All tasks."""
        return True

    async def ask(self, model: str, workload: Workload | Generation, item: Any, note: Note) -> Answered:
        """See `Door`."""
        try:
            if isinstance(workload, Workload):
                return Answered(await workload.call(self._client, model, item))
            parts, tokens = [], 0
            async for chunk in self._client.stream(item, model=model, **workload.options()):
                note()
                parts.append(chunk.text)
                tokens = chunk.num_output_tokens
            return Answered("".join(parts), tokens)
        except OverloadedError as error:
            raise FullError(str(error)) from None


class GatewayDoor:
    """The gateway; a generator is asked at /v1/completions.

    Args:
        client: with the gateway's address as base URL.
    """

    name = GATEWAY

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client

    def opens(self, workload: Workload | Generation) -> bool:
        """The tasks that it has an endpoint for."""
        return isinstance(workload, Generation) or bool(workload.path)

    async def ask(self, model: str, workload: Workload | Generation, item: Any, note: Note) -> Answered:
        """See `Door`."""
        if isinstance(workload, Generation):
            return await self._stream({"model": model, "prompt": item, **workload.options()}, note)
        response = await self._client.post(workload.path, json={"model": model, **workload.body(item)})
        _check(response)
        return Answered(workload.read(response.json()))

    async def _stream(self, body: dict[str, Any], note: Note) -> Answered:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        parts, tokens, done = [], 0, False
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx2.codes.OK:
                await response.aread()
                _check(response)
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise AnswerError(event["error"]["message"])
                if event["choices"]:
                    note()
                    parts.append(event["choices"][0]["text"])
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        if not done:
            raise AnswerError("the stream ended without [DONE]")
        return Answered("".join(parts), tokens)


def _check(response: httpx2.Response) -> None:
    """Raise what a response says.

    Raises:
        FullError: see there.
        AnswerError: its status is another than 200.
    """
    if response.status_code == httpx2.codes.TOO_MANY_REQUESTS:
        raise FullError(response.text)
    if response.status_code != httpx2.codes.OK:
        raise AnswerError(f"status {response.status_code}: {response.text[:500]}")
