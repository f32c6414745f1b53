"""The ways into a server: both clients, over gRPC and over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np

from trident_client import AsyncClient, Client
from trident_serving.launcher.local import LocalServer

Call = Callable[[Any], Any]


def answers(server: LocalServer, *calls: Call) -> list[Any]:
    """The answers to calls, which are the same through every door.

    Args:
        calls: each takes a client and calls one method; streams become lists.

    Raises:
        AssertionError: a door answers differently than the first; it is named.
    """
    with Client(server.grpc_url, timeout=60) as client:
        expected = [_plain(call(client)) for call in calls]
    admin = server.admin_headers["trident-admin-key"]
    with Client(server.http_url, timeout=60, admin_key=admin) as client:
        assert [_plain(call(client)) for call in calls] == expected, "Client over HTTP"
    for url in (server.grpc_url, server.http_url):
        assert asyncio.run(_awaited(url, admin, calls)) == expected, f"AsyncClient at {url}"
    return expected


async def _awaited(url: str, admin: str, calls: tuple[Call, ...]) -> list[Any]:
    async with AsyncClient(url, timeout=60, admin_key=admin) as client:
        found: list[Any] = []
        for call in calls:
            started = call(client)
            if isinstance(started, AsyncIterator):
                found.append([each async for each in started])
            else:
                assert isinstance(started, Awaitable)
                found.append(await started)
        return [_plain(each) for each in found]


def _plain(answer: Any) -> Any:
    """What can be compared with ==."""
    if isinstance(answer, np.ndarray):
        return answer.dtype.str, answer.tolist()
    return list(answer) if isinstance(answer, Iterator) else answer
