"""The async client against the same in-process server as the other one."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from tests.unit.test_client import Service, served
from trident_client import (
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    Generation,
    Health,
    InvalidRequestError,
    ModelStatus,
    NotFoundError,
    ServerError,
    UnavailableError,
    _grpc_aio,
)
from trident_serving.launcher import local

__all__ = ["served"]  # a fixture


def run(url: str, work: Callable[[AsyncClient], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(url, **options) as client:
            return await work(client)

    return asyncio.run(main())


def test_generation(served: tuple[str, Service]) -> None:
    url, service = served

    async def work(client: AsyncClient) -> None:
        assert await client.generate("one two", max_tokens=5, stop_words=["x"]) == Generation(
            "one two", "stop", 7, 1, (-0.5,)
        )
        assert service.requests[-1]["stop_words"].tolist() == [[b"x"]]
        chunks = [chunk async for chunk in client.stream("one two three", model="smollm2")]
        assert [chunk.text for chunk in chunks] == ["one ", "two ", "three "]
        await client.chat("hi é")
        assert json.loads(service.requests[-1]["messages"].item()) == [{"role": "user", "content": "hi é"}]
        assert [answer.text for answer in await client.generate_many("a b", 2)] == ["a b"]
        assert service.requests[-1]["n"].item() == 2
        with pytest.raises(TypeError, match="unknown option 'beams'"):
            client.stream("x", beams=5)  # type: ignore[call-arg]

    run(url, work)


def test_calls_run_at_once_and_lists_keep_their_order(served: tuple[str, Service]) -> None:
    async def work(client: AsyncClient) -> None:
        texts = ["x" * length for length in range(1, 101)]
        vectors, answer, health = await asyncio.gather(
            client.embed(texts, batch_size=3), client.generate("a"), client.health()
        )
        np.testing.assert_array_equal(vectors, [[length, 1] for length in range(1, 101)])
        assert answer.text == "a"
        assert health == Health(live=True, ready=False)
        assert (await client.embed("four", truncate=True)).tolist() == [4, 1]
        assert (await client.embed([])).shape == (0, 0)
        assert await client.models() == [
            ModelStatus("a", "1", "UNAVAILABLE", "broken"),
            ModelStatus("b", "1", "READY", ""),
        ]
        assert await client.unverified("forced") == "kl is 1"

    run(served[0], work)


def test_errors(served: tuple[str, Service]) -> None:
    async def work(client: AsyncClient) -> None:
        with pytest.raises(InvalidRequestError, match="top_p must be above 0"):
            await client.generate("refuse")
        with pytest.raises(InvalidRequestError, match="unexpected shape"):
            await client.generate("refused by triton")
        with pytest.raises(NotFoundError, match="unknown model"):
            await client.generate("x", model="unknown")
        with pytest.raises(UnavailableError, match="^the queue holds no more$"):
            await client.generate("full")
        with pytest.raises(ServerError, match="broken"):
            await client.embed(["a", "broken"], batch_size=1)
        with pytest.raises(DeadlineExceededError):
            await client.embed("slow", timeout=0.1)
        with pytest.raises(NotFoundError, match="serves de-en and en-de for translation"):
            await client.translate("x")
        stream = client.stream("endless")
        await anext(stream)
        await client.close()
        with pytest.raises(CancelledError):
            [chunk async for chunk in stream]

    run(served[0], work)


def test_a_stream_is_read_to_its_end_behind_an_error(
    served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(prompt: str) -> None:
        async with AsyncClient(served[0], timeout=20) as client:
            with pytest.raises(InvalidRequestError, match="top_p must be above 0"):
                await client.generate(prompt)

    asyncio.run(refused("refuse, and end later"))
    assert served[1].whole.wait(5)
    served[1].left.clear()
    monkeypatch.setattr(_grpc_aio, "END_SECONDS", 0.1)
    asyncio.run(refused("refuse, and never end"))
    assert served[1].left.wait(5)


@pytest.mark.parametrize("how", ["closed", "left", "its task cancelled"])
def test_a_stream_that_ends_early_is_cancelled(served: tuple[str, Service], how: str) -> None:
    url, service = served

    async def read(client: AsyncClient, begun: asyncio.Event) -> None:
        async for _ in client.stream("endless"):
            begun.set()
            if how == "left":
                break

    async def work(client: AsyncClient) -> None:
        if how == "closed":
            stream = client.stream("endless")
            assert (await anext(stream)).text == "more "
            await stream.aclose()
        else:
            begun = asyncio.Event()
            task = asyncio.create_task(read(client, begun))
            await begun.wait()
            if how == "its task cancelled":
                task.cancel()
            (ended,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(ended, asyncio.CancelledError) == (how == "its task cancelled")
        assert await asyncio.to_thread(service.cancelled.wait, 5)

    run(url, work)


def test_a_server_that_is_not_there() -> None:
    async def work(client: AsyncClient) -> None:
        with pytest.raises(UnavailableError):
            await client.generate("x")
        assert await client.health() == Health(live=False, ready=False)

    run(f"127.0.0.1:{local.free_ports(1)[0]}", work)


def test_both_clients_have_the_same_methods() -> None:
    """With the same arguments; and the answers are the same, but awaited, or iterated over as they come."""
    public = {name: getattr(Client, name) for name in dir(Client) if not name.startswith("_")}
    assert {name for name in dir(AsyncClient) if not name.startswith("_")} == set(public)
    assert len(public) > 18
    for name, method in public.items():
        theirs, ours = inspect.signature(method), inspect.signature(getattr(AsyncClient, name))
        assert theirs.parameters == ours.parameters, name
        if not name.startswith("stream"):
            assert theirs.return_annotation == ours.return_annotation, name
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters
