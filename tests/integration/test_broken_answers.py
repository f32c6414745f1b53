"""Answers that break off between a real server and the clients: what is asked again, and what is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests import breaking
from tests.breaking import MARK, Balancer
from trident_client import AsyncClient, Client, DeadlineExceededError, UnavailableError
from trident_serving.launcher.local import LocalServer

PROMPT = MARK.decode()
MIDWAY = 700  # bytes of an answer, which are some chunks of a generation
ONCE = {"model": "talk", "max_tokens": 200, "min_tokens": 200}


@pytest.fixture(scope="module", params=["grpc", "http"])
def balancer(request: pytest.FixtureRequest, gateway_server: LocalServer) -> Iterator[tuple[Balancer, str]]:
    """A balancer before one of the server's ports, and its URL."""
    grpc = request.param == "grpc"
    with breaking.before(gateway_server.grpc_port if grpc else gateway_server.http_port) as made:
        yield made, f"{'' if grpc else 'http://'}127.0.0.1:{made.port}"


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def call(request: pytest.FixtureRequest, balancer: tuple[Balancer, str]) -> Callable[..., Any]:
    """Makes one call of a fresh client; a stream is read to its end."""

    async def awaited(name: str, words: Any, options: dict[str, Any], settings: dict[str, Any]) -> Any:
        async with AsyncClient(balancer[1], **settings) as client:
            made = getattr(client, name)(*words, **options)
            return [each async for each in made] if hasattr(made, "__anext__") else await made

    def make(name: str, *words: Any, settings: dict[str, Any], **options: Any) -> Any:
        if request.param is AsyncClient:
            return asyncio.run(awaited(name, words, options, settings))
        with Client(balancer[1], **settings) as client:
            made = getattr(client, name)(*words, **options)
            return list(made) if hasattr(made, "__next__") else made

    return make


def test_what_the_caller_has_not_seen_is_asked_again(
    balancer: tuple[Balancer, str], call: Callable[..., Any], direct: Client
) -> None:
    """An answer in one piece and one of many chunks that is wanted whole, cut at their beginning and midway."""
    faulty, _ = balancer
    vectors, text = direct.embed([PROMPT, "b"], model="embed"), direct.generate(PROMPT, **ONCE).text
    for after in (0, 40):
        faulty.faults(("cut", after), ("cut", 0))
        found = call("embed", [PROMPT, "b"], model="embed", settings={"retries": 2})
        assert np.allclose(found, vectors, atol=1e-5)
        assert faulty.marked == 3
    for after in (0, MIDWAY):
        faulty.faults(("cut", after))
        assert call("generate", PROMPT, settings={"retries": 1}, **ONCE).text == text
        assert faulty.marked == 2
    faulty.faults(("cut", 0))
    assert "".join(each.text for each in call("stream", PROMPT, settings={"retries": 1}, **ONCE)) == text
    assert faulty.marked == 2


def test_what_is_not_asked_again(balancer: tuple[Balancer, str], call: Callable[..., Any]) -> None:
    """Anything without `retries`, and no more often than they say."""
    faulty, _ = balancer
    for name, settings, cuts in (("generate", {}, 1), ("embed", {}, 1), ("embed", {"retries": 1}, 2)):
        faulty.faults(*[("cut", 0)] * cuts)
        options: dict[str, Any] = {"model": "embed"} if name == "embed" else ONCE
        with pytest.raises(UnavailableError):
            call(name, PROMPT, settings=settings, **options)
        assert faulty.marked == cuts
        time.sleep(0.2)  # channels share connections: the next one must not send on one that was just cut
    # The server was asked only once for what it is told, not asked.
    faulty.faults(("cut", 0))
    with pytest.raises(UnavailableError):
        call("parameters", PROMPT, settings={"retries": 5})
    assert faulty.connections == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_stream_whose_first_chunk_the_caller_has_is_not_asked_again(
    balancer: tuple[Balancer, str], kind: type[Client | AsyncClient]
) -> None:
    faulty, url = balancer
    faulty.faults()
    options: dict[str, Any] = {"model": "talk", "max_tokens": 1500, "min_tokens": 1500}

    async def awaited() -> None:
        async with AsyncClient(url, retries=5) as client:
            stream = client.stream(PROMPT, **options)
            await anext(stream)
            faulty.cut()
            async for _ in stream:
                pass

    def read() -> None:
        with Client(url, retries=5) as client:
            chunks = client.stream(PROMPT, **options)
            next(chunks)
            faulty.cut()
            list(chunks)

    with pytest.raises(UnavailableError):
        asyncio.run(awaited()) if kind is AsyncClient else read()
    assert faulty.marked == 1


def test_a_server_that_hangs_is_given_up(
    balancer: tuple[Balancer, str], call: Callable[..., Any], direct: Client
) -> None:
    faulty, _ = balancer
    text = direct.generate(PROMPT, **ONCE).text
    settings = {"retries": 2, "retry_silence": 0.3, "timeout": 20}
    began = time.monotonic()
    faulty.faults(("freeze", 0))
    assert call("embed", [PROMPT], model="embed", settings=settings).shape == (1, 32)
    faulty.faults(("freeze", MIDWAY))
    assert call("generate", PROMPT, settings=settings, **ONCE).text == text
    assert 0.6 <= time.monotonic() - began < 10
    faulty.faults(*[("freeze", 0)] * 3)  # the last try has what is left of the time
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        call("embed", [PROMPT], model="embed", settings=settings | {"timeout": 1.2})
    assert faulty.marked == 3
    assert 1.1 <= time.monotonic() - began < 5
